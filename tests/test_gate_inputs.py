"""What strains the contract from the side of inputs: queries, towers, teachers, inversion, pictures, skips."""

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out
from veneer.edits import At, Method, Sites, Specs, Tensors, constant, hyper, method
from veneer.errors import BadOption, Unsupported


@pytest.mark.parametrize("variant", ["retrieve", "attend"])
def test_a_prompt_made_from_query_and_document_is_each_rows_own(variant):
    model, given = base("llama"), inputs("llama", 3, padding="left")
    add(model, "q_peft", "q", variant=variant, k=2)
    add(model, "lora", "l")
    extra = {"query_ids": torch.randint(5, 40, (3, 4)), "document_ids": torch.randint(5, 40, (3, 6))}
    names = ["q", "l", "q"]
    with veneer.rows(model, names):
        together = out(model, given, **extra)
    for i, name in enumerate(names):
        keep = given["attention_mask"][i].bool()
        one = {k: v[i : i + 1][:, keep] for k, v in given.items()}
        more = {k: v[i : i + 1] for k, v in extra.items()} if name == "q" else {}
        with veneer.active(model, name):
            torch.testing.assert_close(out(model, one, **more)[0], together[i][keep], atol=1e-9, rtol=0)
    with veneer.active(model, "q"):
        other = out(model, given, **{**extra, "query_ids": extra["query_ids"].flip(1) + 1})
        same = out(model, given, **extra)
        assert (other - same).abs().max() > 1e-9  # another query, another prompt
        with pytest.raises(BadOption, match="query_ids"):
            out(model, given)
        generated = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=3,
            do_sample=False, pad_token_id=0, **extra,
        )  # fmt: skip
        assert generated.shape[1] == given["input_ids"].shape[1] + 3


@pytest.mark.parametrize(("family", "length"), [("llama", 2), ("llama", 0), ("gpt2", 1)])
def test_a_row_with_fewer_hints_has_fewer_tokens_in_front_of_it(family, length):
    """One adapter, queries of 4, 1 and 3 tokens: padded hints are neither seen nor counted."""
    model, given = base(family), inputs(family, 3, padding="left")
    add(model, "q_peft", "q", variant="attend", length=length)
    query, document = torch.randint(5, 40, (3, 4)), torch.randint(5, 40, (3, 6))
    real = torch.tensor([[True] * 4, [True, False, False, False], [True, True, True, False]])
    extra = {"query_ids": query, "document_ids": document, "query_mask": real}
    together = out(model, given, **extra)
    generated = model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=3, do_sample=False,
        pad_token_id=0, eos_token_id=None, **extra,
    )  # fmt: skip
    for i in range(3):
        keep = given["attention_mask"][i].bool()
        one = {k: v[i : i + 1][:, keep] for k, v in given.items()}
        more = {"query_ids": query[i : i + 1, real[i]], "document_ids": document[i : i + 1]}
        torch.testing.assert_close(out(model, one, **more)[0], together[i][keep], atol=1e-9, rtol=0)
        alone = model.generate(
            input_ids=one["input_ids"], attention_mask=one["attention_mask"], max_new_tokens=3, do_sample=False,
            pad_token_id=0, eos_token_id=None, **more,
        )  # fmt: skip
        assert torch.equal(alone[0, -3:], generated[i, -3:])


def test_two_towers_take_names_for_rows_of_their_own_number():
    model = base("clip")
    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, *_picture(model), generator=g, dtype=torch.float64)
    ids = torch.randint(3, 40, (2, 6), generator=g)
    add(model, "lora", "a", seed=1)
    add(model, "lora", "b", seed=2)
    given = {"input_ids": ids, "pixel_values": pixels}
    with veneer.rows(model, {"text": ["a", None], "image": ["b", "a", None]}):
        mixed = model(**given)
    for stack, names in (("text", ["a", None]), ("image", ["b", "a", None])):
        for i, name in enumerate(names):
            with veneer.active(model, name):
                alone = model(**given)
            got, expected = getattr(mixed, f"{stack}_embeds")[i], getattr(alone, f"{stack}_embeds")[i]
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    with veneer.active(model, None):
        assert (model(**given).text_embeds[0] - mixed.text_embeds[0]).abs().max() > 1e-8


def _picture(model):
    config = model.config.vision_config
    return (3, config.image_size, config.image_size)


def test_an_invertible_adapter_is_undone_before_a_head_of_several_layers():
    import transformers as t

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = t.BertForMaskedLM(t.BertConfig(vocab_size=64, **sizes)).eval().double()
    adapter = add(model, "invertible_adapter", "i")
    seen = []
    model.cls.predictions.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    found = model(torch.arange(3, 13).view(2, 5), output_hidden_states=True)
    named = {key.partition("/")[2]: value for key, value in adapter.named().items()}
    changed = adapter.method.output(Tensors(named), seen[0])
    last = found.hidden_states[-1]
    torch.testing.assert_close(changed, last, atol=1e-10, rtol=0)
    assert (seen[0] - last).abs().max() > 1e-3


def test_prefixes_in_windows_serve_their_own_rows():
    import zoo

    model, given = zoo.zoo()["swin"]()
    given = {k: torch.cat([v, v.flip(-1)[:1]]) for k, v in given.items()}
    add(model, "prefix_tuning", "a", length=2, seed=1)
    add(model, "prefix_tuning", "b", length=3, seed=2)
    with veneer.rows(model, ["b", None, "a"]):
        mixed = out(model, given)
    for i, name in enumerate(("b", None, "a")):
        with veneer.active(model, name):
            alone = out(model, given)
        torch.testing.assert_close(mixed[i], alone[i], atol=1e-6, rtol=0)
    assert (alone[0] - mixed[0]).abs().max() > 1e-4


def test_a_teacher_pass_inside_a_step_leaves_the_outer_call_alone():
    model, given = base("bert"), inputs("bert", 2)
    add(model, "lora", "a")
    model.train()
    bare = out(model, given, adapters=None).detach()
    with veneer.rows(model, ["a", "a"]):
        student = out(model, given)
        with veneer.bare(model), torch.no_grad():
            teacher = out(model, given)
        again = out(model, given)
    assert torch.equal(teacher, bare)
    assert torch.equal(student, again)
    ((student - teacher) ** 2).sum().backward()
    assert veneer.adapters(model)["a"].leaves()[0].grad.abs().max() > 0


@pytest.mark.parametrize("coupling", ["nice", "glow"])
def test_an_invertible_adapter_is_undone_before_a_tied_output(coupling):
    """With no blocks between, the inverse at the head gives back the embedding exactly."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=0, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    model.transformer.ln_f = torch.nn.Identity()
    ids = torch.randint(1, 50, (2, 6))
    before = model(input_ids=ids).logits
    add(
        model,
        "invertible_adapter",
        "i",
        size=0.3,
        coupling=coupling,
        sites={"output": "transformer.drop", "input": "lm_head"},
    )
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-9, rtol=1e-9)
    hidden = model.transformer(input_ids=ids).last_hidden_state
    with veneer.active(model, None):
        assert (model.transformer(input_ids=ids).last_hidden_state - hidden).abs().max() > 1e-3


def test_a_ladder_keeps_no_gradient_in_the_base():
    model, given = base("llama"), inputs("llama", 2)
    add(model, "ladder_side_tuning", "s")
    model.train()
    seen = []

    def watch(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        seen.append(tensor.requires_grad)

    handles = [layer.register_forward_hook(watch) for layer in model.model.layers]
    out(model, given, use_cache=False).sum().backward()
    for handle in handles:
        handle.remove()
    assert seen == [False] * len(model.model.layers)
    assert veneer.adapters(model)["s"].leaves()[0].grad.abs().max() > 0


def test_a_generator_shared_by_sites_makes_weights_for_the_task_of_each_row():
    model, given = base("bert"), inputs("bert", 3)
    add(model, "hyperformer", "h", tasks=3)
    tasks = torch.tensor([2, 0, 1])
    together = out(model, given, tasks=tasks)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in given.items()}
        torch.testing.assert_close(
            out(model, one, tasks=tasks[i : i + 1])[0], together[i], atol=1e-10, rtol=0
        )
    assert (out(model, given, tasks=tasks.flip(0))[0] - together[0]).abs().max() > 1e-8


def test_pictures_from_outside_go_through_inputs_embeds_with_prompts_in_front():
    """An encoder's output in a language model's input: the prompt stands before it, as before text."""
    model = base("llama")
    g = torch.Generator().manual_seed(0)
    picture = torch.randn(2, 4, model.config.hidden_size, generator=g, dtype=torch.float64)
    text = model.get_input_embeddings()(torch.randint(5, 40, (2, 5), generator=g))
    embeds = torch.cat([picture, text], 1)
    add(model, "prompt_tuning", "p", length=3)
    add(model, "lora", "l")
    given = {"inputs_embeds": embeds, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    with veneer.rows(model, ["p", "l"]):
        y = out(model, given)
    assert y.shape[1] == 9
    prompt = next(iter(veneer.adapters(model)["p"].named().values()))
    with veneer.active(model, None):
        by_hand = out(model, {"inputs_embeds": torch.cat([prompt[None].expand(1, -1, -1), embeds[:1]], 1)})[
            :, 3:
        ]
    torch.testing.assert_close(y[:1], by_hand, atol=1e-9, rtol=0)


@method("test_skip", paper="", family="test", registered=False)
class Skip(Method):
    """A block that is skipped, in part: y = x + strength (block(x) - x)."""

    strength: float = hyper(0.0, "share of the block that is kept")
    sites: Sites = "block"

    def tensors(self, site) -> Specs:
        return {"keep": constant(self.strength, decay=False)}

    def around(self, t: Tensors, call, x: torch.Tensor, at: At) -> torch.Tensor:
        return x + t.keep * (call(x) - x)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_block_is_skipped_for_some_rows(family):
    model, given = base(family), inputs(family, 3, padding="left" if family == "llama" else "right")
    veneer.attach(model, Skip(), name="skip", layers=[1])
    names = ["skip", None, "skip"]
    with veneer.rows(model, names):
        together = out(model, given)
    for i, name in enumerate(names):
        with veneer.active(model, name):
            one = {k: v[i : i + 1] for k, v in given.items()}
            got, expected = together[i], out(model, one)[0]
            if family == "llama":
                keep = given["attention_mask"][i].bool()
                got, expected = got[keep], expected[keep]
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    if family == "llama":
        ids = {k: given[k] for k in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(**ids, adapters=names, **options)
        assert torch.equal(cached, model.generate(**ids, adapters=names, use_cache=False, **options))


def test_a_prefix_whose_positions_cannot_be_moved_is_refused_at_attach():
    with pytest.raises(Unsupported, match="position_offset"):
        veneer.attach(base("bart"), "prefix_tuning", position_offset=4)
    model, given = base("gpt2"), inputs("gpt2", 2)
    add(model, "prefix_tuning", "a", length=4, position_offset=4, seed=1)
    add(model, "prefix_tuning", "b", length=4, seed=1)
    shifted = {**given, "position_ids": given["position_ids"] + 4}
    torch.testing.assert_close(
        out(model, given, adapters="a"), out(model, shifted, adapters="b"), atol=1e-10, rtol=0
    )
    assert (out(model, given, adapters="a") - out(model, given, adapters="b")).abs().max() > 1e-6
