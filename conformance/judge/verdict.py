"""What a judgement says: findings, and how much of its allowance a correct run used."""

from __future__ import annotations

import dataclasses
from typing import Any

from conformance.outside import Fields

#: Every detector's id, in the order in which findings of equal weight are told: the cause before its consequences.
DETECTORS: dict[str, str] = {
    "crashed": "the kernel's process died (signal, exit or memory limit), or the card reported an exception",
    "timed_out": "the kernel did not end within its time limit",
    "raised": "the kernel, its build or its compilation raised an error",
    "changed_input": "an input was modified",
    "out_of_bounds": "something was written where the contract does not allow it",
    "unwritten_read": "an output depends on uninitialised memory",
    "unwritten": "an output element was never written",
    "all_zeros": "an output is all zeros, the exact result is not",
    "echo": "an output is a copy of an input",
    "stale_row": "a cache row that had to be written holds its old contents",
    "not_finite": "an output is NaN or infinite where the exact result is finite",
    "element": "an element is outside the interval of values that a correct kernel can return",
    "signature": "a matched filter finds a known mistake in the errors of a case",
    "pooled_signature": "a matched filter finds a known mistake in the errors of all cases together",
    "spread": "the RMS of the errors is larger than legal rounding explains, in a row, a tile or the whole",
    "bias": "errors have a mean that legal rounding does not explain: truncation, or a factor slightly off",
    "nondeterministic": "two runs on the same inputs differ",
    "compiler_pass": "a compiler pass changed the result",
    "capability": "a capability that the kernel declares does not hold",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one run.

    ``index`` and ``where`` are the worst element or the first of an area, without the coordinates that the area is all of.
    ``share`` is the worst error as a multiple of what is allowed (above 1 is wrong; infinite where no error is allowed);
    ``ulps`` is the worst error in units in the last place of the argument's dtype, where they say something; ``count`` of
    ``total`` elements are affected.
    """

    detector: str
    message: str
    argument: str | None = None
    index: tuple[int, ...] | None = None
    where: dict[str, int] = dataclasses.field(default_factory=dict)
    share: float | None = None
    ulps: float | None = None
    count: int | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f"unknown detector {self.detector[:40]!r}; known are {', '.join(DETECTORS)}")

    @property
    def magnitude(self) -> float:
        """How bad, for sorting: the share of the allowance, or infinity for a finding that no allowance covers."""
        return float("inf") if self.share is None else self.share

    def to_json(self) -> dict[str, Any]:
        """A JSON object without empty fields."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {}, ())}
        return {name: _finite(value) for name, value in fields.items()}

    @classmethod
    def from_json(cls, data: object) -> Finding:
        """The inverse of ``to_json``, but for characters that nobody should be shown; fields of a newer version are ignored.

        Raises ``ValueError`` for anything else than a finding.
        """
        fields = Fields(data, "a finding")
        return cls(
            fields.text("detector"),
            fields.text("message"),
            fields.optional_text("argument"),
            fields.counts("index"),
            fields.named_counts("where"),
            fields.measure("share"),
            fields.measure("ulps"),
            fields.count("count"),
            fields.count("total"),
        )


def _finite(value: Any) -> Any:
    # JSON has no infinity; "inf" and "nan" survive a round trip through float().
    if isinstance(value, float) and value - value != 0.0:
        return str(value)
    return value


@dataclasses.dataclass(frozen=True)
class FilterResponse:
    """What the matched filter of a known mistake makes of a run's errors, in standard deviations of correct runs (a z-score), and
    what it is expected to make of those of a kernel that makes the mistake."""

    sigmas: float
    expected: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judgement of one run. ``share`` is the worst share of the allowance that any element of any output used."""

    findings: tuple[Finding, ...] = ()
    share: float | None = None
    #: The profile of legal roundings that explains the run best.
    profile: str | None = None
    #: The worst share of the allowance by argument.
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    #: Of the matched filter of each known mistake, where a composite stage's errors were searched for them.
    responses: dict[str, FilterResponse] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def worst_first(findings: list[Finding]) -> tuple[Finding, ...]:
    """Findings ordered by what explains most: detectors in the order of ``DETECTORS``, then by magnitude."""
    order = {name: position for position, name in enumerate(DETECTORS)}
    return tuple(sorted(findings, key=lambda finding: (order[finding.detector], -finding.magnitude)))
