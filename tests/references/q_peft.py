"""Q-PEFT: soft tokens that depend on a query and a document, for reranking. Peng et al., 2024,
arXiv:2404.04522.

    A    S = MultiheadAttention(E_q, E_D, E_D)                 one soft token for each query token
    R    c_j = max over query tokens of cos(E_D_j, E_q);  the k document tokens of largest c, in text order
         (of equal ones the first);  S = e + up relu(down e + down_bias) + up_bias, e the chosen embedding
    row  [S ; instruction ; document ; query]                  real tokens only, then padded
    score = mean over the query's tokens of log p(token | all before it); loss = - mean of the rows' scores

E_q and E_D are rows of the frozen embedding table. tensors, A: query, key, value, output (d, d) with
query_bias, key_bias, value_bias, output_bias (d,); scores are divided by sqrt(d / heads). R: down (m, d),
down_bias, up (d, m), up_bias. inputs: query_states (rows, Tq, d), query_mask, document_states (rows, Td, d),
document_mask, instruction (Ti, d), padded on the side of option padding; logits (rows, longest, vocabulary)
and query_ids (rows, Tq).

output: the padded layout (rows, longest, d), 0 at pads, with mask (rows, longest) bool and labels (rows,
longest), the id at the query's positions and -100 elsewhere. soft: S, "score" (rows,) from the logits and
"loss". The key bias of A has no gradient: it shifts all scores of a query alike.
"""

import math

import torch

from ._cases import Case, Draw, changed, mask_of, output_gradients
from ._loops import add, bottleneck, dot, linear, listed, norm, softmax, tensor

HEAD_TENSORS = ("query", "key", "value", "output")


def cases() -> list[Case]:
    found = []
    for seed, (form, heads, padding, chosen) in enumerate(
        [("A", 2, "right", None), ("A", 1, "left", None), ("R", None, "right", 2), ("R", None, "left", 3)]
    ):
        draw = Draw(1900 + seed)
        width, m, vocabulary, queries, documents, told = 4, 3, 5, (3, 2), (4, 3), 2
        tensors = {}
        if form == "A":
            for name in HEAD_TENSORS:
                tensors |= {name: draw(width, width), f"{name}_bias": draw(width)}
        else:
            tensors = {
                "down": draw(m, width),
                "down_bias": draw(m),
                "up": draw(width, m),
                "up_bias": draw(width),
            }
        soft = [chosen] * 2 if form == "R" else queries
        longest = max(s + told + d + q for s, d, q in zip(soft, documents, queries))
        found.append(
            {
                "name": f"{form}, padding {padding}, {heads or chosen}",
                "options": {"form": form, "heads": heads, "chosen": chosen, "padding": padding},
                "base": {},
                "tensors": tensors,
                "trained": tuple(tensors),
                "null_gradient": ("key_bias",),
                "inputs": {
                    "query_states": draw(2, max(queries), width),
                    "query_mask": mask_of(queries, max(queries), padding),
                    "document_states": draw(2, max(documents), width),
                    "document_mask": mask_of(documents, max(documents), padding),
                    "instruction": draw(told, width),
                    "logits": draw(2, longest, vocabulary),
                    "query_ids": torch.tensor([[1, 4, 2], [0, 3, 1]]),
                },
                "cotangent": draw(2, longest, width),
            }
        )
    return found


def attention_tokens(t: dict, queries, documents, heads: int):
    """One row's S, for real tokens: (Tq, d)"""
    q = [linear(state, t["query"], t["query_bias"]) for state in queries]
    k = [linear(state, t["key"], t["key_bias"]) for state in documents]
    v = [linear(state, t["value"], t["value_bias"]) for state in documents]
    size = len(q[0]) // heads
    soft = []
    for now in q:
        joined = []
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            weights = softmax([dot(now[cut], key[cut]) / math.sqrt(size) for key in k])
            joined += [sum(w * value[cut][c] for w, value in zip(weights, v)) for c in range(size)]
        soft.append(linear(joined, t["output"], t["output_bias"]))
    return soft


def chosen_tokens(queries, documents, count: int, in_text_order: bool = True) -> list[int]:
    """Indices of the document tokens nearest to the query."""
    nearest = [max(dot(d, q) / (norm(d) * norm(q)) for q in queries) for d in documents]
    best = sorted(range(len(documents)), key=lambda j: (-nearest[j], j))[:count]
    return sorted(best) if in_text_order else best


def reference(case: Case, order: str = "sidq", pads_too: bool = False, in_text_order: bool = True) -> dict:
    """order: the layout, by initials (soft, instruction, document, query)."""
    options = case["options"]
    t = {name: listed(value) for name, value in case["tensors"].items()}
    inputs = {name: listed(value) for name, value in case["inputs"].items()}
    rows, softs = [], []
    for row in range(len(inputs["query_states"])):
        queries = [s for s, m in zip(inputs["query_states"][row], inputs["query_mask"][row]) if m]
        ids = [i for i, m in zip(inputs["query_ids"][row], inputs["query_mask"][row]) if m]
        documents = [s for s, m in zip(inputs["document_states"][row], inputs["document_mask"][row]) if m]
        looked_at = inputs["document_states"][row] if pads_too else documents
        if options["form"] == "A":
            soft = attention_tokens(t, queries, looked_at, options["heads"])
        else:
            picked = chosen_tokens(queries, looked_at, options["chosen"], in_text_order)
            nets = [t[name] for name in ("down", "down_bias", "up", "up_bias")]
            soft = [add(looked_at[j], bottleneck(looked_at[j], *nets, "relu")) for j in picked]
        none = [-100]
        pieces = {
            "s": (soft, none * len(soft)),
            "i": (inputs["instruction"], none * len(inputs["instruction"])),
            "d": (documents, none * len(documents)),
            "q": (queries, ids),
        }
        rows.append(
            (
                [state for piece in order for state in pieces[piece][0]],
                [label for piece in order for label in pieces[piece][1]],
            )
        )
        softs.append(soft)
    return _padded(case, rows, softs)


def _padded(case: Case, rows, softs) -> dict:
    longest = max(len(states) for states, _ in rows)
    width = case["inputs"]["instruction"].shape[1]
    found = {"output": [], "mask": [], "labels": [], "score": []}
    for (states, labels), logits in zip(rows, listed(case["inputs"]["logits"])):
        pads = longest - len(states)
        left = pads if case["options"]["padding"] == "left" else 0
        right = pads - left
        found["output"].append([[0.0] * width] * left + states + [[0.0] * width] * right)
        found["mask"].append([False] * left + [True] * len(states) + [False] * right)
        labels = [-100] * left + labels + [-100] * right
        found["labels"].append(labels)
        told = [math.log(softmax(logits[p - 1])[label]) for p, label in enumerate(labels) if label != -100]
        found["score"].append(sum(told) / len(told))
    return {
        "output": tensor(found["output"]),
        "mask": torch.tensor(found["mask"]),
        "labels": torch.tensor(found["labels"]),
        "score": tensor(found["score"]),
        "loss": tensor(-sum(found["score"]) / len(rows)),
        "soft": tensor([state for soft in softs for state in soft]),
    }


def gradients(case: Case) -> dict:
    return output_gradients(reference, case, ("query_states", "document_states", "instruction"))


MUTATIONS = [
    ("pads of the document are looked at", lambda case: reference(case, pads_too=True)),
    ("the document before the instruction", lambda case: reference(case, order="sdiq")),
    ("the soft tokens next to the query", lambda case: reference(case, order="idsq")),
    ("chosen tokens by similarity, not in text order", lambda case: reference(case, in_text_order=False)),
    (
        "one head for two",
        lambda case: reference(changed(case, "options", heads=1 if case["options"]["heads"] else None)),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
