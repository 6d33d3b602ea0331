"""What would explain a finding: roundings that a kernel makes and could declare (docs/rule.md, Declared precision)."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conformance.cases.case import Case
from conformance.contract.stage import Stage
from conformance.judge import limits
from conformance.judge.judgement import judge
from conformance.judge.oracle import Oracle
from conformance.judge.verdict import Verdict
from conformance.lanes.base import Outcome

#: Detectors of errors that roundings can explain.
_OF_ROUNDINGS = frozenset({"element", "spread", "bias", "signature"})
#: How many failing runs of a kernel are searched for an explanation of what is wrong with one output.
MOST_SEARCHES = 3


class Explainer:
    """Says of a kernel's failing runs which roundings, if they were declared, would make them pass.

    ``declared`` is what the kernel declares already (``Kernel.judged_by``). Most runs cost one more judgement: with everything
    declared that can be. Only where that passes are one name or two looked for.
    """

    def __init__(self, declared: Mapping[str, Any]) -> None:
        self._declared = declared
        self._known: dict[str | None, tuple[str, ...]] = {}
        self._searches: collections.Counter[str | None] = collections.Counter()

    def explained(self, case: Case, outcome: Outcome, verdict: Verdict, oracle: Oracle) -> Verdict:
        """The verdict; if roundings would explain all of its findings, their messages end with how these are declared."""
        findings = verdict.findings
        if not findings or not _OF_ROUNDINGS.issuperset(finding.detector for finding in findings):
            return verdict
        if sum(tensor.numel() for tensor in case.inputs.values()) > limits.MOST_INPUTS:
            return verdict  # a judgement of a real layer takes too long

        def passes(names: Sequence[str]) -> bool:
            declared = {**self._declared, "rounds": (*self._declared["rounds"], *names)}
            return judge(case, outcome, oracle=oracle, **declared).ok

        place = findings[0].argument
        names = self._known.get(place, ())
        if not names or not passes(names):
            names = self._search(place, [name for name in case.stage.declarable if name not in self._declared["rounds"]], passes)
        if not names:
            return verdict
        self._known[place] = names
        told = _in_words(case.stage, names, self._declared["rounds"])
        with_it = tuple(dataclasses.replace(finding, message=f"{finding.message}; {told}") for finding in findings)
        return dataclasses.replace(verdict, findings=with_it)

    def _search(self, place: str | None, names: Sequence[str], passes: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
        """The fewest of the names that explain a run: one, two or all of them; none if nothing does."""
        self._searches[place] += 1
        # What all of them do not explain together some of them do not either.
        if not names or self._searches[place] > MOST_SEARCHES or not passes(names):
            return ()
        fewer = (some for count in (1, 2) for some in itertools.combinations(names, count) if count < len(names))
        return next((some for some in fewer if passes(some)), tuple(names))


def _in_words(stage: Stage, names: tuple[str, ...], declared: Sequence[str]) -> str:
    policy = next((policy for policy, covered in stage.policies.items() if set(names) <= set(covered)), None)
    if len(names) > 2 and policy is not None:
        return f"every error is explained by what {policy} rounds; if that is meant, declare precision={policy!r}"
    what = " and ".join(names)
    return f"every error is explained by {what} rounded to bf16; if that is meant, declare rounds={(*declared, *names)!r}"
