"""P-tuning: rows before the text that a small network makes. Liu et al., 2021, arXiv:2103.10385.

    [p_1, ..., p_length ; e(x)]        p = net(E)        E: (length, width)

    mlp     net(E) = L3 relu(L2 relu(L1 E))                 L1: width -> hidden, L2: hidden, L3: hidden -> width
    lstm    net(E) = L2 relu(L1 BiLSTM(E))                  two layers, `hidden` numbers a direction
    none    net(E) = E                                      what is left once trained

The network ties the rows together while they train, which the paper found to be easier than training them one
by one; at the end its output is all that counts, length x width numbers. Whatever the rows are, attention reads
them: the model does not begin as its base. The rows stand before the first real token, masks and positions
follow, and outputs keep the length of the text, as in `prompt_tuning`.

The paper uses the LSTM and puts the rows at slots of a template; here, as in HF PEFT, they stand in front, and
the MLP is the default. HF PEFT's folders hold the rows alone, and are read as `encoder="none"`: there training
goes on without the network. Its MLP has three layers whatever `encoder_num_layers` says.
"""

import torch
from torch import Tensor

from veneer.edits import (
    At,
    Site,
    Sites,
    Specs,
    Tensors,
    TokensMethod,
    dropout,
    hyper,
    kaiming,
    method,
    normal,
    uniform,
)

DIRECTIONS = ("", "_back")


@method(
    "p_tuning",
    paper="arXiv:2103.10385",
    family="additive/prompt",
    starts_as_identity=False,
    reason="a prompt of any value is read by attention",
    rates=(1e-4, 1e-2),
)
class PTuning(TokensMethod):
    length: int = hyper(20, "rows that are added", at_least=1, alias="num_virtual_tokens", size=True)
    encoder: str = hyper(
        "mlp",
        "the network behind the rows",
        choices=("mlp", "lstm", "none"),
        alias="encoder_reparameterization_type",
    )
    hidden: int = hyper(
        0, "width inside the network; 0 is the base's width", at_least=0, alias="encoder_hidden_size"
    )
    layers: int = hyper(2, "layers of the LSTM", at_least=1, alias="encoder_num_layers")
    dropout: float = hyper(0.0, "share of the rows that is dropped in training", at_least=0, at_most=1)
    sites: Sites = "embedding"

    def tensors(self, site: Site) -> Specs:
        d = site.width
        h = self.hidden or d
        if self.encoder == "none":
            return {"prompt": normal(0.02, self.length, d, decay=False)}
        specs = {"E": normal(1.0, self.length, d, decay=False)}
        if self.encoder == "mlp":
            shapes = {"L1": (h, d), "L2": (h, h), "L3": (d, h)}
        else:
            for layer in range(self.layers):
                specs |= self._lstm(h, d if layer == 0 else 2 * h, layer)
            shapes = {"L1": (2 * h, 2 * h), "L2": (d, 2 * h)}
        for name, (out, into) in shapes.items():
            specs |= {name: kaiming(out, into), name + "_bias": uniform(into**-0.5, out, decay=False)}
        return specs

    def _lstm(self, h: int, into: int, layer: int) -> Specs:
        """One layer, both directions; the four gates input, forget, cell, output are rows of each matrix."""
        specs: Specs = {}
        for end in DIRECTIONS:
            specs |= {
                f"W{layer}{end}": uniform(h**-0.5, 4 * h, into),
                f"V{layer}{end}": uniform(h**-0.5, 4 * h, h),
                f"W{layer}{end}_bias": uniform(h**-0.5, 4 * h, decay=False),
                f"V{layer}{end}_bias": uniform(h**-0.5, 4 * h, decay=False),
            }
        return specs

    def derive(self, t: Tensors) -> dict[str, Tensor]:
        """The rows that the network makes: prompt, (length, width)."""
        if self.encoder == "none":
            return {}
        z = t.E if self.encoder == "mlp" else self.recurrent(t)
        z = torch.relu(z @ t.L1.mT + t.L1_bias) @ t.L2.mT + t.L2_bias
        if self.encoder == "mlp":
            z = torch.relu(z) @ t.L3.mT + t.L3_bias
        return {"prompt": z}

    def recurrent(self, t: Tensors) -> Tensor:
        """BiLSTM(E): (length, width) -> (length, 2 hidden)"""
        flat = [
            getattr(t, f"{name}{layer}{end}{bias}")
            for layer in range(self.layers)
            for end in DIRECTIONS
            for bias in ("", "_bias")
            for name in "WV"
        ]
        start = t.E.new_zeros(2 * self.layers, 1, t.V0.shape[-1])
        rows = t.E[:, None]  # one sequence, time first
        return torch.lstm(rows, (start, start), flat, True, self.layers, 0.0, False, True, False)[0][:, 0]

    def tokens(self, t: Tensors, at: At) -> Tensor:
        """-> (length, width)"""
        return dropout(t.prompt, self.dropout, at)
