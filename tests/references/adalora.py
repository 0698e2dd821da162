"""AdaLoRA: W' = W + (alpha / (rank + 1e-5)) B diag(E) A, with triplets dropped on the way. Zhang et al.,
2023, arXiv:2303.10512 (there P Lambda Q). The 1e-5 is in the authors' code.

Layer cases (options kind = "layer"): base W (out, in), bias or None; tensors A (rank, in), B (out, rank), E
(rank,); options rank (the initial one; it stays in the scale while triplets are dropped), alpha,
orthogonality. The penalty is orthogonality * mean over all A and B of |A A^T - I| and |B^T B - I| (Frobenius
norms, not squared).

Schedule cases (kind = "schedule"): "sites": [{A, B, E}, ...] and per step "gradient_steps": [[{A, B, E},
...], ...], one gradient for each site. For step t = 1, 2, ...: p <- p - rate * gradient (plain SGD stands for
the optimiser), then the update:

    budget   b(t) = all ranks b0 for t <= tinit; then with left = 1 - (t - tinit) / (total - tfinal - tinit)
             int((b0 - b1) left^3 + b1), b1 = target_rank * sites; masking where t is a multiple of delta_t.
             At t = total - tfinal the last mask is made, from the scores so far; after that it is applied
             again at each step
    scores   (while t < total - tfinal)      i = |p gradient|
             I <- beta1 I + (1 - beta1) i    U <- beta2 U + (1 - beta2) |i - I|
             entry: I U;  triplet k: entry(E_k) + mean_j entry(A_kj) + mean_j entry(B_jk)
    mask     threshold = the (b0 - b)-th smallest triplet score of all sites; E_k = 0 where score <= threshold

`reference` gives for each step: E (steps, sites, rank), budget (steps,), kept (steps, sites, rank) of the
mask in force, and the final A and B of every site as "A0", "B0", "A1", ...
"""

from ._cases import Case, Draw, changed, output_gradients, penalty_gradients
from ._loops import add, combine, every_token, frobenius, identity, linear, listed, matmul, tensor, transpose


def cases() -> list[Case]:
    return _layer_cases() + _schedule_cases()


def _layer_cases() -> list[Case]:
    found = []
    for seed, (name, n_in, n_out, rank, alpha, bias) in enumerate(
        [("wide, bias", 5, 3, 2, 8.0, True), ("tall, no bias", 3, 4, 3, 2.0, False)]
    ):
        draw = Draw(800 + seed)
        found.append(
            {
                "name": name,
                "options": {"kind": "layer", "rank": rank, "alpha": alpha, "orthogonality": 0.5},
                "base": {"W": draw(n_out, n_in), "bias": draw(n_out) if bias else None},
                "tensors": {"A": draw(rank, n_in), "B": draw(n_out, rank), "E": draw(rank)},
                "trained": ("A", "B", "E"),
                "inputs": {"x": draw(2, 3, n_in)},
                "cotangent": draw(2, 3, n_out),
            }
        )
    return found


def _schedule_cases() -> list[Case]:
    found = []
    for seed, (rank, target, tinit, tfinal, delta_t, total, shapes) in enumerate(
        [
            (3, 1, 1, 2, 1, 8, [(4, 3), (3, 5)]),
            (4, 2, 2, 3, 2, 12, [(3, 4), (5, 3), (2, 3)]),
        ]
    ):
        draw = Draw(820 + seed)

        def triplet(shape, rank=rank, draw=draw):
            n_out, n_in = shape
            return {"A": draw(rank, n_in), "B": draw(n_out, rank), "E": draw(rank)}

        found.append(
            {
                "name": f"rank {rank} to {target} in {total} steps over {len(shapes)} sites",
                "options": {
                    "kind": "schedule",
                    "rank": rank,
                    "target_rank": target,
                    "tinit": tinit,
                    "tfinal": tfinal,
                    "delta_t": delta_t,
                    "total_steps": total,
                    "beta1": 0.85,
                    "beta2": 0.8,
                    "rate": 0.05,
                },
                "sites": [triplet(shape) for shape in shapes],
                "gradient_steps": [[triplet(shape) for shape in shapes] for _ in range(total)],
            }
        )
    return found


def budget(options: dict, sites: int, t: int) -> tuple[int, bool]:
    """(triplets to keep at step t, whether step t masks)"""
    first, last = options["rank"] * sites, options["target_rank"] * sites
    start, end = options["tinit"], options["total_steps"] - options["tfinal"]
    if t <= start:
        return first, False
    if t > end:
        return last, True
    left = 1 - (t - start) / (end - start)
    return int((first - last) * left**3 + last), t % options["delta_t"] == 0 or t == end


def triplet_scores(importance: dict, uncertainty: dict) -> list[float]:
    score = {
        name: [[i * u for i, u in zip(p, q)] for p, q in zip(importance[name], uncertainty[name])]
        for name in importance
    }
    rank = len(score["E"])
    n_out, n_in = len(score["B"]), len(score["A"][0])
    return [
        score["E"][k][0] + sum(score["A"][k]) / n_in + sum(score["B"][j][k] for j in range(n_out)) / n_out
        for k in range(rank)
    ]


def _trajectory(case: Case, score=triplet_scores, gradient_first: bool = True) -> dict:
    options = case["options"]

    def matrices(site):  # E as a column, so that all three are matrices
        return {"A": listed(site["A"]), "B": listed(site["B"]), "E": [[e] for e in listed(site["E"])]}

    def like(site):
        return {name: [[0.0] * len(row) for row in matrix] for name, matrix in site.items()}

    sites = [matrices(site) for site in case["sites"]]
    importance, uncertainty = [like(site) for site in sites], [like(site) for site in sites]
    kept = [[1.0] * options["rank"] for _ in sites]
    end = options["total_steps"] - options["tfinal"]
    history = {"E": [], "budget": [], "kept": []}
    for t, step in enumerate(case["gradient_steps"], start=1):
        slopes = [matrices(site) for site in step]
        before = sites
        sites = [
            {name: combine(1.0, site[name], -options["rate"], slope[name]) for name in site}
            for site, slope in zip(sites, slopes)
        ]
        if t < end:
            for site, slope, I, U in zip(
                sites if gradient_first else before, slopes, importance, uncertainty
            ):
                for name in site:
                    for i, row in enumerate(site[name]):
                        for j, p in enumerate(row):
                            now = abs(p * slope[name][i][j])
                            b1, b2 = options["beta1"], options["beta2"]
                            I[name][i][j] = b1 * I[name][i][j] + (1 - b1) * now
                            U[name][i][j] = b2 * U[name][i][j] + (1 - b2) * abs(now - I[name][i][j])
        keep, masks = budget(options, len(sites), t)
        drop = options["rank"] * len(sites) - keep
        if masks and t <= end and drop > 0:
            scores = [score(I, U) for I, U in zip(importance, uncertainty)]
            threshold = sorted(value for one in scores for value in one)[drop - 1]
            kept = [[0.0 if value <= threshold else 1.0 for value in one] for one in scores]
        if masks:
            for site, live in zip(sites, kept):
                site["E"] = [[e * flag for e in row] for row, flag in zip(site["E"], live)]
        history["budget"].append(float(keep))
        history["kept"].append([list(live) for live in kept])
        history["E"].append([[row[0] for row in site["E"]] for site in sites])
    found = {name: tensor(values) for name, values in history.items()}
    for i, site in enumerate(sites):
        found |= {f"A{i}": tensor(site["A"]), f"B{i}": tensor(site["B"])}
    return found


def _layer(case: Case, squared: bool = False) -> dict:
    W, bias = listed(case["base"]["W"]), listed(case["base"]["bias"])
    A, B, E = (listed(case["tensors"][name]) for name in "ABE")
    options = case["options"]
    factor = options["alpha"] / (options["rank"] + 1e-5)
    delta = [
        [factor * sum(B[o][k] * E[k] * A[k][i] for k in range(len(E))) for i in range(len(W[0]))]
        for o in range(len(W))
    ]
    output = every_token(
        lambda token: add(linear(token, W, bias), linear(token, delta)), listed(case["inputs"]["x"])
    )
    one = identity(len(E))
    gaps = [
        frobenius(combine(1.0, matmul(A, transpose(A)), -1.0, one)),
        frobenius(combine(1.0, matmul(transpose(B), B), -1.0, one)),
    ]
    gaps = [gap * gap for gap in gaps] if squared else gaps
    return {
        "output": tensor(output),
        "delta": tensor(delta),
        "penalty": tensor(options["orthogonality"] * sum(gaps) / len(gaps)),
    }


def reference(case: Case) -> dict:
    return _layer(case) if case["options"]["kind"] == "layer" else _trajectory(case)


def gradients(case: Case) -> dict:
    if case["options"]["kind"] == "schedule":
        return {}
    return {**output_gradients(_layer, case), **penalty_gradients(_layer, case, ("A", "B"))}


def _lora_scale(case: Case) -> dict:
    if case["options"]["kind"] == "schedule":
        return reference(case)
    return _layer(changed(case, "options", alpha=case["options"]["alpha"] * (case["options"]["rank"] + 1e-5)))


def _sums_for_means(importance: dict, uncertainty: dict) -> list[float]:
    score = {
        name: [[i * u for i, u in zip(p, q)] for p, q in zip(importance[name], uncertainty[name])]
        for name in importance
    }
    columns = transpose(score["B"])
    return [score["E"][k][0] + sum(score["A"][k]) + sum(columns[k]) for k in range(len(columns))]


def _importance_alone(importance: dict, uncertainty: dict) -> list[float]:
    ones = {name: [[1.0] * len(row) for row in matrix] for name, matrix in uncertainty.items()}
    return triplet_scores(importance, ones)


def _trajectory_with(**options):
    return lambda case: (
        reference(case) if case["options"]["kind"] == "layer" else _trajectory(case, **options)
    )


MUTATIONS = [
    ("alpha is not divided", _lora_scale),
    (
        "the penalty is squared",
        lambda case: _layer(case, squared=True) if case["options"]["kind"] == "layer" else reference(case),
    ),
    ("scores are summed, not averaged", _trajectory_with(score=_sums_for_means)),
    ("uncertainty is left out", _trajectory_with(score=_importance_alone)),
    (
        "importance of the parameters before the step",
        _trajectory_with(gradient_first=False),
    ),
    (
        "masking at every step",
        lambda case: reference(changed(case, "options", delta_t=1)),
    ),
]


def mutated(case: Case, name: str) -> dict:
    return dict(MUTATIONS)[name](case)
