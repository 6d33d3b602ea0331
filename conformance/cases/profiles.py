"""How many cases, and how they are drawn: the Hypothesis profiles of the suites.

They are values, not Hypothesis's registered profiles: loading one would change the settings of a user's own tests as well.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from conformance.contract.stage import Stage
from conformance.errors import UsageError

#: Where failing cases are kept from night to night, below the folder that pytest was started in.
DATABASE = Path(".hypothesis") / "conformance"


@dataclasses.dataclass(frozen=True)
class SuiteProfile:
    """``share`` of a stage's examples go round its regimes, every one at least once, and ``drawn`` more come after them.

    At night Hypothesis draws those. Where all is to be ``deterministic`` they go on round the regimes: what Hypothesis draws also
    depends on the modules that are loaded, whose constants it tries, and is not the same in another process.
    """

    name: str
    share: float
    drawn: int
    deterministic: bool
    shrink: bool

    def stratified(self, stage: Stage) -> int:
        """How many cases go round the regimes of a stage."""
        return max(len(stage.regimes), math.ceil(self.share * stage.examples))

    def given(self, stage: Stage) -> int:
        """How many cases are the same every time."""
        return self.stratified(stage) + (self.drawn if self.deterministic else 0)

    def settings(self, subject: str) -> Any:
        """The Hypothesis settings of a profile that is not deterministic; no deadline, since a compile takes as long as it takes.

        What failed is kept for each subject by itself: in one database a kernel that passes would clear another's failures.
        """
        import hypothesis
        from hypothesis.database import DirectoryBasedExampleDatabase

        phases = [hypothesis.Phase.reuse, hypothesis.Phase.generate]
        if self.shrink:
            phases.append(hypothesis.Phase.shrink)
        return hypothesis.settings(
            max_examples=self.drawn,
            database=DirectoryBasedExampleDatabase(DATABASE / subject),
            deadline=None,
            phases=tuple(phases),
            suppress_health_check=tuple(hypothesis.HealthCheck),
            print_blob=True,
            report_multiple_bugs=True,
        )


PROFILES: dict[str, SuiteProfile] = {
    # One case of each regime and two more, again and again the same while a kernel is being written.
    "dev": SuiteProfile("dev", share=0, drawn=2, deterministic=True, shrink=False),
    # The same cases on every machine and in every process. A fifth of the examples that show the
    # least visible fault with 99.9% shows it with 1 - 0.001 ** (1 / 5) = 75%; most faults are seen at the first case.
    "ci": SuiteProfile("ci", share=1 / 5, drawn=2, deterministic=True, shrink=False),
    # All of them, and new cases every night, kept in Hypothesis's database when they fail, and shrunk.
    "nightly": SuiteProfile("nightly", share=1, drawn=60, deterministic=False, shrink=True),
}


def profile_named(name: str) -> SuiteProfile:
    """The profile of that name; raises ``UsageError`` that lists the known ones."""
    if name not in PROFILES:
        raise UsageError(f"unknown profile {name!r}; known are {', '.join(PROFILES)}")
    return PROFILES[name]
