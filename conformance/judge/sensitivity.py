"""What each rounding inside a composite stage does to its outputs, to first order: docs/rule.md, Effective degrees of freedom."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch

from conformance.numerics.arithmetic import RoundingSites
from conformance.numerics.bounds import Bounds, Profile, rounding_variance
from conformance.numerics.ulp import spacing

if TYPE_CHECKING:
    from conformance.cases.case import Case

BF16 = torch.bfloat16
#: Random directions from which the correlation of a row's errors is estimated: 28 pairs, so to about a quarter.
PROBES = 8
#: The same for an area that is looked at by itself: 496 pairs, so to about a sixteenth. One of no more elements than
#: ``TOGETHER``, as a tile is, has the gradient of each of them instead.
PROBES_OF_ONE = 32
#: Weighted sums whose gradients are taken at a time, and the tokens of all of them, of a case of few.
TOGETHER = 16
TOKENS_TOGETHER = 512
#: Of a value's magnitude, its exponent and 12 bits: those that agree in them are rounded alike.
MAGNITUDE_BITS = 20

Count = TypeVar("Count", float, torch.Tensor)


@dataclasses.dataclass(frozen=True)
class Effects:
    """What one deviation away from zero at every rounding adds to K weighted sums of errors, ``values [K, roundings]``.

    Those of each sequence stand together, the first at ``starts``; what one sequence rounds alike is one rounding.
    ``groups [roundings]`` numbers those that are one rounding in all sequences, since their values are equal.
    """

    values: torch.Tensor
    starts: list[int]
    groups: torch.Tensor

    @functools.cached_property
    def covariances(self) -> torch.Tensor:
        """Of the sums, ``[B, K, K]``: each sequence by itself, as if none shared a rounding with another."""
        # In fp32, as the effects are: a filter adds a thousandth to the diagonal before it inverts them.
        parts = (self.values[:, low:high] for low, high in itertools.pairwise(self.starts))
        return torch.stack([part @ part.T for part in parts]).double()

    def variances_within(self, combinations: torch.Tensor) -> torch.Tensor:
        """Of F combinations of the sums, ``[F, B, K]``, others in every sequence, as if sequences shared no rounding."""
        return torch.einsum("fbk,bkl,fbl->f", combinations, self.covariances, combinations)

    def variances(self, combinations: torch.Tensor) -> torch.Tensor:
        """The same where roundings that sequences share are one."""
        within = self.variances_within(combinations)
        counts = torch.bincount(self.groups)
        shared = torch.nonzero(counts[self.groups] > 1).flatten()
        if not len(shared):
            return within
        _, groups = torch.unique(self.groups[shared], return_inverse=True)
        bounds = torch.searchsorted(shared, torch.tensor(self.starts)).tolist()
        size = combinations.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
        unit, values = (combinations / size).float(), self.values[:, shared].T.contiguous()
        together = torch.zeros(int(groups.max()) + 1, len(unit))
        apart = torch.zeros(len(unit), dtype=torch.float64)
        for weights, (low, high) in zip(unit.unbind(1), itertools.pairwise(bounds), strict=True):
            parts = values[low:high] @ weights.T
            together.index_add_(0, groups[low:high], parts)
            apart += parts.square().sum(0).double()
        return within + (together.square().sum(0).double() - apart) * size.flatten() ** 2


class Sensitivity:
    """What each rounding inside a composite stage does to its outputs, and the effective degrees of freedom of their errors.

    One rounding inside a layer moves many outputs at once, and many roundings may move them the same way (all those of a query
    change one score). With C the covariance of the scaled errors, their mean square scatters as that of
    ``trace(C)**2 / trace(C**2)`` independent ones. For vectors a, b of random signs the mean of ``(a C b)**2`` is
    ``trace(C**2)``, and ``a C b`` is the product of two gradients by the roundings.
    """

    def __init__(self, case: Case, bounds: dict[str, Bounds], profile: Profile) -> None:
        self._case, self._bounds = case, bounds
        arithmetic = RoundingSites(profile.roundings)
        results = case.stage.reference(case.inputs, case.dims, arithmetic)
        # The judged rows of each output, differentiable by the roundings.
        self._judged = {name: arithmetic.written(results[name], estimate.rows) for name, estimate in bounds.items()}
        self._zeros = [zero for zero, _, _ in arithmetic.sites]
        self._values = [site for _, site, _ in arithmetic.sites]
        self._owners = [sequence for _, _, sequence in arithmetic.sites]
        self._deviations = [rounding_variance(spacing(site.double(), BF16)).sqrt() for _, site, _ in arithmetic.sites]
        self._of_rows: dict[str, torch.Tensor] = {}
        self._of_elements: dict[tuple[str, int, int], float] = {}
        self._of_areas: dict[tuple[str, int | None, int | None, int | None, float], float] = {}

    def _scale(self, name: str) -> torch.Tensor:
        """One over the deviation of each of their elements."""
        estimate = self._bounds[name]
        return 1 / (estimate.variance + rounding_variance(spacing(estimate.value, BF16))).sqrt()

    def _probed(self, part: torch.Tensor, signs: torch.Generator) -> list[torch.Tensor | None]:
        """The effect of each site's roundings on a sum of a part's elements with random signs."""
        direction = torch.randint(0, 2, part.shape, generator=signs) * 2.0 - 1.0
        gradients = torch.autograd.grad((direction * part).sum(), self._zeros, retain_graph=True, allow_unused=True)
        return [
            None if gradient is None else gradient.double() * deviation
            for gradient, deviation in zip(gradients, self._deviations, strict=True)
        ]

    def element_variance(self, name: str, row: int, column: int) -> float:
        """The variance of an element's error, to first order."""
        place = name, row, column
        if place not in self._of_elements:
            gradients = torch.autograd.grad(self._judged[name][row, column], self._zeros, retain_graph=True, allow_unused=True)
            self._of_elements[place] = sum(
                float((gradient.double() * deviation).square().sum())
                for gradient, deviation in zip(gradients, self._deviations, strict=True)
                if gradient is not None
            )
        return self._of_elements[place]

    def _effects(self, weights: Mapping[str, torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """What one deviation away from zero at each value of each site adds to weighted sums of all outputs' judged rows.

        These are vector-Jacobian products, scaled.

        ``weights`` has K for every element, ``[K, rows, columns]``. Yields the effects on some of the K sums, ``[.., values]`` of
        each site, then on the next.
        """
        judged = [self._judged[name] for name in weights]

        # The graph is of many small operators: several sums at a time take little longer than one.
        def gradients(each: list[torch.Tensor]) -> list[torch.Tensor]:
            found = torch.autograd.grad(judged, self._zeros, each, retain_graph=True, materialize_grads=True)
            return [(gradient * outwards).flatten() for gradient, outwards in zip(found, self._outwards, strict=True)]

        several = torch.func.vmap(gradients)
        together = max(TOGETHER, TOKENS_TOGETHER // len(self.sequences))
        for some in zip(*(torch.split(weight.float(), together) for weight in weights.values()), strict=True):
            yield several(list(some))

    @functools.cached_property
    def _outwards(self) -> list[torch.Tensor]:
        signed = zip(self._values, self._deviations, strict=True)
        return [(deviation * value.sign()).float() for value, deviation in signed]

    @functools.cached_property
    def _magnitudes(self) -> list[torch.Tensor]:
        """Of each site's values to 12 bits: those that agree are rounded alike, and their errors add up."""
        return [(value.abs().contiguous().view(torch.int32) >> 31 - MAGNITUDE_BITS).flatten() for value in self._values]

    @functools.cached_property
    def _rounding_groups(self) -> list[torch.Tensor]:
        """For each site which of its values are rounded alike; where its rows have an owner, within a sequence."""
        found = []
        for magnitudes, value, owner in zip(self._magnitudes, self._values, self._owners, strict=True):
            owned = 0 if owner is None else (owner << 32).repeat_interleave(value.numel() // len(value))
            found.append(torch.unique(magnitudes + owned, return_inverse=True)[1])
        return found

    def variances_of_sums(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The variances of K weighted sums of the errors of all outputs' judged rows, to first order."""
        return torch.cat(
            [sum((part.square().sum(1) for part in parts), torch.zeros(())) for parts in self._effects_of_groups(weights)]
        )

    def _effects_of_groups(self, weights: Mapping[str, torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """The effects of the values of each site, float64; of those that are rounded alike as one."""
        for effects in self._effects(weights):
            yield [
                torch.zeros(len(effect), int(alike.max()) + 1, dtype=torch.float64).index_add_(1, alike, effect.double())
                for effect, alike in zip(effects, self._rounding_groups, strict=True)
            ]

    def effects(self, directions: Mapping[str, torch.Tensor]) -> Effects:
        """On K weighted sums of errors. ``directions`` has the weights of each output's judged rows, ``[K, rows, columns]``."""
        # Values of one sequence that are rounded alike are one column, the columns of each sequence stand together.
        order, places, groups, width, known = [], [], [], 0, 0
        kind = torch.int32 if self._case.dims.batch <= 1 << 31 - MAGNITUDE_BITS else torch.int64  # is sorted twice as fast
        for magnitudes, value, owner in zip(self._magnitudes, self._values, self._owners, strict=True):
            owners = self.sequence_of_rows(value) if owner is None else owner
            own = (owners.to(kind) << MAGNITUDE_BITS).repeat_interleave(value.numel() // len(value)) + magnitudes
            found, inverse = torch.unique(own, return_inverse=True)
            # Those of a site whose rows have an owner are never alike in two sequences.
            _, alike = torch.unique(found & (1 << MAGNITUDE_BITS) - 1 if owner is None else found, return_inverse=True)
            order.append(found >> MAGNITUDE_BITS)
            groups.append(alike + known)
            places.append(inverse + width)
            width, known = width + len(found), known + int(alike.max()) + 1
        sorted_order, columns = torch.cat(order).sort(stable=True)
        starts = torch.searchsorted(sorted_order, torch.arange(self._case.dims.batch + 1)).tolist()
        position = torch.empty_like(columns)
        position[columns] = torch.arange(width)
        places = [position[place] for place in places]
        summed = torch.zeros(len(next(iter(directions.values()))), width)
        done = 0
        for some in self._effects(directions):
            together = summed[done : done + len(some[0])]
            done += len(together)
            for effect, place in zip(some, places, strict=True):
                together.scatter_add_(1, place.expand_as(effect), effect)
        return Effects(summed, starts, torch.cat(groups)[columns])

    def sequence_of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Which sequence each row of a tensor with one row a token, or one a sequence, belongs to.

        Where every sequence brings one token, in another order, rows of the final norm are taken for those of tokens: a filter is
        less than the best then. What it finds is held against its deviation without regard to sequences (``along``).
        """
        if len(rows) == len(self.sequences):
            return self.sequences
        return torch.arange(self._case.dims.batch)

    @functools.cached_property
    def sequences(self) -> torch.Tensor:
        """Which sequence each token of the case belongs to."""
        case = self._case
        return torch.arange(case.dims.batch) if case.stage.sequences is None else case.stage.sequences(case.inputs, case.dims)

    def degrees_of_freedom_of_rows(self, name: str) -> torch.Tensor:
        """The effective degrees of freedom of each judged row of an output, to about a quarter; one at least.

        Sequences do not touch one another: one backward pass serves a row of each of them.
        """
        if name in self._of_rows:
            return self._of_rows[name]
        case = self._case
        signs = torch.Generator().manual_seed(0)
        sequences = self.sequences
        rounds = [torch.nonzero(_place_in_sequence(sequences) == place).flatten() for place in range(len(sequences))]
        # Rows stand by layer, token and head, as in a cache.
        judged = self._bounds[name].rows
        heads = 1 if judged is None else len(judged) // (len(sequences) * case.dims.depth)
        scaled = self._judged[name] * self._scale(name).float()
        scaled = scaled.reshape(-1, len(sequences), heads, scaled.shape[-1])
        counts = torch.empty(scaled.shape[:3], dtype=torch.float64)
        for layer, head, tokens in itertools.product(range(scaled.shape[0]), range(heads), filter(len, rounds)):
            rows = scaled[layer, tokens, head]
            probes = []
            for _ in range(PROBES):
                parts: dict[int, list[torch.Tensor]] = {b: [] for b in sequences[tokens].tolist()}
                for effect, owner in zip(self._probed(rows, signs), self._owners, strict=True):
                    if effect is None:
                        continue
                    owners = sequences if owner is None else owner
                    for b, part in parts.items():
                        part.append(effect.reshape(len(owners), -1)[owners == b].flatten())
                probes.append({b: torch.cat(part) for b, part in parts.items()})
            for token in tokens.tolist():
                effects = torch.stack([probe[int(sequences[token])] for probe in probes])
                second, _ = _estimated_moments(effects @ effects.T)
                counts[layer, token, head] = 1 / max(second, 1e-300)
        self._of_rows[name] = counts.flatten().clamp_min(1)
        return self._of_rows[name]

    def degrees_of_freedom(self, name: str, row: int | None, columns: slice, sigmas: float) -> float:
        """The effective degrees of freedom of the mean square of errors in some columns of one judged row, or of all.

        So many equal independent errors have a mean square that reaches as far at ``sigmas`` standard deviations. Where one
        rounding holds a good part of all variance that is further than the variance tells.
        """
        place = name, row, columns.start, columns.stop, sigmas
        if place not in self._of_areas:
            scale = self._scale(name)
            part = torch.zeros(scale.shape, dtype=torch.bool)
            part[slice(None) if row is None else row, columns] = True
            count = int(part.sum())
            if exact := count <= TOGETHER:
                directions = torch.eye(count)
            else:
                signs = torch.Generator().manual_seed(row or 0)
                directions = torch.randint(0, 2, (PROBES_OF_ONE, count), generator=signs) * 2.0 - 1.0
            weights = torch.zeros(len(directions), *scale.shape)
            weights[:, part] = directions * scale[part].float()
            of_sites = zip(*self._effects_of_groups({name: weights}), strict=True)
            products = sum((effect @ effect.T for effect in map(torch.cat, of_sites)), torch.zeros(()))
            self._of_areas[place] = max(
                1.0, _matching_degrees_of_freedom(*(_moments if exact else _estimated_moments)(products), sigmas)
            )
        return self._of_areas[place]


def _moments(covariance: torch.Tensor) -> tuple[float, float]:
    """Sums of the squares and of the cubes of the eigenvalues, as parts of their sum."""
    parts = covariance / covariance.trace().clamp_min(1e-300)
    square = parts @ parts
    return float(square.trace()), float((square * parts).sum())


def _estimated_moments(products: torch.Tensor) -> tuple[float, float]:
    """The same from the products of probes' effects: pairs and triples of different ones."""
    count, size = len(products), products.diagonal().mean().clamp_min(1e-300)
    pairs = (products - products.diagonal().diag()) / size
    second = float((pairs**2).sum()) / (count * (count - 1))
    third = float((pairs @ pairs * pairs).sum()) / (count * (count - 1) * (count - 2))
    return second, min(max(third, second**2), second**1.5)  # what a sum of positive parts can have


def _matching_degrees_of_freedom(second: float, third: float, sigmas: float) -> float:
    """How many equal independent errors have a mean square that reaches as far, at ``sigmas`` deviations.

    As far as errors whose covariance has these moments (``_moments``): those of a shifted chi-square of the same variance and
    skewness (Pearson), its quantiles by Wilson and Hilferty.
    """
    if second <= 0 or third <= 0:
        return math.inf
    count = second**3 / third**2
    reach = 1 + math.sqrt(second * count) * (chi_square_mean(count, sigmas) - 1)
    # Wilson and Hilferty's formula, solved for the count.
    rise = reach ** (1 / 3) - 1
    root = (sigmas - math.sqrt(max(sigmas**2 - 4 * rise, 0.0))) / 2
    return 2 / (9 * root**2)


def chi_square_mean(count: Count, sigmas: float) -> Count:
    """How far the mean of ``count`` squares of independent errors reaches at ``sigmas`` deviations (Wilson and Hilferty)."""
    variance = 2 / (9 * count)
    return (1 - variance + sigmas * variance**0.5) ** 3  # type: ignore[no-any-return, return-value]


def _place_in_sequence(sequences: torch.Tensor) -> torch.Tensor:
    """For every row how many rows before it belong to the same sequence."""
    same = sequences.unsqueeze(0) == sequences.unsqueeze(1)
    return same.tril(-1).sum(1)
