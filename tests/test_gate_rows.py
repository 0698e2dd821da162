"""One batch of rows of all methods: any order, both padding sides, bare rows beside, stacks of two, generation.

Each row equals that adapter alone and unpadded, on an encoder, a decoder, an encoder-decoder and a vision model.
"""

import random

import pytest
import torch

import veneer
from engine_tools import add, base, inputs, out, real
from veneer.edits import registry
from veneer.errors import BadOption, NoSiteFound, Unsupported

APART = {  # not in a mixed batch, and why
    "linear_probe": "edits nothing: its head is trained whole",
    "fish_mask": "needs data to start; see test_gate_starts",
    "adapter_fusion": "combines others; see below",
    "q_peft": "needs a query beside the input; see test_gate_inputs",
    "diff_pruning": "edits every parameter, like full",
}
PER_FAMILY = {
    "t5": {"full", "bitfit"},  # a table of relative positions is shared by all rows; there are no biases
    "llama": {"bitfit"},
}


def populated(family, size=0.2):
    model = base(family)
    names = []
    for key in registry():
        if key in APART or key in PER_FAMILY.get(family, ()):
            continue
        for suffix, seed in (("a", 1), ("b", 2)):
            try:
                add(model, key, f"{key}.{suffix}", seed=seed, size=size)
            except (NoSiteFound, Unsupported):
                break
            names.append(f"{key}.{suffix}")
    assert len(names) >= 24
    return model, names


def alone(given, i):
    one = {k: v[i : i + 1] for k, v in given.items()}
    if "attention_mask" in one:
        keep = one["attention_mask"][0].bool()
        own = {k for k in one if not k.startswith("decoder") and one[k].shape[:2] == (1, len(keep))}
        one = {k: v[:, keep] if k in own else v for k, v in one.items()}
    return one


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "vit"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_every_row_of_a_batch_of_all_methods_equals_that_adapter_alone(family, padding):
    if family == "vit" and padding == "left":
        pytest.skip("pictures have no padding")
    model, names = populated(family)
    order = [*names, None, None, [names[0], names[-1]], [names[3], names[4]]]
    random.Random(1).shuffle(order)
    given = inputs(family, len(order), padding=padding)
    bert_positions = family == "bert"
    if bert_positions:  # absolute positions: law of padding with positions given
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # BERT's pooler reads the first position, which is padding on the left: its hidden states are compared.
    whole, model_out = model, model.bert if family == "bert" else model
    with torch.no_grad():
        with veneer.active(whole, None):
            bare = out(model_out, given)
        with veneer.rows(model, order):
            together = out(model_out, given)
        moved = 0
        for i, name in enumerate(order):
            one = alone(given, i)
            with veneer.active(model, name):
                expected = out(model_out, one)[0]
            got = real(together, given.get("attention_mask") if family != "t5" else None, i)
            torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            moved += bool((got - real(bare, given.get("attention_mask"), i)).abs().max() > 1e-7 if family != "t5"
                          else (together[i] - bare[i]).abs().max() > 1e-7)  # fmt: skip
        assert moved >= len(names)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_a_name_a_sequence_equals_each_alone_and_without_a_cache(family, options):
    model, names = populated(family, size=0.3)
    order = [n for n in names if n.endswith(".a")] + [None, [names[0], names[-1]]]
    padding = "left" if family == "llama" else "right"
    given = inputs(family, len(order), tokens=7, padding=padding)
    given = {k: v for k, v in given.items() if k in ("input_ids", "attention_mask")}
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    together = model.generate(**given, adapters=order, **options)[:, -5:]
    again = model.generate(**given, adapters=order, use_cache=False, **options)[:, -5:]
    assert torch.equal(together, again)
    bare = model.generate(**given, adapters=None, **options)[:, -5:]
    assert (together != bare).any(1).sum() >= 5
    for i in range(0, len(order), 3):
        lone = model.generate(**alone(given, i), adapters=[order[i]], **options)[0, -5:]
        assert torch.equal(lone, together[i]), order[i]


def test_sampling_draws_each_sequence_from_its_own_adapter():
    model, names = populated("llama", size=0.3)
    given = {
        k: v for k, v in inputs("llama", 4, padding="left").items() if k in ("input_ids", "attention_mask")
    }
    order = ["lora.a", None, "prefix_tuning.a", "loreft.b"]
    torch.manual_seed(0)
    sampled = model.generate(
        **given, adapters=order, do_sample=True, top_k=1, max_new_tokens=4, pad_token_id=0
    )
    greedy = model.generate(**given, adapters=order, do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(
        sampled, greedy
    )  # the likeliest token alone: drawing must not change which row is whose
    assert set(names) >= {"lora.a", "prefix_tuning.a", "loreft.b"}


def test_threads_see_their_own_rows():
    import threading

    model, _names = populated("bert")
    given = inputs("bert", 2)
    wanted = {n: out(model, given, adapters=n) for n in ("lora.a", "dora.b")}
    wrong = []

    def work(name):
        for _ in range(10):
            with veneer.rows(model, [name, name]), torch.no_grad():
                if (out(model, given) - wanted[name]).abs().max() > 1e-10:
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in wanted]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_fusion_attends_over_named_adapters_for_its_rows():
    model = base("bert")
    add(model, "serial_adapter", "a", seed=1)
    add(model, "serial_adapter", "b", seed=2)
    add(model, "adapter_fusion", "f", seed=3, of=["a", "b"])
    given = inputs("bert", 3)
    with veneer.rows(model, ["f", None, "a"]):
        together = out(model, given)
    for i, name in enumerate(["f", None, "a"]):
        with veneer.active(model, name):
            torch.testing.assert_close(out(model, given)[i], together[i], atol=1e-10, rtol=0)
    assert (together[0] - out(model, given, adapters="a")[0]).abs().max() > 1e-7


def test_names_for_another_number_of_rows_are_refused_outside_of_generation():
    """Two names for four rows are beams in `generate`; in a forward they are a mistake."""
    model, given = base("bert"), inputs("bert", 4)
    add(model, "lora", "a")
    with (
        veneer.rows(model, ["a", None]),
        pytest.raises(BadOption, match="4 rows, but names were given for 2"),
    ):
        out(model, given)
    with veneer.rows(model, ["a"]):
        assert torch.equal(out(model, given), out(model, given, adapters="a"))
