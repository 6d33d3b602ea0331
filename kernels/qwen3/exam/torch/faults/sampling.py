"""Faults of greedy sampling, and the search by tiles that some of them, and some right kernels, are made of."""

from __future__ import annotations

import math

import torch

from conformance.kernels.qwen3.exam.torch.helpers import FP16, rounded
from conformance.kernels.qwen3.exam.torch.hooks import fault
from conformance.kernels.qwen3.exam.torch.operations import BF16

Tensor = torch.Tensor

#: Columns that are looked at together.
SCAN_TILE = 48


def argmax_by_tiles(logits: Tensor, *, start: float = -math.inf, wins_ties: bool = False, backward: bool = False) -> int:
    """The index of the largest of ``logits[V]``, found tile by tile, from the last one if ``backward``.

    The lowest of equal ones, unless ``wins_ties``. The running maximum starts at ``start``: where none is larger the index is 0.
    """
    best, best_index = start, 0
    starts = range(0, len(logits), SCAN_TILE)
    for first in reversed(starts) if backward else starts:
        tile = logits[first : first + SCAN_TILE]
        place = int(tile.argmax())
        largest = float(tile[place])
        if largest > best or ((backward or wins_ties) and largest == best):
            best, best_index = largest, first + place
    return best_index


# Greedy sampling


def _first_of_the_largest(logits: Tensor) -> int:
    return int((logits == logits.max()).nonzero()[0])


@fault("argmax", "precision", "greedy_sample")
def index_in_8_bits(logits: Tensor) -> int:
    """The index is carried in eight bits."""
    return _first_of_the_largest(logits) % 256


@fault("argmax", "precision", "greedy_sample")
def index_in_bf16(logits: Tensor) -> int:
    """The index is carried as a bf16 number, which has no odd ones above 256."""
    return int(torch.tensor(float(_first_of_the_largest(logits))).to(BF16))


@fault("argmax", "precision", "greedy_sample")
def logits_in_fp16(logits: Tensor) -> int:
    """Logits are compared in fp16."""
    return _first_of_the_largest(logits.to(FP16))


@fault("argmax", "value", "greedy_sample")
def smallest_logit(logits: Tensor) -> int:
    """The index of the smallest logit."""
    return _first_of_the_largest(-logits)


@fault("argmax", "value", "greedy_sample")
def largest_magnitude(logits: Tensor) -> int:
    """The index of the largest magnitude."""
    return _first_of_the_largest(logits.abs())


@fault("argmax", "value", "greedy_sample")
def second_largest(logits: Tensor) -> int:
    """The index of the second largest logit."""
    return int(logits.topk(2).indices[1])


@fault("argmax", "unwritten", "greedy_sample")
def last_column_ignored(logits: Tensor) -> int:
    """The last column does not take part."""
    return _first_of_the_largest(logits[:-1])


@fault("argmax", "unwritten", "greedy_sample")
def first_column_ignored(logits: Tensor) -> int:
    """The first column does not take part."""
    return _first_of_the_largest(logits[1:]) + 1


@fault("argmax", "unwritten", "greedy_sample")
def second_half_ignored(logits: Tensor) -> int:
    """Only the first half of the vocabulary takes part."""
    return _first_of_the_largest(logits[: len(logits) // 2])


@fault("argmax", "dependency", "greedy_sample")
def winner_of_the_last_tile(logits: Tensor) -> int:
    """The running maximum is not carried from tile to tile."""
    start = (len(logits) - 1) // 64 * 64
    return start + _first_of_the_largest(logits[start:])


@fault("argmax", "indexing", "greedy_sample")
def tile_counted_as_64(logits: Tensor) -> int:
    """Tiles of 48 columns are counted as 64."""
    index = _first_of_the_largest(logits)
    return index // 48 * 64 + index % 48


@fault("argmax", "value", "greedy_sample")
def winner_of_probabilities(logits: Tensor) -> int:
    """The largest probability is looked for, where several round to the same."""
    return _first_of_the_largest(torch.softmax(logits, 0))


@fault("argmax", "dependency", "greedy_sample")
def any_of_equal_logits(logits: Tensor) -> int:
    """Of equal logits whichever thread is last wins."""
    places = (logits == logits.max()).nonzero().flatten().tolist()
    return int(places[len(places) // 2])


@fault("argmax", "robustness", "greedy_sample")
def winner_above_zero_only(logits: Tensor) -> int:
    """Negative logits are taken for padding."""
    return _first_of_the_largest(torch.where(logits < 0, -torch.inf, logits)) if bool((logits >= 0).any()) else 0


@fault("argmax", "value", "greedy_sample")
def highest_index_on_a_tie(logits: Tensor) -> int:
    """Of equal logits the last one wins."""
    return len(logits) - 1 - int(logits.flip(0).argmax())


@fault("argmax", "value", "greedy_sample")
def tie_goes_to_the_next_tile(logits: Tensor) -> int:
    """A later tile wins a tie: its maximum is compared with >=."""
    return argmax_by_tiles(logits, wins_ties=True)


@fault("argmax", "precision", "greedy_sample")
def compared_in_bf16(logits: Tensor) -> int:
    """Logits are compared in bf16."""
    return int(rounded(logits, BF16).argmax())


@fault("argmax", "indexing", "greedy_sample")
def padded_column_wins(logits: Tensor) -> int:
    """A padded column that holds zero takes part in the maximum."""
    return int(torch.cat([logits, torch.zeros(1)]).argmax())


@fault("argmax", None, "greedy_sample", name="maximum_starts_at_zero")
def maximum_of_logits_starts_at_zero(logits: Tensor) -> int:
    """The running maximum starts at zero, and a row of negative logits has no winner."""
    return argmax_by_tiles(logits, start=0.0)


@fault("argmax", "value", "greedy_sample")
def maximum_starts_at_minus_10(logits: Tensor) -> int:
    """The running maximum starts at -10, and a row of lower logits has no winner."""
    return argmax_by_tiles(logits, start=-10.0)


@fault("argmax", "indexing", "greedy_sample")
def last_tile_ignored(logits: Tensor) -> int:
    """The maximum is not looked for in the last tile."""
    return argmax_by_tiles(logits[: (len(logits) - 1) // SCAN_TILE * SCAN_TILE])


@fault("argmax", "indexing", "greedy_sample")
def index_within_the_tile(logits: Tensor) -> int:
    """The index counts from the start of its tile."""
    return argmax_by_tiles(logits) % SCAN_TILE


@fault("argmax", "indexing", "greedy_sample")
def index_off_by_one(logits: Tensor) -> int:
    """The index counts from one."""
    return int(logits.argmax()) + 1
