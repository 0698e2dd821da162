"""The plain networks and the readers of foreign files, on small things worked by hand."""

import struct

import pytest
import torch
from torch import nn

from veneer.bases._convert import read_ctranslate2
from veneer.bases._nets import (
    EfficientNetLite0,
    Recurrence,
    SameConv2d,
    SpeakerLSTM,
    Translator,
    TranslatorConfig,
)
from veneer.bases._networks import Pictures, Voices, mel_filters, read_marian
from veneer.errors import BadFile


@pytest.fixture
def translator():
    torch.manual_seed(0)
    config = TranslatorConfig(
        vocab_size=20,
        hidden_size=16,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = Translator(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def test_the_recurrence_by_hand():
    """W = 1, f = sigmoid(0) = 1/2: c = 2, then 1/2 2 + 1/2 (-8) = -3, whose relu is 0."""
    layer = Recurrence(1)
    nn.init.ones_(layer.candidate.weight)
    nn.init.zeros_(layer.forget.weight)
    nn.init.zeros_(layer.forget.bias)
    y, state = layer(torch.tensor([[[4.0], [-8.0]]]))
    assert y.flatten().tolist() == [2.0, 0.0]
    assert state.item() == -3.0


def test_a_translator_says_step_by_step_what_it_says_at_once_whatever_the_padding(translator):
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    target = torch.tensor([[20, 5, 6, 7], [20, 9, 9, 2]])
    whole = translator(ids, mask, target).logits
    memory, seen = translator.encode(ids, mask)
    states, steps = None, []
    for t in range(4):
        hidden, states = translator.decode(target[:, t : t + 1], memory, seen, states, t)
        steps.append(translator.logits(hidden))
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    torch.testing.assert_close(translator(ids[1:, :2], None, target[1:]).logits, whole[1:])
    said = translator.generate(ids, mask, max_new_tokens=5)
    assert said.shape[1] <= 5
    logits = translator(ids, mask, torch.cat([target[:, :1], said[:, :-1]], 1)).logits
    assert torch.equal(logits[:, 0].argmax(-1), said[:, 0])


def test_a_convolution_is_padded_as_tensorflow_does():
    layer = SameConv2d(1, 1, 3, stride=2, bias=False)
    nn.init.ones_(layer.weight)
    assert layer(torch.ones(1, 1, 5, 6)).shape == (1, 1, 3, 3)
    # Four pixels, stride 2: the one padded row and column stand behind, so the first window is whole.
    assert layer(torch.ones(1, 1, 4, 4)).flatten().tolist() == [9.0, 6.0, 6.0, 4.0]


def test_networks_take_what_their_feeders_give():
    torch.manual_seed(0)
    picture = torch.randint(0, 255, (30, 40, 3), dtype=torch.uint8).numpy()
    x = Pictures()(images=[picture, picture[..., 0]])["pixel_values"]
    assert x.shape == (2, 3, 224, 224)
    assert x.min() >= -127 / 128
    assert x.max() <= 1
    assert EfficientNetLite0(classes=5).eval()(x[:, :, :64, :64]).logits.shape == (2, 5)
    sounds = [torch.randn(8000).numpy(), torch.randn(4000).numpy()]
    features = Voices()(sounds)["input_features"]
    assert features.shape == (2, 51, 40)
    out = SpeakerLSTM(classes=3)(features)
    assert out.logits.shape == (2, 3)
    torch.testing.assert_close(out.hidden.norm(dim=1), torch.ones(2))


def test_a_tone_is_in_the_band_of_its_pitch():
    t = torch.arange(16000) / 16000
    low, high = (
        Voices()(torch.sin(2 * torch.pi * f * t) * 0.1)["input_features"][0].mean(0).argmax()
        for f in (300, 4000)
    )
    assert low < 8
    assert high > 25
    assert (mel_filters(40, 201, 16000) >= 0).all()


def test_a_marian_file_is_read_by_its_layout():
    """A float32 vector, and an 8-bit matrix (in 2, out 3) stored transposed with the multiplier 4."""
    codes = bytes([4, 8, 12, 252, 0, 100])
    parts = [
        (b"b\0", 0x404, (1, 2), struct.pack("<2f", 1.5, -2.0)),
        (b"W\0", 0x4101, (2, 3), codes + struct.pack("<f", 4.0)),
        (b"special:model.yml\0", 0x101, (3,), b"abc"),
    ]
    data = struct.pack("<2Q", 1, len(parts))
    data += b"".join(struct.pack("<4Q", len(n), kind, len(shape), len(c)) for n, kind, shape, c in parts)
    data += b"".join(n for n, *_ in parts) + b"".join(struct.pack(f"<{len(s)}i", *s) for _, _, s, _ in parts)
    data += struct.pack("<Q", 5) + b"\0" * 5 + b"".join(c for *_, c in parts)
    found = read_marian(data)
    assert found["b"].tolist() == [[1.5, -2.0]]
    assert found["W"].tolist() == [[1.0, 2.0], [3.0, -1.0], [0.0, 25.0]]
    assert set(found) == {"b", "W"}
    with pytest.raises(BadFile, match="form 2"):
        read_marian(struct.pack("<Q", 2) + data[8:])


def test_a_ctranslate2_file_is_read_by_its_layout():
    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    half = torch.tensor([[0.5, -1.0]], dtype=torch.float16).numpy().tobytes()
    data = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<2I", 3, 2)
    data += string("a/weight") + struct.pack("<B2IBI", 2, 1, 2, 4, 4) + half
    data += string("n") + struct.pack("<BBI", 0, 1, 1) + b"\x07"
    data += struct.pack("<I", 1) + string("b/weight") + string("a/weight")
    found = read_ctranslate2(data)
    assert found["a/weight"].tolist() == [[0.5, -1.0]]
    assert found["b/weight"] is found["a/weight"]
    assert found["n"].item() == 7
    with pytest.raises(BadFile, match="form 5"):
        read_ctranslate2(struct.pack("<I", 5) + data[4:])
