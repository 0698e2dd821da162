"""The second thread, whole: a chat file on a real decoder; trained, used, merged, exported, and read by others."""

import json

import pytest
import torch

import veneer
from veneer.bases import open_base


@pytest.mark.slow
@pytest.mark.network
def test_a_chat_file_trains_a_real_decoder_that_others_can_load(tmp_path):
    import peft

    rows = veneer.data.read("builtin:dialog", task="instruct")
    chat = tmp_path / "my chat.jsonl"
    chat.write_text(
        "".join(json.dumps({"messages": r["messages"]}) + "\n" for r in rows.train[:300]), encoding="utf-8"
    )
    options = {"data_options": {"sizes": {"validation": 40, "test": 0}}, "max_length": 96, "batch_size": 8}
    common = {"model": "builtin:smollm2", "data": str(chat), "task": "instruct", "progress": False, **options}
    before = veneer.train(**common, method="untrained", output=tmp_path / "before")
    after = veneer.train(
        **common, method="lora:rank=8", learning_rate=5e-4, max_steps=25, output=tmp_path / "after", seed=1
    )
    name = "loss" if "loss" in after.metrics["validation"] else "perplexity"
    assert after.metrics["validation"][name] < before.metrics["validation"][name]

    text = veneer.generate(tmp_path / "after", "What is your name?", max_new_tokens=12)
    assert text.strip()

    base = open_base("builtin:smollm2", task="instruct")
    adapter = veneer.load(base.model, tmp_path / "after")
    base.model.eval()
    ids = base.tokenizer("The weather today is", return_tensors="pt")
    with torch.no_grad():
        mine = base.model(**ids).logits
        veneer.export(base.model, adapter.name, tmp_path / "peft", format="peft")
        veneer.export(base.model, adapter.name, tmp_path / "gguf", format="gguf")
        report = veneer.merge(base.model, probe=dict(ids))
        assert report.relative_error < 1e-4
        veneer.unmerge(base.model)
        assert torch.equal(base.model(**ids).logits, mine)
        other = peft.PeftModel.from_pretrained(
            open_base("builtin:smollm2", task="instruct").model, tmp_path / "peft"
        ).eval()
        torch.testing.assert_close(other(**ids).logits, mine, atol=2e-4, rtol=1e-4)
    assert list((tmp_path / "gguf").glob("*.gguf"))
