"""Independent float64 references of the papers' equations, one file a method.

Each is written from the paper's equation with Python loops over entries, heads, tokens and blocks. They
import neither veneer nor any other library of methods, and avoid the fast form on purpose: they are
witnesses.

A method's file has four names:

    cases()              list of dicts: "name", "options", "base" (W, bias: frozen), "tensors" (what the
                         adapter holds, named as in the equation), "trained" (which of those are trained),
                         "inputs" (x, mask, ...), "cotangent" (the shape of the output)
    reference(case)      {"output": ..., where there is one "delta", "penalty", ...}, float64 tensors
    gradients(case)      {tensor name or "x": d sum(output * cotangent) / d that tensor}, and the gradients
                         of the penalty as "penalty.NAME"
    mutated(case, name)  what `reference` gives (or "gradient.NAME" entries) under a seeded mistake, one of
                         MUTATIONS

A case is data; a method under test is given its tensors, never the other way round. Tensors are float64, the
base bias is None where there is none, and x is (rows, tokens, width) unless the file says otherwise. Files of
methods that are procedures (a score, a schedule, an update rule) name their extra functions in their own
docstring. `counts.py` lists published numbers of trained parameters.
"""
