"""Linear probe: train the task's head alone.

    logits = pool(h) W^T + b        W: (classes, width)

Nothing is edited: the head is trained as with every other method, and the base is only read. It is the
floor of any comparison, and as cheap as training gets: features of the frozen base can be kept from epoch
to epoch. A base whose head is part of its pretraining (a language model) has no head of the task, hence
nothing that a probe could train.
"""

from veneer.edits import Method, Sites, method


@method("linear_probe", paper="", family="selective/head", mergeable=False, rates=(1e-4, 1e-1))
class LinearProbe(Method):
    sites: Sites = ()
