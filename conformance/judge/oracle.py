"""What a correct kernel may return for one case: bounds, sensitivities and matched filters, computed once and kept."""

from __future__ import annotations

import dataclasses
import math

import torch

from conformance.cases.case import Case
from conformance.judge import limits
from conformance.judge.matched_filters import Filter, filters
from conformance.judge.sensitivity import Sensitivity
from conformance.numerics.bounds import Bounds, Profile

BF16 = torch.bfloat16
#: The inputs that a profile rounds, and the places that it declares to round.
_Declared = tuple[frozenset[str], frozenset[str]]


class Oracle:
    """What a correct kernel may return for one case, by profile; computed when first asked for and kept."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._bounds: dict[str, dict[str, Bounds]] = {}
        self._cases: dict[frozenset[str], Case] = {frozenset(): case}
        self._sensitivity: dict[_Declared, Sensitivity] = {}
        self._filters: dict[_Declared, list[Filter]] = {}

    def bounds(self, profile: Profile) -> dict[str, Bounds]:
        """Bounds of every output under a profile."""
        if profile.name not in self._bounds:
            case = self.case_of(profile)
            self._bounds[profile.name] = case.stage.error_model(case.inputs, case.dims, profile)
        return self._bounds[profile.name]

    def case_of(self, profile: Profile) -> Case:
        """The case as a kernel of this profile sees it: with the inputs that it rounds rounded."""
        names = profile.inputs
        if names not in self._cases:
            rounded = {name: self.case.inputs[name].to(BF16).to(self.case.inputs[name].dtype) for name in names}
            self._cases[names] = dataclasses.replace(self.case, inputs={**self.case.inputs, **rounded})
        return self._cases[names]

    def independent_errors(self, argument: str, profile: Profile) -> torch.Tensor:
        """Per row of a composite stage's output, how many independent errors its scaled errors amount to."""
        return self._sensitive(profile).degrees_of_freedom_of_rows(argument)

    def independent_in_row(self, argument: str, profile: Profile, row: int) -> float:
        """The same of one judged row, counted more exactly."""
        return self._sensitive(profile).degrees_of_freedom(argument, row, slice(None), limits.SPREAD_SIGMAS)

    def independent_in_all_rows(self, argument: str, profile: Profile, columns: slice) -> float:
        """The same of some columns of all judged rows: those of one token share errors from layer to layer."""
        return self._sensitive(profile).degrees_of_freedom(argument, None, columns, limits.SPREAD_SIGMAS)

    def independent_in_tile(self, argument: str, profile: Profile, row: int, columns: slice) -> float:
        """The same of some columns of one judged row: a few roundings may steer a tile that do little to the rest of its row."""
        return self._sensitive(profile).degrees_of_freedom(argument, row, columns, limits.SPREAD_SIGMAS)

    def element_variance(self, argument: str, profile: Profile, row: int, column: int) -> float:
        """The variance of one judged element's error, from each rounding's own effect on it."""
        return self._sensitive(profile).element_variance(argument, row, column)

    def filters(self, profile: Profile) -> list[Filter]:
        """What shows known mistakes in a composite stage's outputs; shared by profiles as the sensitivities are."""
        declared = profile.inputs, profile.declared
        if declared not in self._filters:
            case = self.case_of(profile)
            self._filters[declared] = filters(case, self.bounds(profile), self._sensitive(profile), profile.declared)
        return self._filters[declared]

    def deviation_along(self, weights: dict[str, torch.Tensor], profile: Profile) -> float:
        """The deviation of a weighted sum of the errors of all judged rows."""
        (variance,) = self._sensitive(profile).variances_of_sums({name: weight.unsqueeze(0) for name, weight in weights.items()})
        return math.sqrt(variance)

    def _sensitive(self, profile: Profile) -> Sensitivity:
        # One for all profiles of a composite stage that declare the same: they differ in where a norm's division stands, not in
        # what is rounded.
        declared = profile.inputs, profile.declared
        if declared not in self._sensitivity:
            self._sensitivity[declared] = Sensitivity(self.case_of(profile), self.bounds(profile), profile)
        return self._sensitivity[declared]
