"""How long `import veneer` takes beyond torch, in fresh processes, and what its first use adds."""

from __future__ import annotations

import subprocess
import sys

from ._report import Expectation, Row
from ._size import Size

BUDGET = 0.3
WORK = {
    "import veneer": "import veneer",
    "and its engine, methods and bases": "import veneer; veneer.attach; veneer.methods(); veneer.open_base",
}
CHILD = "import time, torch\nbegan = time.process_time()\n{work}\nprint(time.process_time() - began)"


def imports(size: Size) -> list[Row]:
    rows = []
    for words, work in WORK.items():
        spent = [_seconds(work) for _ in range(size.repeats)]
        expected = Expectation.at_most(1.0) if words == "import veneer" else None
        rows.append(Row.of("import", f"{words}, beyond torch", spent, [BUDGET] * len(spent),
                           reference=f"{BUDGET} s", expected=size.expects(expected)))  # fmt: skip
    return rows


def _seconds(work: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(work=work)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])
