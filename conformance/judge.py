"""The judgement of one run: is every output within what a correct kernel can return, and if not, where.

The tests and constants are those of the numerics document, and signatures of known mistakes inside layers besides; each
constant's reason stands beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from conformance import bounds as error_bounds
from conformance.arithmetic import CONTRACT
from conformance.bounds import Bounds, Profile
from conformance.buffers import bits, poisoned
from conformance.cases import Case
from conformance.contract import Argument
from conformance.errors import UnavailableError, UsageError
from conformance.executors.base import Outcome
from conformance.sensitivity import Sensitivity, chi_square_mean
from conformance.signatures import Filter, filters
from conformance.ulp import distance, rounded, spacing
from conformance.verdict import Along, Finding, Verdict, worst_first

#: Probability that a correct tensor has an element beyond its allowance, in a normal model: sets kappa.
FALSE_ALARM = 1e-6
#: Relative slack on the half ULP of the last rounding: kernels that round through fp32 miss ties by this much.
HALF_ULP_SLACK = 1 + 2.0**-12
#: What flushing subnormals to zero may cost.
FLUSHED = 2.0**-126
#: Spread: 5.5 standard deviations of a chi-square mean (Wilson-Hilferty), and 10% for what the model leaves out.
SPREAD_SIGMAS = 5.5
SPREAD_SLACK = 1.1
#: A known mistake is believed where the errors along its signature exceed 5.5 standard deviations, and half of what it adds.
SIGNATURE_SIGMAS = 5.5
SIGNATURE_PART = 0.5
#: The same of all cases together. A kernel that rounds elsewhere than a signature takes for granted adds less than that says,
#: two thirds at least of what was tried. What legal kernels do in all cases alike, such as where their ties go, does not average
#: out: in long runs the part alone tells it from a mistake (``benchmarks/constants.md``).
POOLED_SIGMAS = 5.5
POOLED_PART = 0.35
#: Elements of all inputs up to which signatures are made, twice what ``tiny`` has in its largest cases. Some 50 evaluations
#: of the reference and as many gradients take half a minute there, and would take a real layer many.
MOST_INPUTS = 10_000_000
#: Columns of a tile: what one NPU instruction writes.
TILE = 16
#: Bias: 6 standard deviations, and 2% of a rounding error per element.
BIAS_SIGMAS = 6.0
BIAS_SLACK = 0.02
#: Closer to a tie than this, in ULPs, the direction of a rounding says nothing about bias.
TIE_ULPS = 1e-5
#: How many areas that are too far off are looked at by themselves before all rows are counted, roughly, and how many after that.
MOST_AREAS = 8
#: How many elements that are too far off are looked at by themselves before they are believed, and how far they may be: none was
#: seen to vary by more than four times what the model says, which allows it twice as much.
MOST_ELEMENTS = 12
MOST_ELEMENT_SHARE = 4.0
#: A row with fewer different magnitudes than this says nothing statistical.
FEWEST_DISTINCT = 8
#: Elements looked at together: few enough that their float64 temporaries (256 KB each) stay in a core's cache, which is several
#: times faster than passes over whole tensors, and add nothing to speak of to the memory that an output takes.
BLOCK = 1 << 15

BF16 = torch.bfloat16
#: The dtypes of which spread and bias are judged. Not fp32: one rounding inside that falls on the other side moves a whole row by
#: many of its ULPs (``benchmarks/constants.py`` counts the correct runs that this would reject).
STATISTICAL = frozenset({BF16})


class Oracle:
    """What a correct kernel may return for one case, by profile; computed when first asked for and kept."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._bounds: dict[str, dict[str, Bounds]] = {}
        self._sensitivity: Sensitivity | None = None
        self._filters: list[Filter] | None = None

    def bounds(self, profile: Profile) -> dict[str, Bounds]:
        """Bounds of every output under a profile."""
        if profile.name not in self._bounds:
            self._bounds[profile.name] = self.case.stage.error_model(self.case.inputs, self.case.dims, profile)
        return self._bounds[profile.name]

    def independent_errors(self, argument: str, profile: Profile) -> torch.Tensor:
        """Per row of a composite stage's output, how many independent errors its scaled errors amount to."""
        return self._sensitive(profile).of_rows(argument)

    def independent_in_row(self, argument: str, profile: Profile, row: int) -> float:
        """The same of one judged row, counted more exactly."""
        return self._sensitive(profile).of_one(argument, row, slice(None), SPREAD_SIGMAS)

    def independent_in_all_rows(self, argument: str, profile: Profile, columns: slice) -> float:
        """The same of some columns of all judged rows: those of one token share errors from layer to layer."""
        return self._sensitive(profile).of_one(argument, None, columns, SPREAD_SIGMAS)

    def independent_in_tile(self, argument: str, profile: Profile, row: int, columns: slice) -> float:
        """The same of some columns of one judged row: a few roundings may steer a tile that do little to the rest of its row."""
        return self._sensitive(profile).of_one(argument, row, columns, SPREAD_SIGMAS)

    def element_variance(self, argument: str, profile: Profile, row: int, column: int) -> float:
        """The variance of one judged element's error, from each rounding's own effect on it."""
        return self._sensitive(profile).of_element(argument, row, column)

    def filters(self, profile: Profile) -> list[Filter]:
        """What shows known mistakes in a composite stage's outputs; one set for all profiles, as the sensitivities are."""
        if self._filters is None:
            self._filters = filters(self.case, self.bounds(profile), self._sensitive(profile))
        return self._filters

    def deviation_along(self, weights: dict[str, torch.Tensor], profile: Profile) -> float:
        """The deviation of a weighted sum of the errors of all judged rows."""
        (variance,) = self._sensitive(profile).along({name: weight.unsqueeze(0) for name, weight in weights.items()})
        return math.sqrt(variance)

    def _sensitive(self, profile: Profile) -> Sensitivity:
        # One for all profiles of a composite stage: they differ in where a norm's division stands, not in what is rounded.
        if self._sensitivity is None:
            self._sensitivity = Sensitivity(self.case, self.bounds(profile), profile)
        return self._sensitivity


@contextlib.contextmanager
def _own_settings() -> Iterator[None]:
    """Whatever the caller or the kernel set: one thread, and gradients, which the correlation of errors is told by.

    Small operators lose time in a thread pool, and beside a busy worker process its threads spin: 22 s for 4 s of work.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(before)


@_own_settings()
def judge(case: Case, outcome: Outcome, *, profile: str | None = None, oracle: Oracle | None = None) -> Verdict:
    """Judge one run of one case. ``profile`` names the only profile allowed; otherwise any of the stage's may explain the run.

    Raises ``UsageError`` if an output has another dtype or shape than the contract says.
    """
    oracle = oracle or Oracle(case)
    if outcome.status != "ok" or not outcome.outputs:
        return judge_without_outputs(outcome)
    findings = _conduct(outcome)
    for argument in case.stage.outputs:
        _require_shape(argument, outcome.outputs[argument.name], case)
    allowed = [known for known in case.stage.profiles if profile in (None, known.name)]
    if not allowed:
        raise UsageError(f"stage {case.stage.name} has no profile {profile!r}")
    best: _Numeric | None = None
    structural, explained = _structure(case, outcome, oracle.bounds(allowed[0]))
    for candidate in allowed:
        numeric = _numeric(case, outcome, oracle, candidate, explained)
        if best is None or numeric.badness < best.badness:
            best = numeric
        if not numeric.findings:
            break
    assert best is not None
    findings += structural + _in_one_word(case, outcome, best.findings, oracle.bounds(best.profile))
    ordered = worst_first(findings)
    if case.stage.localise is not None and (structural or best.findings):
        ordered = _with_causes(ordered, case.stage.localise(case.inputs, outcome.outputs, case.dims))
    return Verdict(ordered, best.share, best.profile.name, best.shares, best.along)


def judge_without_outputs(outcome: Outcome) -> Verdict:
    """Judge a run that left no outputs, since it came to no end or nothing was to be executed; no case is needed."""
    if outcome.status == "unavailable":
        raise UnavailableError(f"the lane cannot run here: {outcome.message}")
    if outcome.status != "ok":
        return Verdict((failure(outcome),))
    return Verdict(worst_first(_conduct(outcome)))


def judge_together(runs: Sequence[Mapping[str, Along]]) -> tuple[Verdict, int]:
    """Judge what the errors of several cases have in common, of each how far they lie along the signature of each mistake.

    Each case counts by what the mistake adds to it (a matched filter over cases), and none decides by itself: the one that speaks
    for the mistake most is left out. Returns the verdict and the number of that case.
    """
    verdict, telling = Verdict(), 0
    for mistake in dict.fromkeys(mistake for run in runs for mistake in run):
        known = {number: run[mistake] for number, run in enumerate(runs) if mistake in run}
        most = max(known, key=lambda number: known[number].sigmas * known[number].expected)
        others = [one for number, one in known.items() if number != most]
        expected = sum(one.expected**2 for one in others)
        if len(others) < 2 or not 0 < expected < math.inf:
            continue
        amount = sum(one.sigmas * one.expected for one in others)
        sigmas, part = amount / math.sqrt(expected), amount / expected
        share = min(sigmas / POOLED_SIGMAS, part / POOLED_PART)
        if not share > (verdict.share or 0.0):
            continue
        telling = most
        message = (
            f"the errors of {len(known)} cases are together those of a kernel where {mistake}: {part:.2g} times what that adds, "
            f"and {sigmas:.3g} standard deviations of what correct roundings add that way (at most {POOLED_SIGMAS:g}), without "
            "the case that shows it most; no case shows it by itself"
        )
        verdict = Verdict((Finding("pooled_signature", message, share=share),) if share > 1 else (), share)
    return verdict, telling


def _with_causes(findings: tuple[Finding, ...], causes: list[str]) -> tuple[Finding, ...]:
    if not causes or not findings:
        return findings
    first = findings[0]
    return (dataclasses.replace(first, message=f"{first.message}. Cause: {'; '.join(causes)}"), *findings[1:])


def failure(outcome: Outcome) -> Finding:
    """The finding of a run that did not come to its end: raised, crashed or timed out."""
    return Finding(outcome.status, f"{outcome.message}{_in_text(outcome.location)}")


def _in_text(location: str | None) -> str:
    return f" ({location})" if location else ""


def _conduct(outcome: Outcome) -> list[Finding]:
    """Findings about what a run did besides computing values."""
    findings = [
        Finding("changed_input", f"{name} is an input, and {count} of its elements changed", name, count=count)
        for name, count in outcome.changed_inputs.items()
    ]
    findings += [
        Finding("out_of_bounds", f"memory next to {name} was overwritten: {where}", name)
        for name, where in outcome.guard_damage.items()
    ]
    findings += [
        Finding("unwritten_read", f"{read.message}{_in_text(read.location)}", read.argument, count=read.count, total=read.total)
        for read in outcome.unwritten_reads
    ]
    if outcome.pass_differences:
        findings.append(_first_guilty_pass(outcome))
    return findings


def _first_guilty_pass(outcome: Outcome) -> Finding:
    """One finding for all passes that differ: what the first of them changed, since the later ones inherit it."""
    differences = sorted(outcome.pass_differences, key=lambda difference: difference.compiler_pass)
    first = differences[0]
    later = sorted({difference.compiler_pass for difference in differences} - {first.compiler_pass})
    rest = f"; so do {len(later)} later passes" if later else ""
    return Finding(
        "compiler_pass",
        f"{first.message} ({len(differences)} of {outcome.passes_compared} comparisons differ{rest})",
        count=first.count,
        total=first.total,
    )


def _require_shape(argument: Argument, found: torch.Tensor, case: Case) -> None:
    expected = argument.size(case.dims)
    if found.dtype != argument.dtype or tuple(found.shape) != expected:
        raise UsageError(
            f"{argument.name} of {case.stage.name} must be {argument.dtype} {list(expected)}, "
            f"found {found.dtype} {list(found.shape)}"
        )


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _blocks(matrix: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of pieces of at most ``BLOCK`` elements that cover a matrix."""
    rows, columns = matrix.shape
    width = max(1, min(columns, BLOCK))
    height = max(1, BLOCK // width)
    for row, column in itertools.product(range(0, rows, height), range(0, columns, width)):
        yield slice(row, min(rows, row + height)), slice(column, min(columns, column + width))


@dataclasses.dataclass(frozen=True)
class _Part:
    """The judged rows of one output, and where they stand in the argument."""

    argument: Argument
    raw: torch.Tensor
    rows: torch.Tensor | None

    @property
    def found(self) -> torch.Tensor:
        """As a matrix, in the output's own dtype."""
        return _matrix(self.raw)

    @functools.cached_property
    def value(self) -> torch.Tensor:
        """As a matrix of float64: four times an output in bf16, so only for tests that look at it as a whole."""
        return self.found.to(torch.float64)

    def index(self, flat: int) -> tuple[int, ...]:
        row, column = divmod(flat, self.found.shape[1])
        if self.raw.dim() == 1:
            return (column,)
        return (row if self.rows is None else int(self.rows[row]), column)


def _part(case: Case, outcome: Outcome, name: str, estimate: Bounds) -> _Part:
    found = outcome.outputs[name]
    raw = found if estimate.rows is None else found[estimate.rows]
    return _Part(case.stage.argument(name), raw, estimate.rows)


def _structure(case: Case, outcome: Outcome, bounds: dict[str, Bounds]) -> tuple[list[Finding], dict[str, torch.Tensor]]:
    """What is wrong with an output as a whole, and which elements that already explains: a mask by argument, if any."""
    findings: list[Finding] = []
    explained: dict[str, torch.Tensor] = {}
    for name, estimate in bounds.items():
        part = _part(case, outcome, name, estimate)
        if part.argument.access == "io":
            findings += _untouched(case, name, outcome.outputs[name], estimate)
            value = _matrix(estimate.value)
            before = case.inputs[name] if estimate.rows is None else case.inputs[name][estimate.rows]
            same = (bits(part.raw) == bits(before)).all(-1)
            expected_same = (rounded(value, part.argument.dtype) == before.to(torch.float64)).all(-1)
            mask = (same & ~expected_same).unsqueeze(1).expand_as(value)
            detector, what = "stale_row", "still holds what it held before the run"
        else:
            mask = _matrix(poisoned(part.raw))
            detector, what = "unwritten", "was not written"
        if bool(mask.any()):
            explained[name] = mask
            findings.append(_extent(case, part, mask, detector, what))
    return findings, explained


def _in_one_word(case: Case, outcome: Outcome, findings: list[Finding], bounds: dict[str, Bounds]) -> list[Finding]:
    """The findings, with those of an output that is all zeros or only repeats an input replaced by one that says so.

    Only where the numbers are wrong: a branch that is rounded to bf16 may cancel its residual exactly.
    """
    for name in dict.fromkeys(finding.argument for finding in findings):
        if name is not None:
            whole = _degenerate(case, _part(case, outcome, name, bounds[name]), _matrix(bounds[name].value))
            if whole is not None:
                findings = [finding for finding in findings if finding.argument != name] + [whole]
    return findings


def _untouched(case: Case, name: str, found: torch.Tensor, estimate: Bounds) -> list[Finding]:
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
            f"{len(touched)} rows of {name} that must keep their contents changed, the first at {_place(where)}",
            name,
            (first, column),
            where,
            count=len(touched),
            total=int(rows.numel()),
        )
    ]


def _degenerate(case: Case, part: _Part, value: torch.Tensor) -> Finding | None:
    """All zeros, or only a copy of an input, where the oracle is neither."""
    name, dtype = part.argument.name, part.argument.dtype
    if not dtype.is_floating_point:
        return None
    if not bool(part.found.any()):
        smallest = 2.0**-126
        if any(bool((value[block].abs() > smallest).any()) for block in _blocks(value)):
            return Finding("all_zeros", f"{name} is all zeros", name, (0, 0), count=value.numel(), total=value.numel())
        return None
    for other in case.stage.arguments:
        if other.access == "in" and _matrix(case.inputs[other.name]).shape == value.shape and value.numel() > 1:
            source = rounded(_matrix(case.inputs[other.name].to(torch.float64)), dtype)
            if torch.equal(part.value, source):
                if torch.equal(rounded(value, dtype), source):
                    return None
                return Finding(
                    "echo", f"{name} only repeats {other.name}", name, (0, 0), count=value.numel(), total=value.numel()
                )
    return None


@dataclasses.dataclass
class _Numeric:
    """The numeric tests of all outputs under one profile."""

    profile: Profile
    findings: list[Finding]
    shares: dict[str, float]
    along: dict[str, Along] = dataclasses.field(default_factory=dict)
    wrong: int = 0

    @property
    def share(self) -> float | None:
        return max(self.shares.values(), default=None)

    @property
    def badness(self) -> tuple[int, int, float]:
        return (len(self.findings), self.wrong, self.share or 0.0)


def _numeric(case: Case, outcome: Outcome, oracle: Oracle, profile: Profile, explained: dict[str, torch.Tensor]) -> _Numeric:
    result = _Numeric(profile, [], {})
    for name, estimate in oracle.bounds(profile).items():
        part = _part(case, outcome, name, estimate)
        flat = Bounds(_matrix(estimate.value), _matrix(estimate.variance), _matrix(estimate.worst))
        skip = explained.get(name)
        if skip is not None and bool(skip.all()):
            continue
        if not part.argument.dtype.is_floating_point:
            result.shares[name] = _integers(case, part, flat, skip, result)
            continue
        share = _finite_and_element(case, oracle, profile, part, flat, skip, result)
        if part.argument.dtype in STATISTICAL:
            statistics = _Statistics(case, oracle, profile, part, flat, estimate, skip)
            share = max(share, statistics.spread(result))
            if not case.stage.composite:
                share = max(share, statistics.bias(result))
        result.shares[name] = share
    # Errors that are too large together may have a cause that is known; what is wrong or missing in a place hides it.
    if case.stage.composite and not explained and all(finding.detector == "spread" for finding in result.findings):
        _all_in_bf16(case, outcome, oracle.bounds(profile), result)
        # Rows of a case that were rearranged are those of one that was judged.
        if not case.key.rows and sum(tensor.numel() for tensor in case.inputs.values()) <= MOST_INPUTS:
            _known_mistake(case, outcome, oracle, profile, result)
    return result


def _known_mistake(case: Case, outcome: Outcome, oracle: Oracle, profile: Profile, result: _Numeric) -> None:
    """Do the errors of all outputs together look like what a known mistake adds? The one that they look like most is told.

    Inside a layer a truncated value leaves every element within its allowance, but moves all of them in a way that is known.
    """
    bounds = oracle.bounds(profile)
    errors = {}
    for name, estimate in bounds.items():
        error = _part(case, outcome, name, estimate).value - _matrix(estimate.value)
        errors[name] = torch.where(torch.isfinite(error), error, 0.0)
    worst: tuple[float, float, Filter] | None = None
    for one in oracle.filters(profile):
        sigmas = sum(float((errors[name] * _matrix(weight)).sum()) for name, weight in one.weights.items())
        part = sigmas / one.expected
        result.along[one.mistake] = Along(sigmas, one.expected)
        enough = max(SIGNATURE_SIGMAS, worst[0] if worst else 0.0)
        if part <= SIGNATURE_PART or sigmas <= enough:
            continue
        # The filter takes it for granted which rounding belongs to which sequence.
        sigmas /= max(1.0, oracle.deviation_along(one.weights, profile))
        if sigmas > enough:
            worst = sigmas, part, one
    if worst is None:
        return
    sigmas, part, one = worst
    name = max(one.weights, key=lambda name: float((errors[name] * _matrix(one.weights[name])).sum()))
    share = min(sigmas / SIGNATURE_SIGMAS, part / SIGNATURE_PART)
    result.wrong += 1
    result.shares[name] = max(result.shares.get(name, 0.0), share)
    result.findings.append(
        Finding(
            "signature",
            f"the errors of {', '.join(bounds)} are together those of a kernel where {one.mistake}: {part:.2g} times what that "
            f"adds, and {sigmas:.3g} standard deviations of what correct roundings add that way (at most {SIGNATURE_SIGMAS:g})",
            name,
            share=share,
        )
    )


def _all_in_bf16(case: Case, outcome: Outcome, bounds: dict[str, Bounds], result: _Numeric) -> None:
    """Are most values of an fp32 output bf16 values? By chance one in 65536 is."""
    for name, estimate in bounds.items():
        part = _part(case, outcome, name, estimate)
        if part.argument.dtype != torch.float32 or 2 * _count(_is_bf16(part.found)) <= part.found.numel():
            continue
        # So may those of a correct kernel be: its weights may be ones that pick a rounded value each.
        expected = case.stage.reference(case.inputs, case.dims, CONTRACT)[name].float()
        telling = torch.isfinite(part.found) & ~_is_bf16(_matrix(expected if estimate.rows is None else expected[estimate.rows]))
        short = telling & _is_bf16(part.found)
        if _count(telling) >= FEWEST_DISTINCT and 2 * _count(short) > _count(telling):
            result.wrong += _count(short)
            result.findings.append(
                _extent(case, part, short, "signature", "must be fp32, and holds bf16 values: its low 16 bits are zero")
            )


def _is_bf16(found: torch.Tensor) -> torch.Tensor:
    return bits(found.contiguous()) & 0xFFFF == 0


def kappa(count: int) -> float:
    """How many standard deviations the worst of ``count`` correct elements stays within, but for ``FALSE_ALARM``."""
    return math.sqrt(2 * math.log(2 * count / FALSE_ALARM))


@dataclasses.dataclass(frozen=True, order=True)
class _Worst:
    """The element that is told of: the one of the largest share; of those that allow nothing, the largest error; the first."""

    rank: float
    error: float
    minus_flat: int
    share: float


def _finite_and_element(
    case: Case, oracle: Oracle, profile: Profile, part: _Part, estimate: Bounds, skip: torch.Tensor | None, result: _Numeric
) -> float:
    """The worst share of its allowance that an element uses."""
    scan = _scan(part, estimate, skip)
    if case.stage.composite and scan.highest <= MOST_ELEMENT_SHARE and 0 < _count(scan.beyond) <= MOST_ELEMENTS:
        # The error model takes the errors that a sum has for terms as independent. Where a few roundings steer a row (those of a
        # query that reads two keys), they are not: some columns vary four times as much as it says, and others less.
        variance = estimate.variance.clone()
        for row, column in torch.nonzero(scan.beyond).tolist():
            exact = oracle.element_variance(part.argument.name, profile, row, column)
            if exact <= float(variance[row, column]):
                break  # this one is wrong, and so is the run
            variance[row, column] = exact
        estimate = Bounds(estimate.value, variance, estimate.worst)
        scan = _scan(part, estimate, skip)
    if bool(scan.broken.any()):
        result.wrong += _count(scan.broken)
        result.findings.append(_extent(case, part, scan.broken, "not_finite", "is not finite"))
    if scan.worst is not None:
        result.wrong += _count(scan.beyond)
        result.findings.append(_element_finding(case, part, estimate, scan.worst, scan.beyond))
    return scan.highest


@dataclasses.dataclass(frozen=True)
class _Scan:
    """Which elements of an output are not finite or beyond their allowance, the worst of these, and the highest share."""

    broken: torch.Tensor
    beyond: torch.Tensor
    worst: _Worst | None
    highest: float


def _scan(part: _Part, estimate: Bounds, skip: torch.Tensor | None) -> _Scan:
    """Look at every element, block by block, most of them in passing."""
    found, dtype = part.found, part.argument.dtype
    deviations = kappa(found.numel())
    broken, beyond = (torch.zeros(found.shape, dtype=torch.bool) for _ in range(2))
    highest = 0.0
    worst: _Worst | None = None
    for block in _blocks(found):
        out, near = found[block], estimate[block]
        # Forgiving the half ULP of the last rounding only makes a share smaller. Where even without it no element uses more of
        # its allowance than one did before, the block has nothing to tell. What is not a number is never that little.
        error = (out - near.value).abs_()
        unforgiven = error.div_(torch.minimum(near.variance.sqrt().mul_(deviations), near.worst))
        if float(unforgiven.max()) <= min(highest, 1.0):
            continue
        out = out.to(torch.float64)
        wanted = None if skip is None else ~skip[block]
        strange = _not_finite(out, near.value, dtype, wanted)
        if strange is not None:
            broken[block] = strange
        share = _shares(out, near, dtype, deviations, wanted)
        most = float(share.max())
        if math.isnan(most) or most > highest:
            highest = most
        over = ~(share <= 1)
        if bool(over.any()):
            beyond[block] = over
            here = _worst_of(out - near.value, share, over, block, found.shape[1])
            worst = here if worst is None else max(worst, here)
    return _Scan(broken, beyond, worst, highest)


def _not_finite(out: torch.Tensor, value: torch.Tensor, dtype: torch.dtype, wanted: torch.Tensor | None) -> torch.Tensor | None:
    """Which elements are NaN or infinite where the oracle is not the same; ``None`` if all are finite."""
    strange = ~torch.isfinite(out)
    if not bool(strange.any()):
        return None
    oracle = rounded(value, dtype)
    # Bit-equal infinities and NaNs of both are agreement; one-sided ones are not.
    strange &= ~((out == oracle) | (out.isnan() & oracle.isnan()))
    return strange if wanted is None else strange & wanted


def _shares(
    out: torch.Tensor, estimate: Bounds, dtype: torch.dtype, deviations: float, wanted: torch.Tensor | None
) -> torch.Tensor:
    """What part of its allowance the error of each element uses; 0 for one that is not finite, or not wanted."""
    value = estimate.value
    half = spacing(torch.maximum(out.abs(), value.abs()), dtype).mul_(0.5 * HALF_ULP_SLACK).add_(FLUSHED)
    certain = estimate.worst == 0
    if bool(certain.any()):
        # A copy of an exact value (a cache row, a bf16 key) is bit-exact: there is no last rounding to forgive.
        half.masked_fill_(certain & (rounded(value, dtype) == value), 0.0)
    excess = (out - value).abs_().sub_(half)
    worst = torch.nan_to_num(estimate.worst, nan=math.inf, posinf=math.inf)
    allowance = torch.minimum(estimate.variance.sqrt().mul_(deviations), worst)
    usable = torch.isfinite(out) & torch.isfinite(value) & (excess > 0)
    if wanted is not None:
        usable &= wanted
    return torch.where(usable, excess / allowance, 0.0)


def _worst_of(error: torch.Tensor, share: torch.Tensor, over: torch.Tensor, block: tuple[slice, slice], columns: int) -> _Worst:
    """The worst of a block's elements that are ``over``, and where it stands among all rows of that many ``columns``."""
    rank = torch.where(over, torch.nan_to_num(share, nan=math.inf), -1.0)
    highest = rank.max()
    size = torch.where(rank == highest, error.abs(), -1.0)
    place = int(size.argmax())
    row, column = divmod(place, error.shape[1])
    flat = (block[0].start + row) * columns + block[1].start + column
    return _Worst(float(highest), float(size.flatten()[place]), -flat, float(share.flatten()[place]))


def _integers(case: Case, part: _Part, estimate: Bounds, skip: torch.Tensor | None, result: _Numeric) -> float:
    """Integers are right or wrong; returns the share of the allowance, of which there is none."""
    wrong = part.value != estimate.value
    if skip is not None:
        wrong &= ~skip
    if not bool(wrong.any()):
        return 0.0
    flat = int(torch.nonzero(wrong.flatten())[0])
    index = part.index(flat)[-len(part.argument.size(case.dims)) :]
    found, expected = int(part.value.flatten()[flat]), int(estimate.value.flatten()[flat])
    result.wrong += _count(wrong)
    result.findings.append(
        Finding(
            "element",
            f"{_at(part.argument, index)} is {found}, expected {expected}; {_pattern(part, wrong)}",
            part.argument.name,
            index,
            part.argument.where(index, case.dims),
            share=math.inf,
            count=_count(wrong),
            total=wrong.numel(),
        )
    )
    return math.inf


def _element_finding(case: Case, part: _Part, estimate: Bounds, worst: _Worst, beyond: torch.Tensor) -> Finding:
    argument = part.argument
    flat = -worst.minus_flat
    index = part.index(flat)
    where = argument.where(index[-len(argument.size(case.dims)) :], case.dims)
    row, column = divmod(flat, part.found.shape[1])
    at_worst, value = part.found[row, column].to(torch.float64), estimate.value[row, column]
    found, expected, ulps = float(at_worst), float(value), float(distance(at_worst, value, argument.dtype))
    amount = worst.share
    used = "where no error is allowed" if math.isinf(amount) else f"{amount:.3g} times its allowance"
    return Finding(
        "element",
        f"{_at(argument, index)} is {found:.6g}, expected {expected:.6g}: {ulps:.3g} ulp off, {used}; {_pattern(part, beyond)}",
        argument.name,
        index,
        where,
        share=amount,
        ulps=ulps,
        count=_count(beyond),
        total=beyond.numel(),
    )


#: A row, or all, and the columns from one to before another.
_Place = tuple[int | None, int, int]


@dataclasses.dataclass(frozen=True)
class _Area:
    """A part of an output, its mean square of scaled errors, and the share of the limit that this is; ``row`` is one or all."""

    share: float
    row: int | None
    columns: slice
    mean_square: float
    is_tile: bool

    @property
    def place(self) -> _Place:
        """Where it is."""
        return self.row, self.columns.start, self.columns.stop


class _Statistics:
    """Spread and bias of one output: errors that are each small enough, and together impossible."""

    def __init__(
        self,
        case: Case,
        oracle: Oracle,
        profile: Profile,
        part: _Part,
        flat: Bounds,
        estimate: Bounds,
        skip: torch.Tensor | None,
    ) -> None:
        self.case, self.oracle, self.profile, self.part = case, oracle, profile, part
        self.estimate = estimate
        self.ulp = spacing(flat.value, part.argument.dtype)
        self.deviation = (flat.variance + error_bounds.rounding_variance(self.ulp)).sqrt()
        self.error = part.value - flat.value
        self.value, self.variance = flat.value, flat.variance
        counted = torch.isfinite(self.error) & torch.isfinite(self.deviation)
        if skip is not None:
            counted &= ~skip
        # Values that agree in magnitude to 12 bits are rounded alike: their errors are one and the same.
        magnitudes = flat.value.abs().view(torch.int64) >> 40
        self.distinct = _count_distinct(magnitudes)
        # One head if a row is not made of them.
        lanes = case.dims.D if part.argument.shape.endswith("*D") else magnitudes.shape[1]
        self.heads = magnitudes.shape[1] // lanes
        self.distinct_in_head = _count_distinct(magnitudes.view(len(magnitudes), self.heads, lanes))
        padded = torch.nn.functional.pad(magnitudes, (0, -magnitudes.shape[1] % TILE), value=-1)
        self.distinct_in_tile = _count_distinct(padded.view(len(magnitudes), -1, TILE))
        # So are those of rows that repeat one another: per column, which part of the values down the rows are different.
        self.different_rows = _count_distinct(magnitudes.T).double() / len(magnitudes)
        # A constant row rounds the same way everywhere: nothing averages out in it.
        self.counted = counted & (self.distinct >= FEWEST_DISTINCT).unsqueeze(1)
        self.scaled = torch.where(self.counted, self.error / self.deviation, torch.zeros_like(self.error))

    @functools.cached_property
    def independent(self) -> torch.Tensor:
        """Per row, how many independent errors it holds at the most."""
        distinct = self.distinct.double()
        if self.estimate.correlation is not None:
            return torch.minimum(distinct, self.estimate.correlation.independent)
        if self.case.stage.composite:
            return torch.minimum(distinct, self.oracle.independent_errors(self.part.argument.name, self.profile))
        return distinct

    def spread(self, result: _Numeric) -> float:
        """Mean square of the scaled error, for the tensor, each row, each tile of a row, each column of tiles."""
        square = self.scaled**2
        if not bool(self.counted.any()):
            return 0.0
        # The limit only rises as fewer errors are independent: count them only where all together would not do.
        area = self._worst_area(square, self.distinct.double(), {})
        # That is dear for a composite stage, and idle where the argument is wrong already.
        known = any(finding.argument == self.part.argument.name for finding in result.findings)
        if area.share > 1 and not known:
            composite = self.case.stage.composite
            area = self._looked_at(square, area) if composite else self._worst_area(square, self.independent, {})
        worst = area.share
        if worst > 1:
            row, columns, mean = area.row, area.columns, area.mean_square
            argument = self.part.argument
            index = self.part.index((row or 0) * square.shape[1] + columns.start)
            where = argument.where(index[-len(argument.size(self.case.dims)) :], self.case.dims)
            where_it_is = _area(self.part, row, columns, square.shape[1])
            result.wrong += 1
            result.findings.append(
                Finding(
                    "spread",
                    f"errors of {argument.name} in {where_it_is} are {math.sqrt(mean):.3g} times what rounding explains "
                    f"(mean square {worst:.3g} times the limit)",
                    argument.name,
                    index,
                    where,
                    share=worst,
                    ulps=float((self.error.abs() / self.ulp)[self.counted].max()),
                    count=int(self.counted.sum()),
                    total=self.counted.numel(),
                )
            )
        return worst

    def _looked_at(self, square: torch.Tensor, area: _Area) -> _Area:
        """The area of a composite stage's output that is furthest off, once its independent errors are counted.

        A row that is too far off, and then a tile in it, is looked at by itself, until one remains that is too far off all the
        same; so are the tensor and its columns of tiles. After ``MOST_AREAS`` of them all rows are counted together, roughly.
        """
        name = self.part.argument.name
        independent = self.distinct.double()
        alone: dict[_Place, float] = {}
        rows: set[int] = set()
        looks, all_counted = 0, False
        # However few roundings steer an area, beyond this it is wrong.
        while area.share > 1 and area.mean_square <= float(spread_limit(torch.tensor(2.0))):
            unseen_row = area.row is not None and area.row not in rows
            unseen_area = (area.row is None or area.is_tile) and area.place not in alone
            if not unseen_row and not unseen_area:
                break
            if looks == MOST_AREAS:
                if all_counted:
                    break
                exact = independent[list(rows)]
                independent = torch.minimum(independent, self.independent)
                independent[list(rows)] = exact
                looks, all_counted = 0, True
            elif area.row is not None and unseen_row:
                found = self.oracle.independent_in_row(name, self.profile, area.row)
                independent[area.row] = independent[area.row].clamp_max(found)
                rows.add(area.row)
                looks += 1
            elif area.row is None:
                alone[area.place] = self.oracle.independent_in_all_rows(name, self.profile, area.columns)
                looks += 1
            else:
                alone[area.place] = self.oracle.independent_in_tile(name, self.profile, area.row, area.columns)
                looks += 1
            area = self._worst_area(square, independent, alone)
        return area

    def _worst_area(self, square: torch.Tensor, independent: torch.Tensor, alone: dict[_Place, float]) -> _Area:
        """Which of the tensor, its rows, tiles and columns of tiles is furthest off.

        ``independent`` counts the independent errors of each row, ``alone`` those of other areas that were counted by themselves.
        """
        rows, columns = square.shape
        padded = -columns % TILE
        counted = torch.nn.functional.pad(self.counted, (0, padded)).view(rows, -1, TILE)
        tiles = torch.nn.functional.pad(square, (0, padded)).view(rows, -1, TILE).sum(-1)
        counts = counted.sum(-1).double()
        # Alike values within a tile count once. What the errors of a row share besides, a part of the row shares too: 1 / n
        # rises by as much there.
        row_counts = counts.sum(1)
        row_distinct = torch.minimum(row_counts, self.distinct.double())
        common = (1 / independent - 1 / row_distinct).clamp_min(0)
        in_row = 1 / (1 / row_distinct + common)
        in_tile = 1 / (1 / torch.minimum(counts, self.distinct_in_tile.double()) + common.unsqueeze(1))
        different = self.different_rows
        different_in_tile = torch.stack([part.mean() for part in torch.split(different, TILE)])
        in_all = (in_row.sum() * different.mean()).view(1, 1)
        in_column = in_tile.sum(0, keepdim=True) * different_in_tile
        for (row, start, stop), fewer in alone.items():
            if row is not None:
                in_tile[row, start // TILE].clamp_(max=fewer)
                continue
            if stop - start == columns:
                in_all.clamp_(max=fewer)
            if stop - start <= TILE:
                in_column[0, start // TILE].clamp_(max=fewer)
        areas = (
            (tiles.sum().view(1, 1), row_counts.sum().view(1, 1), in_all),
            (tiles.sum(1, keepdim=True), row_counts.view(-1, 1), in_row.view(-1, 1)),
            (tiles, counts, in_tile),
            (tiles.sum(0, keepdim=True), counts.sum(0, keepdim=True), in_column),
        )
        best = _Area(0.0, None, slice(0, columns), 0.0, False)
        for kind, (total, count, effective) in enumerate(areas):
            mean = total / count.clamp_min(1)
            share = mean / spread_limit(effective)
            flat = int(share.argmax())
            if float(share.flatten()[flat]) > best.share:
                row, tile = divmod(flat, share.shape[1])
                whole_row = kind in (0, 1)
                part = slice(0, columns) if whole_row else slice(tile * TILE, min(columns, (tile + 1) * TILE))
                of_row = row if kind in (1, 2) else None
                best = _Area(float(share.flatten()[flat]), of_row, part, float(mean.flatten()[flat]), kind == 2)
        return best

    def bias(self, result: _Numeric) -> float:
        """The signed sum of scaled errors, for each row and the tensor: truncation, or a factor that is slightly off.

        Also the squares of those of the heads: a factor that is off in each head by another amount, a denominator of softmax
        that was rounded, makes some too large and others too small, and a row as a whole neither.
        """
        offset = rounded(self.value, self.part.argument.dtype) - self.value
        tie = (offset.abs() - self.ulp / 2).abs() < TIE_ULPS * self.ulp
        counted = self.counted & ~tie
        # Where the value is certain its rounding is no accident: an attention that reads one key nearly alone returns its value
        # row, a little larger than the exact result in every column. An uncertainty s leaves of that error's expectation the
        # part that a Gaussian leaves of a sawtooth's first harmonic.
        certainty = torch.exp(-2 * math.pi**2 * (self.variance / self.ulp**2).clamp_max(10))
        surprise = torch.where(counted, (self.error - certainty * offset) / self.deviation, torch.zeros_like(self.error))
        signed = surprise * torch.sign(self.value)
        counts = counted.sum(1).double()
        # Repeated values repeat their error: the sum of n errors of which d are different varies n / d times as much.
        variance = counts * (counts / torch.minimum(self.distinct.double(), counts).clamp_min(1))
        if self.estimate.correlation is not None:
            variance = torch.maximum(self.estimate.correlation.sum_variance, variance)
        sums = torch.cat([signed.sum(1), signed.sum().view(1)])
        limits = torch.cat(
            [BIAS_SIGMAS * variance.sqrt(), BIAS_SIGMAS * (variance.sum() / self.different_rows.mean()).sqrt().view(1)]
        )
        limits = limits + BIAS_SLACK * torch.cat([counts, counts.sum().view(1)])
        share = torch.where(limits > 0, sums.abs() / limits.clamp_min(1e-300), torch.zeros_like(sums))
        worst = int(share.argmax())
        amount = float(share[worst])
        of_heads, head = self._lean_of_heads(signed, counted, variance) if self.heads > 1 else (0.0, 0)
        if of_heads > max(amount, 1):
            self._found_lean_of_heads(of_heads, head, counted, result)
        elif amount > 1:
            argument = self.part.argument
            row = worst if worst < len(counts) else None
            index = self.part.index((row or 0) * self.value.shape[1])
            area = _area(self.part, row, slice(0, self.value.shape[1]), self.value.shape[1])
            lean = "too large" if float(sums[worst]) > 0 else "too small"
            mean = float(sums[worst]) / float(torch.cat([counts, counts.sum().view(1)])[worst])
            result.wrong += 1
            result.findings.append(
                Finding(
                    "bias",
                    f"{argument.name} is {lean} in magnitude throughout {area}: on average {abs(mean):.3g} standard deviations "
                    f"of a rounding, {amount:.3g} times the limit (truncation, or a factor slightly off)",
                    argument.name,
                    index,
                    argument.where(index[-len(argument.size(self.case.dims)) :], self.case.dims),
                    share=amount,
                    count=int(counted.sum()),
                    total=counted.numel(),
                )
            )
        return max(amount, of_heads)

    def _lean_of_heads(self, signed: torch.Tensor, counted: torch.Tensor, row_variance: torch.Tensor) -> tuple[float, int]:
        """The mean square of the heads' signed sums, each over its deviation, as a share of its limit; and the worst head."""
        by_head = len(signed), self.heads, -1
        counts = counted.view(by_head).sum(-1).double()
        variance = counts * (counts / torch.minimum(self.distinct_in_head.double(), counts).clamp_min(1))
        correlation = self.estimate.correlation
        if correlation is not None and correlation.head_variance is not None:
            variance = torch.maximum(variance, correlation.head_variance)
        lean = (signed.view(by_head).sum(-1).abs() - BIAS_SLACK * counts).clamp_min(0)
        some = counts > 0
        square = torch.where(some, lean**2 / variance.clamp_min(1e-300), 0.0)
        # Heads whose errors are one and the same make their row's sum vary by more than theirs add up to.
        together = (row_variance / torch.where(some, variance, 0.0).sum(1).clamp_min(1e-300)).clamp_min(1)
        independent = (some.sum(1) / together).sum() * self.different_rows.mean()
        mean = square.sum() / some.sum().clamp_min(1)
        return float(mean / spread_limit(independent)), int(square.argmax())

    def _found_lean_of_heads(self, share: float, worst: int, counted: torch.Tensor, result: _Numeric) -> None:
        argument = self.part.argument
        lanes = counted.shape[1] // self.heads
        index = self.part.index(worst * lanes)
        where = argument.where(index[-len(argument.size(self.case.dims)) :], self.case.dims)
        result.wrong += 1
        result.findings.append(
            Finding(
                "bias",
                f"heads of {argument.name} are too large or too small in magnitude, each of them throughout: what they lean by "
                f"has a mean square of {share:.3g} times the limit (a factor of each head's own is slightly off)",
                argument.name,
                index,
                where,
                share=share,
                count=int(counted.sum()),
                total=counted.numel(),
            )
        )


def _count_distinct(rows: torch.Tensor) -> torch.Tensor:
    """How many different values there are along the last axis."""
    ordered = rows.sort(-1).values
    return (ordered[..., 1:] != ordered[..., :-1]).sum(-1) + 1


def spread_limit(independent: torch.Tensor) -> torch.Tensor:
    """The largest mean square of scaled errors of a correct kernel, of which ``independent`` are independent."""
    return SPREAD_SLACK * chi_square_mean(independent.clamp_min(2), SPREAD_SIGMAS)


def _count(mask: torch.Tensor) -> int:
    return int(mask.count_nonzero())  # a sum would widen the mask to int64 first


def _extent(case: Case, part: _Part, mask: torch.Tensor, detector: str, what: str) -> Finding:
    first = int(mask.flatten().view(torch.uint8).argmax())  # a list of all places would take eight times the mask
    index = part.index(first)
    argument = part.argument
    where = argument.where(index[-len(argument.size(case.dims)) :], case.dims)
    return Finding(
        detector,
        f"{argument.name} {what}: {_pattern(part, mask)}, the first at {_at(argument, index)} ({_place(where)})",
        argument.name,
        index,
        where,
        count=_count(mask),
        total=mask.numel(),
    )


def _at(argument: Argument, index: Sequence[int]) -> str:
    return f"{argument.name}[{', '.join(str(position) for position in index)}]"


def _place(where: dict[str, int]) -> str:
    return ", ".join(f"{label.replace('_', ' ')} {position}" for label, position in where.items())


def _area(part: _Part, row: int | None, columns: slice, width: int) -> str:
    across = "" if columns == slice(0, width) else f"columns {columns.start}..{columns.stop - 1}"
    if row is None:
        return f"{across} of every row" if across else "the whole tensor"
    number = row if part.rows is None else int(part.rows[row])
    return f"row {number}, {across}" if across else f"row {number}"


def _pattern(part: _Part, mask: torch.Tensor) -> str:
    """How much is wrong and in what shape: all of it, whole rows, a block of columns, or scattered elements."""
    count, total = _count(mask), mask.numel()
    if count == total:
        return f"all {total} elements"
    rows = torch.nonzero(mask.any(1)).flatten()
    columns = torch.nonzero(mask.any(0)).flatten()
    text = f"{count} of {total} elements"
    if count < len(rows) * len(columns) or count == 1:
        return f"{text}, in {len(rows)} of {mask.shape[0]} rows" if mask.shape[0] > 1 else text
    names = rows if part.rows is None else part.rows[rows]
    down = "every row" if len(rows) == mask.shape[0] else f"rows {_ranges(names.tolist())}"
    across = "" if len(columns) == mask.shape[1] else f", columns {_ranges(columns.tolist())}"
    return f"{text}: {down}{across}"


def _ranges(numbers: list[int], most: int = 4) -> str:
    """Numbers as short ranges, such as ``0..3, 8``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(low) if low == high else f"{low}..{high}" for low, high in runs[:most]]
    return ", ".join(shown) + (f" and {len(runs) - most} more" if len(runs) > most else "")
