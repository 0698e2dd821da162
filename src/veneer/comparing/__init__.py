"""Comparing: an experiment that says which method to take, and how sure that is.

`compare` runs a fixed design (`Comparison`) through a ledger that survives a kill, opens the test split
once, and publishes intervals, the group of arms that cannot be told from the best, and a report.
`from_results` gives the same statistics and report over scores made elsewhere.
"""

from veneer.comparing.inference.across import Across, across
from veneer.comparing.inference.analysis import Analysis, Scores, analyse
from veneer.comparing.inference.claims import Verdict, decide
from veneer.comparing.inference.selftest import SelfTest, self_test
from veneer.comparing.outside import from_results
from veneer.comparing.planning.arms import CONTROLS, Arm, parse_arm, parse_arms
from veneer.comparing.planning.budget import Budget, parse_budget
from veneer.comparing.planning.design import Comparison
from veneer.comparing.planning.file import FIELDS, read_comparison, write_comparison
from veneer.comparing.planning.forecast import Forecast, forecast, smallest_findable
from veneer.comparing.planning.prepare import Prepared, prepare
from veneer.comparing.results import CompareResult
from veneer.comparing.run import compare, run, run_prepared
from veneer.comparing.running.ledger import Ledger
from veneer.comparing.running.runs import Progress, RunResult
from veneer.comparing.several import Designs, Several, prepare_several, questions, run_several

__all__ = [
    "CONTROLS",
    "FIELDS",
    "Across",
    "Analysis",
    "Arm",
    "Budget",
    "CompareResult",
    "Comparison",
    "Designs",
    "Forecast",
    "Ledger",
    "Prepared",
    "Progress",
    "RunResult",
    "Scores",
    "SelfTest",
    "Several",
    "Verdict",
    "across",
    "analyse",
    "compare",
    "decide",
    "forecast",
    "from_results",
    "parse_arm",
    "parse_arms",
    "parse_budget",
    "prepare",
    "prepare_several",
    "questions",
    "read_comparison",
    "run",
    "run_prepared",
    "run_several",
    "self_test",
    "smallest_findable",
    "write_comparison",
]
