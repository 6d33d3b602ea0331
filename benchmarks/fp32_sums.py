"""How far sums in fp32 are off, in the deviations that ``bounds`` gives them: ``python -m benchmarks.fp32_sums``; ten seconds.

Products of bf16 values, which fp32 holds exactly, are added in four orders, for the depths of Qwen3-14B's projections and less.
Each line tells the root of the mean square of the error over its deviation, and the largest. The constants are right where the
most careless order comes up to 1, and no higher: ``constants.md``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from conformance.numerics import bounds

Floats = npt.NDArray[np.float32]

DEPTHS = (64, 640, 5120, 17408)
ROWS, COLUMNS = 8, 24


def one_by_one(terms: Floats) -> Floats:
    """Each term onto the sum so far."""
    total: Floats = np.add.accumulate(terms, axis=0, dtype=np.float32)[-1]
    return total


def chunks(terms: Floats) -> Floats:
    """Sixteen pieces one by one, and their sums one by one: splits of K."""
    return one_by_one(np.stack([one_by_one(part) for part in np.array_split(terms, 16)]))


def lanes(terms: Floats) -> Floats:
    """Every sixteenth term one by one, and these sums pairwise: a vector register."""
    return pairwise(np.stack([one_by_one(terms[lane::16]) for lane in range(16)]))


def pairwise(terms: Floats) -> Floats:
    """Neighbours, then sums of neighbours: a tree."""
    while len(terms) > 1:
        if len(terms) % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[:1])])
        terms = terms[0::2] + terms[1::2]
    total: Floats = terms[0]
    return total


ORDERS: tuple[Callable[[Floats], Floats], ...] = (one_by_one, chunks, lanes, pairwise)


def data(depth: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Activations and weights in bf16, by what they are like."""
    draw = torch.Generator().manual_seed(depth)
    x, weight = torch.randn(ROWS, depth, generator=draw), torch.randn(depth, COLUMNS, generator=draw)
    outliers = torch.where(torch.arange(depth) % 50 == 0, 100.0, 1.0)
    kinds = {
        "signs mixed": (x, weight),
        "all positive": (x.abs(), weight.abs()),
        "a few rule": (x * outliers, weight),
        "equal": (x[:, :1].expand(-1, depth), weight),
        "equal and positive": (x[:, :1].abs().expand(-1, depth), weight.abs()),
    }
    return {name: (activations.bfloat16(), weights.bfloat16()) for name, (activations, weights) in kinds.items()}


def main() -> None:
    print(f"{'depth':>6} {'activations':20}" + "".join(f"{order.__name__.replace('_', ' '):>16}" for order in ORDERS))
    for depth in DEPTHS:
        for kind, (x, weight) in data(depth).items():
            estimate = bounds.projection(bounds.exact(x), weight)
            terms = (x.float().unsqueeze(2) * weight.float().unsqueeze(0)).numpy()
            line = f"{depth:>6} {kind:20}"
            for order in ORDERS:
                found = torch.from_numpy(np.stack([order(row) for row in terms]).astype(np.float64))
                scaled = (found - estimate.value) / estimate.variance.sqrt()
                line += f"{float(scaled.square().mean().sqrt()):>9.2f} {float(scaled.abs().max()):>6.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
