"""Spread and bias: errors that are each small enough, and together impossible: docs/rule.md, Spread, and docs/rule.md, Bias."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from conformance.cases.case import Case
from conformance.judge import limits
from conformance.judge.limits import spread_limit
from conformance.judge.oracle import Oracle
from conformance.judge.outputs import NumericFindings, OutputPart
from conformance.judge.verdict import Finding
from conformance.judge.wording import area_in_words, place_in_words, place_of_area
from conformance.numerics import bounds as error_bounds
from conformance.numerics.bounds import Bounds, Profile
from conformance.numerics.ulp import rounded, spacing

#: A row, or all, and the columns from one to before another.
_Place = tuple[int | None, int, int]


@dataclasses.dataclass(frozen=True)
class _Area:
    """A part of an output (``row`` is one, or all).

    The mean square of its scaled errors, how many independent ones these amount to (effective degrees of freedom), and the mean
    square as a share of its limit.
    """

    share: float
    row: int | None
    columns: slice
    mean_square: float
    degrees_of_freedom: float
    is_tile: bool

    @property
    def place(self) -> _Place:
        """Where it is."""
        return self.row, self.columns.start, self.columns.stop


@dataclasses.dataclass(frozen=True)
class _GroupBias:
    """The mean square of the z-scores of groups of columns, its limit, and the place of the worst group."""

    mean_square: float
    limit: float
    degrees_of_freedom: float
    worst: int

    @property
    def share(self) -> float:
        """The mean square as a share of its limit."""
        return self.mean_square / self.limit


class Statistics:
    """Spread and bias of one output: errors that are each small enough, and together impossible."""

    def __init__(
        self,
        case: Case,
        oracle: Oracle,
        profile: Profile,
        part: OutputPart,
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
        # One group if a row is not made of several, such as heads.
        lanes = part.argument.group_width(case.dims)
        self.groups = magnitudes.shape[1] // lanes
        self.distinct_in_group = _count_distinct(magnitudes.view(len(magnitudes), self.groups, lanes))
        padded = torch.nn.functional.pad(magnitudes, (0, -magnitudes.shape[1] % limits.TILE), value=-1)
        self.distinct_in_tile = _count_distinct(padded.view(len(magnitudes), -1, limits.TILE))
        # So are those of rows that repeat one another: per column, which part of the values down the rows are different.
        self.different_rows = _count_distinct(magnitudes.T).double() / len(magnitudes)
        # A constant row rounds the same way everywhere: nothing averages out in it.
        self.counted = counted & (self.distinct >= limits.FEWEST_DISTINCT).unsqueeze(1)
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

    def spread(self, result: NumericFindings) -> float:
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
            area = self._area_of_exact_count(square, area) if composite else self._worst_area(square, self.independent, {})
        worst = area.share
        if worst > 1:
            row, columns, mean = area.row, area.columns, area.mean_square
            argument = self.part.argument
            index, where = place_of_area(self.case, self.part, row, columns, square.shape[1])
            where_it_is = area_in_words(self.part, row, columns, square.shape[1])
            result.wrong += 1
            result.findings.append(
                Finding(
                    "spread",
                    f"errors of {argument.name} in {where_it_is} are too large together: their RMS is {math.sqrt(mean):.3g} "
                    f"times the standard deviation of legal rounding, limit {math.sqrt(mean / worst):.3g} "
                    f"({area.degrees_of_freedom:.3g} effective degrees of freedom)",
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

    def _area_of_exact_count(self, square: torch.Tensor, area: _Area) -> _Area:
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
            if looks == limits.MOST_AREAS:
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
        padded = -columns % limits.TILE
        counted = torch.nn.functional.pad(self.counted, (0, padded)).view(rows, -1, limits.TILE)
        tiles = torch.nn.functional.pad(square, (0, padded)).view(rows, -1, limits.TILE).sum(-1)
        counts = counted.sum(-1).double()
        # Alike values within a tile count once. What the errors of a row share besides, a part of the row shares too: 1 / n
        # rises by as much there.
        row_counts = counts.sum(1)
        row_distinct = torch.minimum(row_counts, self.distinct.double())
        common = (1 / independent - 1 / row_distinct).clamp_min(0)
        in_row = 1 / (1 / row_distinct + common)
        in_tile = 1 / (1 / torch.minimum(counts, self.distinct_in_tile.double()) + common.unsqueeze(1))
        different = self.different_rows
        different_in_tile = torch.stack([part.mean() for part in torch.split(different, limits.TILE)])
        in_all = (in_row.sum() * different.mean()).view(1, 1)
        in_column = in_tile.sum(0, keepdim=True) * different_in_tile
        for (row, start, stop), fewer in alone.items():
            if row is not None:
                in_tile[row, start // limits.TILE].clamp_(max=fewer)
                continue
            if stop - start == columns:
                in_all.clamp_(max=fewer)
            if stop - start <= limits.TILE:
                in_column[0, start // limits.TILE].clamp_(max=fewer)
        areas = (
            (tiles.sum().view(1, 1), row_counts.sum().view(1, 1), in_all),
            (tiles.sum(1, keepdim=True), row_counts.view(-1, 1), in_row.view(-1, 1)),
            (tiles, counts, in_tile),
            (tiles.sum(0, keepdim=True), counts.sum(0, keepdim=True), in_column),
        )
        best = _Area(0.0, None, slice(0, columns), 0.0, 0.0, False)
        for kind, (total, count, effective) in enumerate(areas):
            mean = total / count.clamp_min(1)
            share = mean / spread_limit(effective)
            flat = int(share.argmax())
            if float(share.flatten()[flat]) > best.share:
                row, tile = divmod(flat, share.shape[1])
                whole_row = kind in (0, 1)
                part = slice(0, columns) if whole_row else slice(tile * limits.TILE, min(columns, (tile + 1) * limits.TILE))
                of_row = row if kind in (1, 2) else None
                here = (float(values.flatten()[flat]) for values in (share, mean, effective))
                best = _Area(next(here), of_row, part, next(here), next(here), kind == 2)
        return best

    def bias(self, result: NumericFindings) -> float:
        """The signed sum of scaled errors, for each row and the tensor: truncation, or a factor that is slightly off.

        Also the squares of those of groups of columns, such as heads: a factor that is off in each group by another amount, such
        as a rounded denominator of softmax, makes some too large and others too small, and a row as a whole neither.
        """
        offset = rounded(self.value, self.part.argument.dtype) - self.value
        tie = (offset.abs() - self.ulp / 2).abs() < limits.TIE_ULPS * self.ulp
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
        allowed = torch.cat(
            [
                limits.BIAS_SIGMAS * variance.sqrt(),
                limits.BIAS_SIGMAS * (variance.sum() / self.different_rows.mean()).sqrt().view(1),
            ]
        )
        allowed = allowed + limits.BIAS_SLACK * torch.cat([counts, counts.sum().view(1)])
        share = torch.where(allowed > 0, sums.abs() / allowed.clamp_min(1e-300), torch.zeros_like(sums))
        worst = int(share.argmax())
        amount = float(share[worst])
        by_group = self._group_bias(signed, counted, variance) if self.groups > 1 else None
        of_groups = 0.0 if by_group is None else by_group.share
        if by_group is not None and of_groups > max(amount, 1):
            self._found_group_bias(by_group, counted, result)
        elif amount > 1:
            argument = self.part.argument
            row = worst if worst < len(counts) else None
            columns, width = slice(0, self.value.shape[1]), self.value.shape[1]
            index, where = place_of_area(self.case, self.part, row, columns, width)
            area = area_in_words(self.part, row, columns, width)
            lean = "too large" if float(sums[worst]) > 0 else "too small"
            number = int(torch.cat([counts, counts.sum().view(1)])[worst])
            mean = float(sums[worst]) / number
            result.wrong += 1
            result.findings.append(
                Finding(
                    "bias",
                    f"magnitudes of {argument.name} in {area} are {lean} on average: mean error {abs(mean):.3g} standard "
                    f"deviations of legal rounding, limit {abs(mean) / amount:.3g} ({number} elements); typical of truncation, "
                    "or of a constant factor slightly off",
                    argument.name,
                    index,
                    where,
                    share=amount,
                    count=int(counted.sum()),
                    total=counted.numel(),
                )
            )
        return max(amount, of_groups)

    def _group_bias(self, signed: torch.Tensor, counted: torch.Tensor, row_variance: torch.Tensor) -> _GroupBias:
        """The mean square of the groups' signed sums, each over its deviation."""
        by_group = len(signed), self.groups, -1
        counts = counted.view(by_group).sum(-1).double()
        variance = counts * (counts / torch.minimum(self.distinct_in_group.double(), counts).clamp_min(1))
        correlation = self.estimate.correlation
        if correlation is not None and correlation.head_variance is not None:
            variance = torch.maximum(variance, correlation.head_variance)
        bias = (signed.view(by_group).sum(-1).abs() - limits.BIAS_SLACK * counts).clamp_min(0)
        some = counts > 0
        square = torch.where(some, bias**2 / variance.clamp_min(1e-300), 0.0)
        # Groups whose errors are one and the same make their row's sum vary by more than theirs add up to.
        together = (row_variance / torch.where(some, variance, 0.0).sum(1).clamp_min(1e-300)).clamp_min(1)
        independent = (some.sum(1) / together).sum() * self.different_rows.mean()
        mean = square.sum() / some.sum().clamp_min(1)
        return _GroupBias(float(mean), float(spread_limit(independent)), float(independent), int(square.argmax()))

    def _found_group_bias(self, found: _GroupBias, counted: torch.Tensor, result: NumericFindings) -> None:
        argument = self.part.argument
        index = self.part.index(found.worst * (counted.shape[1] // self.groups))
        where = argument.where(index[-len(argument.size(self.case.dims)) :], self.case.dims)
        result.wrong += 1
        result.findings.append(
            Finding(
                "bias",
                f"magnitudes of {argument.name} are biased group by group, some too large, some too small: mean square of the "
                f"groups' z-scores {found.mean_square:.3g}, limit {found.limit:.3g} ({found.degrees_of_freedom:.3g} effective "
                f"degrees of freedom), worst at {place_in_words(where)}; typical of a factor of each group's own that is "
                "slightly off, such as a rounded softmax denominator",
                argument.name,
                index,
                where,
                share=found.share,
                count=int(counted.sum()),
                total=counted.numel(),
            )
        )


def _count_distinct(rows: torch.Tensor) -> torch.Tensor:
    """How many different values there are along the last axis."""
    ordered = rows.sort(-1).values
    return (ordered[..., 1:] != ordered[..., :-1]).sum(-1) + 1
