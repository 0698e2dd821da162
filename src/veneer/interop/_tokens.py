"""TRAINABLE_TOKENS of HF PEFT: rows of a table of tokens and nothing else, here method lora without sites.

A file holds the rows themselves, once for each module that shares the table; here they are what is added to the
base's rows, once.
"""

from __future__ import annotations

from typing import Any

import torch

from veneer.edits import TrainedRows
from veneer.engine import Adapter
from veneer.errors import BadFile, ShapeDiffers, Unsupported

from . import _targets
from ._config import Field
from ._converter import OWN_FORM, Converter, Reading, Request, Writing, converter
from ._copies import ROWS, write_rows
from ._lora import token_rows

_END = ROWS.rpartition(".")[2]


@converter
class TrainableTokens(Converter):
    """TRAINABLE_TOKENS: lora with `sites=[]` and `trainable_tokens`."""

    peft_type, methods, stem, beside = "TRAINABLE_TOKENS", ("lora",), _END, False
    fields = {
        "token_indices": Field([], "tokens"), "target_modules": Field(None, "names"), "init_weights": Field(True),
    }  # fmt: skip

    def request(self, job: Reading) -> Request:
        ids = job.config["token_indices"]
        if not isinstance(ids, list) or not ids:
            raise BadFile(
                f"'{job.config.path}': token_indices={ids!r:.40}; a list of token ids was expected.",
                next_step='"token_indices": [3, 7] in that file, or copy it again',
            )
        modules = _targets.target_modules(job.model, job.anatomy, job.config)
        made = Request("lora", {"sites": []})
        token_rows(job, made, dict.fromkeys(modules, ids) if modules else ids)
        self._rename(job)
        return made

    def _rename(self, job: Reading) -> None:
        """Rows under the name that they have beside an update; copies of modules that share the table are left out."""
        names = {f"{job.prefix}{name}" for name in job.rows.values()}
        taken = {key: job.file.pop(f"{key}.{_END}") for key in names}
        for key, value in taken.items():
            if value is not None:
                job.file.put(f"{key}.{ROWS}", value)
        for module, name in job.rows.items():
            copy, main = job.file.pop(f"{job.prefix}{module}.{_END}"), taken[f"{job.prefix}{name}"]
            if copy is not None and main is not None and not torch.equal(copy, main):
                raise ShapeDiffers(
                    f"'{job.config.path.parent}' holds other rows for '{module}' than for '{name}', which is the same "
                    "table in this base.",
                    next_step="load it on a base with tie_word_embeddings=False",
                )

    def writes(self, adapter: Adapter) -> bool:
        sites = adapter.plan.sites
        return (
            adapter.method.key in (*self.methods, "dora", "adalora")
            and bool(sites)
            and all(isinstance(sp.method, TrainedRows) for sp in sites)
        )

    def write(self, job: Writing) -> dict[str, Any]:
        asked = write_rows(job)["trainable_token_indices"]
        lists = list(asked.values()) if isinstance(asked, dict) else [asked]
        if any(ids != lists[0] for ids in lists):
            raise Unsupported(
                f"TRAINABLE_TOKENS: HF PEFT has one list of tokens for all tables; these are {lists}.",
                next_step=OWN_FORM,
            )
        job.tensors = {k.replace(ROWS, _END): v for k, v in job.tensors.items()}
        modules = [k.removeprefix(job.prefix).removesuffix(f".{_END}") for k in job.tensors]
        return {"token_indices": lists[0], "target_modules": _targets.words_for(job.host, modules)}
