"""Bases: models of any origin, opened by what a person types, and quantised forms of them.

Public: `open_base`, `Base`, `fingerprint`, `builtin_bases`, and in `veneer.bases.quantised` and
`veneer.bases.matmul` how its weights are kept, and how they multiply.
"""

from veneer.bases._base import Base, fingerprint
from veneer.bases._builtin import BUILTINS
from veneer.bases._open import HEADS, open_base


def builtin_bases() -> dict[str, str]:
    """{name: what it is} of the bases that `builtin:NAME` opens."""
    return {name: row.about for name, row in BUILTINS.items()}


__all__ = ["HEADS", "Base", "builtin_bases", "fingerprint", "open_base"]
