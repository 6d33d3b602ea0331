"""Signatures of known mistakes: what each would add to the outputs of a layer, or of a chain of them.

Composed rounding noise hides them element by element. But their shape is known before a kernel runs, from the reference evaluated
as the mistaken kernel would; and so is the shape of the noise. A weighted sum of all errors, large for the mistake and small for
roundings, tells the two apart (docs/rule.md, Matched filters).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors
from conformance.judge.sensitivity import Sensitivity
from conformance.numerics.arithmetic import Disturbance, Disturbed, ErrorSites
from conformance.numerics.bounds import Bounds, rounding_variance
from conformance.numerics.ulp import spacing

if TYPE_CHECKING:
    from conformance.cases.case import Case

#: A factor that is off by this is searched for in every floating-point output. Half of it is enough to be told, and more than
#: what a sum of bf16 values gains by a cast that rounds its many ties away from zero.
FACTOR = 2.0**-7
#: Correlation from which on the rounding errors of two kernels at the same places count as the same.
ALIKE = 0.7
#: Tokens of disturbed references that are evaluated together: enough to make steps large, few enough for a core's cache.
ROWS_TOGETHER = 512
#: A shift is none up to this part of its row's largest value: float64 sums of other order differ by less.
RESOLUTION = 2.0**-40
#: What is added to the diagonal of the correlations before they are inverted. Without it a filter would cancel noise to more
#: digits than a first-order model of it has.
RIDGE = 1e-3


@dataclasses.dataclass(frozen=True)
class Signature:
    """A mistake, as a clause, and what it adds to the judged rows of each output, float64.

    ``opposite`` is the mistake that takes away as much, where there is one. With ``is_legal`` a correct
    kernel may do it too: a nuisance direction, which no filter may take for a mistake.
    """

    mistake: str
    opposite: str | None = None
    is_legal: bool = False
    shifts: Tensors = dataclasses.field(default_factory=dict)


def signatures(
    case: Case, judged_rows: Mapping[str, torch.Tensor | None], declared: frozenset[str] = frozenset()
) -> Iterator[Signature]:
    """The signatures of a composite stage's case; ``judged_rows`` has the rows of each output that count, ``None`` for all.

    Roundings that are ``declared`` are no mistakes.
    First the mistakes that the reference has a name for, then those that the stage declares, then a factor on each output.
    """

    def evaluated(arithmetic: Disturbed | ErrorSites, inputs: Tensors = case.inputs, dims: Dims = case.dims) -> Tensors:
        found = case.stage.reference(inputs, dims, arithmetic)
        return {name: arithmetic.written(found[name], rows) for name, rows in judged_rows.items()}

    exact, contract, rounding_all = (ErrorSites(makes, declared) for makes in ("none", "contract", "all"))
    right = evaluated(exact)
    # Products of several references at once may add up in another order.
    resolution = {name: RESOLUTION * value.abs().amax(-1, keepdim=True) for name, value in right.items()}
    evaluated(contract)
    evaluated(rounding_all)

    def shifts(wrong: Tensors) -> Tensors:
        found = {name: wrong[name] - value for name, value in right.items()}
        return {name: shift.mul_(shift.abs() > resolution[name]) for name, shift in found.items()}

    known: list[tuple[Signature, Disturbance]] = []
    for name in contract.rounded_values:
        tie_prone = name in case.stage.tie_prone
        truncated = Signature(
            f"{name} is truncated instead of rounded (or too small by half a ULP on average)",
            None if tie_prone else f"{name} is rounded away from zero (or too large by half a ULP on average)",
        )
        known.append((truncated, (name, exact.truncation_errors(name))))
        if tie_prone:
            away = f"{name} is rounded with ties away from zero"
            known.append((Signature(away, is_legal=True), (name, rounding_all.ties(name))))
            anywhere = Signature(f"{away}, wherever they fall", is_legal=True)
            known.append((anywhere, (name, rounding_all.expected_ties(name))))
    for name in contract.unrounded_values:
        # What is rounded depends on what was rounded before it.
        kinds = {"": contract.rounding_errors(name)}
        elsewhere = {"makes all optional roundings": rounding_all, "makes no other rounding": exact}
        for kernel, sites in elsewhere.items():
            errors = sites.rounding_errors(name)
            if all(_is_unlike(other, errors) for other in kinds.values()):
                kinds[f" (in a kernel that {kernel})"] = errors
        known += [(Signature(f"{name} is rounded to bf16{where}"), (name, errors)) for where, errors in kinds.items()]
    # Disturbances of neighbouring places together: what comes before the first of them is computed once.
    places = {name: place for place, name in enumerate(contract.names)}
    order = sorted(range(len(known)), key=lambda number: places[known[number][1][0]])
    tokens = max((len(values[0]) for values in contract.rounded_values.values()), default=1)
    of_known: dict[int, Tensors] = {}
    for numbers in _batches(order, max(1, ROWS_TOGETHER // tokens)):
        disturbances = [known[number][1] for number in numbers]

        def disturbed(weights: torch.Tensor, disturbances: list[Disturbance] = disturbances) -> Tensors:
            return evaluated(Disturbed(disturbances, weights))

        weights = torch.eye(len(numbers), dtype=torch.float64)
        try:
            found = torch.func.vmap(disturbed)(weights)
        except RuntimeError:  # a reference that branches on its data is evaluated one by one
            each = [disturbed(row) for row in weights]
            found = {name: torch.stack([one[name] for one in each]) for name in each[0]}
        added = shifts(found)
        for position, number in enumerate(numbers):
            of_known[number] = {name: shift[position] for name, shift in added.items()}
    for number, (signature, _) in enumerate(known):
        yield dataclasses.replace(signature, shifts=of_known[number])
    none = torch.zeros(0)
    for mistake, changed in case.stage.mistakes.items():
        yield Signature(mistake, shifts=shifts(evaluated(Disturbed([], none), *changed(case.inputs, case.dims))))
    nothing = {name: torch.zeros_like(value) for name, value in right.items()}
    for name, value in right.items():
        if case.stage.argument(name).dtype.is_floating_point:
            factor = {**nothing, name: value * FACTOR}
            yield Signature(
                f"{name} is too large by a constant factor", f"{name} is too small by a constant factor", shifts=factor
            )


def _batches(numbers: list[int], most: int) -> list[list[int]]:
    """As few batches of about equal size as hold at most so many each."""
    count = -(-len(numbers) // most)
    return [list(part) for part in np.array_split(numbers, count)] if count else []


def _is_unlike(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether rounding errors of the same places have so little in common that one cannot stand for the other."""
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (some, others))
    if not bool(one.any()):
        return bool(other.any())
    return float(one @ other) < ALIKE * float(one.norm() * other.norm())


@dataclasses.dataclass(frozen=True)
class Directions:
    """K weighted sums of errors, of each sequence by itself, which filters are combinations of.

    ``weights`` has those of each output's judged rows, ``[K, rows, columns]`` in fp32 (of many cases they are most of what is
    kept), ``sequences`` the sequence of each row; there are ``batch`` sequences.
    """

    weights: dict[str, torch.Tensor]
    sequences: dict[str, torch.Tensor]
    batch: int

    def sums(self, errors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of these errors, ``[rows, columns]`` of each output: ``[batch, K]``."""
        return sum(
            torch.zeros(self.batch, len(weights), dtype=torch.float64).index_add_(
                0, self.sequences[name], torch.einsum("krc,rc->rk", weights.double(), errors[name].view(weights.shape[1:]))
            )
            for name, weights in self.weights.items()
        )  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Filter:
    """A weighted sum of all errors that shows one mistake: one standard deviation in correct kernels, ``expected`` in a mistaken
    one. ``combination [batch, K]`` are its weights of the directions' sums."""

    mistake: str
    directions: Directions
    combination: torch.Tensor
    expected: float

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Those of every error in each output's judged rows, ``[rows, columns]``."""
        directions = self.directions
        return {
            name: torch.einsum("rk,krc->rc", self.combination[directions.sequences[name]].float(), weights)
            for name, weights in directions.weights.items()
        }


def filters(
    case: Case, bounds: Mapping[str, Bounds], sensitivity: Sensitivity, declared: frozenset[str] = frozenset()
) -> list[Filter]:
    """A filter for each signature that the case shows at all, and for its opposite; all of the same directions.

    The best weights for a shift s in noise of covariance C are ``inverse(C) s``. C has a row for every element of every output:
    the weights are sought among combinations of the signatures, each over the variance of the elements, and different for each
    sequence. ``benchmarks/signatures.py`` compares them with the best. What is legal is not among them: a filter could be made
    blind to where ties fall in one kernel, and see those of another.
    """
    found = list(signatures(case, {name: estimate.rows for name, estimate in bounds.items()}, declared))
    found.sort(key=lambda one: one.is_legal)
    count = sum(not one.is_legal for one in found)
    shifts = {name: _finite(torch.stack([one.shifts[name] for one in found])) for name in bounds}  # [K, rows, columns]
    directions = {
        name: _finite(shift[:count] / (bounds[name].variance + _cast_variance(case, name, bounds[name])))
        for name, shift in shifts.items()
    }
    largest = torch.stack([direction.flatten(1).abs().amax(1) for direction in directions.values()]).amax(0)
    shown = largest > 0
    if not bool(shown.any()):
        return []
    directions = {name: direction[shown] / largest[shown].view(-1, 1, 1) for name, direction in directions.items()}
    sequences = {name: _sequence_of_judged_rows(case, name, bounds[name], sensitivity) for name in bounds}
    effects = sensitivity.effects(directions)
    # What each direction makes of each signature, by sequence.
    responses = torch.zeros(len(found), case.dims.batch, int(shown.sum()), dtype=torch.float64)
    for name, owners in sequences.items():
        responses.index_add_(1, owners, torch.einsum("krc,lrc->lrk", directions[name], shifts[name]))
    mistakes, wanted = [], []
    for signature, response, shows in zip(found, responses.unbind(0), shown.tolist(), strict=False):
        for mistake, sign in ((signature.mistake, 1), (signature.opposite, -1)):
            if mistake is not None and shows:
                mistakes.append(mistake)
                wanted.append(sign * response)
    targets, legal = torch.stack(wanted), responses[count:]
    combinations = _combinations(effects.covariances, targets, legal)
    # What looks like the mistake and is legal is for a single case an error like others.
    of_legal = torch.einsum("fbk,lbk->fl", combinations, legal).clamp_min(0).square().sum(1)
    # The covariances take sequences as independent, which they are not where they are rounded alike.
    unsigned, places = _without_sign(combinations)
    variances = torch.maximum(effects.variances_within(unsigned), effects.variances(unsigned))[places]
    deviations = (variances + of_legal).sqrt()
    expected = (combinations * targets).sum((1, 2)) / deviations
    shared = Directions({name: direction.float() for name, direction in directions.items()}, sequences, case.dims.batch)
    return [
        Filter(mistake, shared, combination / deviation, float(amount))
        for mistake, combination, deviation, amount in zip(mistakes, combinations, deviations, expected, strict=True)
        if 0 < float(deviation) < math.inf
    ]


def _combinations(covariances: torch.Tensor, targets: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """The best weights of K directions for each sequence, for each of F mistakes: ``[F, B, K]``.

    ``covariances [B, K, K]`` are those of the directions in correct kernels, ``targets [F, B, K]`` is what each makes of the
    mistakes, ``legal [., B, K]`` what it makes of things that a correct kernel does or not, in all sequences alike. One of these
    that looks like the mistake is a nuisance: its sum over the sequences has to vanish.
    """
    batch, count = covariances.shape[:2]
    combinations = torch.empty_like(targets)
    nuisances: list[frozenset[int]] = [frozenset()] * len(targets)
    pending = list(range(len(targets)))
    while pending:
        for chosen in {nuisances[number] for number in pending}:
            members = [number for number in pending if nuisances[number] == chosen]
            noise = covariances
            for one in sorted(chosen):
                noise = noise + batch * legal[one].unsqueeze(1) * legal[one].unsqueeze(2)
            size = noise.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-150)
            correlations = noise / size.unsqueeze(1) / size.unsqueeze(2) + RIDGE * torch.eye(count, dtype=torch.float64)
            solved = torch.linalg.solve(correlations, (targets[members] / size).permute(1, 2, 0))
            combinations[members] = solved.permute(2, 0, 1) / size
        looks_like = torch.einsum("fbk,lbk->fl", combinations, legal) > 0
        before = nuisances
        nuisances = [known | set(torch.nonzero(like).flatten().tolist()) for known, like in zip(before, looks_like, strict=True)]
        pending = [number for number in pending if nuisances[number] != before[number]]
    return combinations


def _without_sign(combinations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different ones, where one and its negative are the same (that of a mistake and of its opposite), and where each is."""
    flat = combinations.flatten(1)
    largest = flat.gather(1, flat.abs().argmax(1, keepdim=True))
    different, places = torch.unique(flat * largest.sign(), dim=0, return_inverse=True)
    return different.view(-1, *combinations.shape[1:]), places


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, in which what is no number or infinite is now zero."""
    return tensor.nan_to_num_(0.0, 0.0, 0.0)


def _cast_variance(case: Case, name: str, estimate: Bounds) -> torch.Tensor:
    """Of the last rounding of an output, to its own dtype."""
    return rounding_variance(spacing(estimate.value, case.stage.argument(name).dtype))


def _sequence_of_judged_rows(case: Case, name: str, estimate: Bounds, sensitivity: Sensitivity) -> torch.Tensor:
    """Which sequence each judged row of an output belongs to; they stand by layer, token and head, by token or by sequence."""
    if case.stage.argument(name).axes[0] == (case.dims.symbol("batch"),):
        return torch.arange(case.dims.batch)
    if estimate.rows is None:
        return sensitivity.sequences
    tokens, layers = len(sensitivity.sequences), case.dims.depth
    per_layer = sensitivity.sequences.repeat_interleave(len(estimate.rows) // (tokens * layers))
    return per_layer.repeat(layers)
