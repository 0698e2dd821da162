"""The laws: what every method promises, as checks that anybody can run on a method of their own.

    veneer.testing.check_method(MyMethod).check()

runs the fourteen laws on tiny bases and raises where one is broken.
"""

from . import bases
from ._capabilities import Capabilities, capabilities
from ._check import check_method, run
from ._law import LAWS, MANDATORY, Broken, DoesNotApply, Law, NotClaimed, law, mandatory
from ._report import LawReport, LawRow, to_json
from ._subject import Subject, randomise
from .bases import TinyBase
from .laws.equation import Trial, place_as_layer

__all__ = [
    "LAWS", "MANDATORY", "Broken", "Capabilities", "DoesNotApply", "Law", "LawReport", "LawRow", "NotClaimed",
    "Subject", "TinyBase", "Trial", "bases", "capabilities", "check_method", "law", "mandatory",
    "place_as_layer", "randomise", "run", "to_json",
]  # fmt: skip
