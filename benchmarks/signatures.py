"""How far known mistakes inside a layer stand out of rounding noise, in standard deviations: ``python -m benchmarks.signatures``.

Three ways to weigh the errors of all outputs, side by side on one case: by the shift that a mistake makes over each element's
variance, as if errors were independent; as ``matched_filters.py`` does; and the best there is, with the covariance of all
elements of a sequence.
"""

from __future__ import annotations

import math
import time

import torch

from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.judge.limits import SIGNATURE_SIGMAS
from conformance.judge.matched_filters import RIDGE, filters, signatures
from conformance.judge.oracle import Oracle
from conformance.judge.sensitivity import Sensitivity

CASE = "decode_layer:tiny:B=6,seq_lens=17+80+16+71+1+128:normal:7"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    case = make_case(CaseKey.parse(CASE))
    profile = case.stage.profiles[0]
    bounds = Oracle(case).bounds(profile)
    began = time.perf_counter()
    sensitivity = Sensitivity(case, bounds, profile)
    used = {one.mistake: one.expected for one in filters(case, bounds, sensitivity)}
    ours = time.perf_counter() - began
    began = time.perf_counter()
    directions = unit_directions({name: one.value for name, one in bounds.items()}, case.dims.B)
    covariance = sensitivity.effects(directions).covariances
    size = covariance.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-150)
    correlation = covariance / size.unsqueeze(1) / size.unsqueeze(2) + RIDGE * torch.eye(size.shape[1], dtype=torch.float64)
    found = list(signatures(case, {name: one.rows for name, one in bounds.items()}))
    shifts = [torch.cat([shift.reshape(case.dims.B, -1) for shift in one.shifts.values()], 1) / size for one in found]
    best = [math.sqrt(float((shift * torch.linalg.solve(correlation, shift)).sum())) for shift in shifts]
    whole = time.perf_counter() - began
    print(f"{CASE}\n{'mistake':72}{'independent':>12}{'used':>8}{'best':>8}")
    ratios = []
    for one, shift, most in zip(found, shifts, best, strict=True):
        if one.mistake not in used or most < 1:
            continue
        variance = float((shift.unsqueeze(1) @ (correlation - RIDGE * torch.eye(size.shape[1])) @ shift.unsqueeze(2)).sum())
        alone = float(shift.square().sum()) / math.sqrt(variance)
        ratios.append((used[one.mistake] / alone, used[one.mistake] / most))
        print(f"{one.mistake:72}{alone:12.1f}{used[one.mistake]:8.1f}{most:8.1f}")
    over, under = (torch.tensor(column).log().mean().exp() for column in zip(*ratios, strict=True))
    print(f"used: {over:.2f} times the first, {under:.2f} times the best, at {ours / whole:.2f} of its time ({ours:.1f} s)")
    print(f"told from {SIGNATURE_SIGMAS:g} deviations on")


def unit_directions(values: dict[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
    """A direction for every element that a sequence has in the outputs, in all of them; rows stand by sequence."""
    sizes = {name: value.numel() // batch for name, value in values.items()}
    count, first, directions = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        own = torch.zeros(count, batch, size, dtype=torch.float64)
        own[first : first + size] = torch.eye(size, dtype=torch.float64).unsqueeze(1)
        directions[name] = own.view(count, *values[name].shape)
        first += size
    return directions


if __name__ == "__main__":
    main()
