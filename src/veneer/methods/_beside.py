"""What low-rank methods can train beside their update: biases of the base, and rows of its table of tokens. No method.

A method that has the options `bias` and `trainable_tokens` hands itself to the functions below.
"""

from typing import Any

from veneer.edits import Method, Site, Specs, TrainedCopy, trained_tokens, zeros

BIASES = ("none", "all", "lora_only")
WITH_BIAS = ("linear", "conv1d", "conv")  # kinds of site whose output a bias shifts


def parts(method: Any) -> tuple[Method, ...]:
    """For `also`: all biases of the base, and rows of tokens, as far as the options ask for them."""
    biases = (TrainedCopy(sites="bias"),) if method.bias == "all" else ()
    return (*biases, *trained_tokens(method.trainable_tokens))


def own_bias(method: Any, site: Site) -> Specs:
    """For `tensors`: the change of the base's own bias at an edited site, (out,), where bias="lora_only"."""
    if method.bias == "lora_only" and site.bias and site.kind in WITH_BIAS:
        return {"base_bias": zeros(site.n_out, decay=False)}
    return {}
