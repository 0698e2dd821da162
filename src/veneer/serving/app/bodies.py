"""What clients send: OpenAI's fields and vLLM's extras as checked data, and what they mean for sampling.

Types are read strictly (the text "1" is no number). Fields that are not known are kept aside: they are passed over
with a warning, or refused in strict mode. Known fields that would change the answer and cannot be honoured are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from veneer.serving import Sampling

from .errors import ApiError

MOST_STOPS, LONGEST_STOP = 4, 1000
TEMPLATE_ARGUMENTS = {
    "chat_template", "conversation", "tokenize", "return_tensors", "return_dict", "padding", "truncation",
    "max_length", "tokenizer_kwargs", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "return_assistant_tokens_mask", "messages",
}  # fmt: skip


def _whole(text: str) -> str:
    """JSON can say half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP), AfterValidator(_whole)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Prompt = Text | Tokens | Texts | Annotated[list[Tokens], Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    @property
    def unknown(self) -> list[str]:
        return list(self.model_extra or ())


class Named(Body):
    """Every request that asks a model: by `model`, or as some servers' clients do by `adapter_id` or `lora_path`."""

    model: Text = Field(description="an adapter's name, base:name, name@version, or the base's name")
    adapter_id: Text | None = Field(None, description="the adapter, where `model` names the base")
    lora_path: Text | None = Field(None, description="the same under another server's name")
    user: str | None = None

    @property
    def asked(self) -> str:
        return self.adapter_id or self.lora_path or self.model


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampled(Named):
    """What completions and chat have in common."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=1000), AfterValidator(_whole)] | None = None
    priority: int | None = None

    def sampling(self, max_tokens: int, logprobs: int | None) -> Sampling:
        """With OpenAI's defaults where a field is missing."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens or 0, max_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_biases(self.logit_bias or {}),
            seed=self.seed,
            stop=tuple(stop),
            stop_tokens=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )

    def refuse_what_is_not_there(self) -> None:
        if self.prompt_logprobs is not None:
            raise _not_there("prompt_logprobs", "Log probabilities of the prompt are not computed")
        if self.skip_special_tokens is False:
            raise _not_there("skip_special_tokens", "Special tokens are always left out of texts")


class CompletionRequest(Sampled):
    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: str | None = None

    def refuse_what_is_not_there(self) -> None:
        super().refuse_what_is_not_there()
        if self.suffix:
            raise _not_there("suffix", "Text cannot be put before a suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _not_there("best_of", "Answers are not ranked: best_of has to equal n")
        if self.echo and self.logprobs is not None:
            raise _not_there(
                "echo", "Log probabilities of the prompt are not computed: leave out echo or logprobs"
            )


class Part(Body):
    type: Text
    text: Text | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None

    def plain(self, place: int) -> dict[str, str]:
        """As a chat template reads it."""
        if isinstance(self.content, list):
            for i, part in enumerate(self.content):
                if part.type != "text" or part.text is None:
                    raise ApiError(
                        400, f"A part of type {part.type[:50]!r} cannot be read: texts alone can.",
                        param=f"messages.{place}.content.{i}",
                    )  # fmt: skip
            text = "".join(part.text or "" for part in self.content)
        else:
            text = self.content or ""
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_what_is_not_there(self) -> None:
        super().refuse_what_is_not_there()
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise _not_there(name, "Tools cannot be called")
        if self.tool_choice not in (None, "none", "auto"):
            raise _not_there("tool_choice", "Tools cannot be called")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise _not_there("response_format", "Answers are plain text")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs")

    def template_options(self) -> dict[str, Any]:
        """What the chat template is given beside the messages."""
        given = dict(self.chat_template_kwargs or {})
        for name in given:
            if name in TEMPLATE_ARGUMENTS or not name.isidentifier():
                raise ApiError(
                    400, f"chat_template_kwargs may not set {name[:50]!r}.", param="chat_template_kwargs"
                )
        if self.continue_final_message:
            return {**given, "continue_final_message": True, "add_generation_prompt": False}
        wanted = self.add_generation_prompt is not False
        return {**given, "add_generation_prompt": wanted}


class TokenizeRequest(Body):
    """A prompt, or messages."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: Text | None = None
    tokens: Annotated[list[Token], Field(max_length=1 << 20)]


def _biases(given: dict[str, float]) -> dict[int, float]:
    found = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise ApiError(
                400, f"logit_bias: {name[:50]!r} is not the number of a token.", param="logit_bias"
            )
        found[int(name)] = bias
    return found


def _not_there(name: str, why: str) -> ApiError:
    return ApiError(400, f"{why}.", param=name, code="unsupported_parameter")
