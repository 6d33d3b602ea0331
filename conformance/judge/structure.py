"""What is wrong with an output as a whole: unwritten, stale, touched where it must not be, all zeros, a copy of an input.

Why, and how: docs/rule.md, Structure.
"""

from __future__ import annotations

import torch

from conformance.cases.case import Case
from conformance.judge.outputs import OutputPart, as_matrix, blocks_of, part_of
from conformance.judge.verdict import Finding
from conformance.judge.wording import extent_finding, place_in_words
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import bits, poisoned
from conformance.numerics.bounds import Bounds
from conformance.numerics.ulp import rounded


def structural_findings(case: Case, outcome: Outcome, bounds: dict[str, Bounds]) -> tuple[list[Finding], dict[str, torch.Tensor]]:
    """What is wrong with an output as a whole, and which elements that already explains: a mask by argument, if any."""
    findings: list[Finding] = []
    explained: dict[str, torch.Tensor] = {}
    for name, estimate in bounds.items():
        part = part_of(case, outcome, name, estimate)
        if part.argument.access == "io":
            findings += _changed_rows(case, name, outcome.outputs[name], estimate)
            value = as_matrix(estimate.value)
            before = case.inputs[name] if estimate.rows is None else case.inputs[name][estimate.rows]
            same = (bits(part.raw) == bits(before)).all(-1)
            expected_same = (rounded(value, part.argument.dtype) == before.to(torch.float64)).all(-1)
            mask = (same & ~expected_same).unsqueeze(1).expand_as(value)
            detector, what = "stale_row", "has rows that the call must write and that still hold their old contents"
        else:
            mask = as_matrix(poisoned(part.raw))
            detector, what = "unwritten", "was not written (it still holds what it was filled with before the run)"
        if bool(mask.any()):
            explained[name] = mask
            findings.append(extent_finding(case, part, mask, detector, what))
    return findings, explained


def degenerate_outputs(case: Case, outcome: Outcome, findings: list[Finding], bounds: dict[str, Bounds]) -> list[Finding]:
    """The findings, with those of an output that is all zeros or only repeats an input replaced by one that says so.

    Only where the numbers are wrong: a branch that is rounded to bf16 may cancel its residual exactly.
    """
    for name in dict.fromkeys(finding.argument for finding in findings):
        if name is not None:
            whole = _degenerate(case, part_of(case, outcome, name, bounds[name]), as_matrix(bounds[name].value))
            if whole is not None:
                findings = [finding for finding in findings if finding.argument != name] + [whole]
    return findings


def _changed_rows(case: Case, name: str, found: torch.Tensor, estimate: Bounds) -> list[Finding]:
    before = case.inputs[name]
    rows = (bits(found) != bits(before)).any(-1)
    if estimate.rows is not None:
        rows[estimate.rows] = False
    touched = torch.nonzero(rows).flatten()
    # A NaN that changed its payload on the way through another dtype is still the same NaN.
    same_nan = found[touched].isnan() & before[touched].isnan()
    different = (bits(found)[touched] != bits(before)[touched]) & ~same_nan
    changed = different.any(-1)
    touched, different = touched[changed], different[changed]
    if not len(touched):
        return []
    argument = case.stage.argument(name)
    first, column = int(touched[0]), int(torch.nonzero(different[0])[0])
    where = argument.where((first, column), case.dims)
    return [
        Finding(
            "out_of_bounds",
            f"the kernel changed {len(touched)} of {rows.numel()} rows of {name} that it must not touch, the first at "
            f"{place_in_words(where)}",
            name,
            (first, column),
            where,
            count=len(touched),
            total=int(rows.numel()),
        )
    ]


def _degenerate(case: Case, part: OutputPart, value: torch.Tensor) -> Finding | None:
    """All zeros, or only a copy of an input, where the oracle is neither."""
    name, dtype = part.argument.name, part.argument.dtype
    if not dtype.is_floating_point:
        return None
    if not bool(part.found.any()):
        smallest = 2.0**-126
        if any(bool((value[block].abs() > smallest).any()) for block in blocks_of(value)):
            return Finding(
                "all_zeros",
                f"every element of {name} is zero; the exact result is not",
                name,
                count=value.numel(),
                total=value.numel(),
            )
        return None
    for other in case.stage.arguments:
        if other.access == "in" and as_matrix(case.inputs[other.name]).shape == value.shape and value.numel() > 1:
            source = rounded(as_matrix(case.inputs[other.name].to(torch.float64)), dtype)
            if torch.equal(part.value, source):
                if torch.equal(rounded(value, dtype), source):
                    return None
                same = "" if other.dtype == dtype else ", rounded to its dtype"
                message = f"{name} equals the input {other.name} in every element{same}; the exact result does not"
                return Finding("echo", message, name, count=value.numel(), total=value.numel())
    return None
