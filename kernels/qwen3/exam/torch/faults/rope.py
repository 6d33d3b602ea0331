"""Faults of RoPE: another position, table or rotation."""

from __future__ import annotations

import torch

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.torch.helpers import FP16, rounded
from conformance.kernels.qwen3.exam.torch.hooks import ALL_LAYERS, CONTIGUOUS_LAYERS, PREFILLS, SIGNATURES, fault
from conformance.kernels.qwen3.exam.torch.operations import BF16
from conformance.kernels.qwen3.rotation import rotation_table

Tensor = torch.Tensor


# RoPE

_TURNS = ("rope", "decode_layer")


@fault("rope_tables", "indexing", *_TURNS)
def sine_and_cosine_exchanged(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine are exchanged."""
    return sin[row], cos[row]


@fault("rope_tables", "dependency", *_TURNS)
def cosine_of_the_position_before(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """The cosine is still that of the step before."""
    return cos[max(row - 1, 0)], sin[row]


@fault("rope_tables", "precision", "rope")
def tables_in_fp16(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """RoPE tables are kept in fp16."""
    return rounded(cos[row], FP16), rounded(sin[row], FP16)


@fault("rope_tables", "value", *_TURNS)
def sine_of_the_first_position(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """The sine is left at position zero's, which is zero."""
    return cos[row], sin[0]


@fault("rope_tables", "value", *_TURNS)
def theta_1e4(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """RoPE's theta is 1e4 instead of the model's 1e6."""
    cos, sin = (table.float() for table in rotation_table(len(cos), cos.shape[1], 1e4))
    return cos[row], sin[row]


@fault("rope_tables", "value", *_TURNS)
def frequencies_interleaved(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """A table row repeats every frequency side by side instead of holding two equal halves."""
    half = cos.shape[1] // 2
    return cos[row, :half].repeat_interleave(2), sin[row, :half].repeat_interleave(2)


@fault("rope_row", "indexing", *_TURNS)
def position_is_the_row(position: int, row: int, first: int, dims: Dims) -> int:
    """The position is taken to be the row of the batch."""
    return row % dims.S


@fault("rope_row", "value", *_TURNS, detectors=("echo", "element"))
def position_zero(position: int, row: int, first: int, dims: Dims) -> int:
    """Every token is rotated to position zero."""
    return 0


@fault("rope_row", "indexing", *_TURNS)
def position_one_too_small(position: int, row: int, first: int, dims: Dims) -> int:
    """RoPE is taken at position seq_len - 2."""
    return max(position - 1, 0)


@fault("rope_row", "indexing", *_TURNS)
def position_within_the_page(position: int, row: int, first: int, dims: Dims) -> int:
    """The position is taken within its page."""
    return position % dims.BS


@fault("rope_row", "value", *_TURNS)
def positions_interpolated(position: int, row: int, first: int, dims: Dims) -> int:
    """Positions are divided by two, as for a model whose context was stretched."""
    return position // 2


@fault("rope_row", "indexing", *_TURNS)
def positions_wrap(position: int, row: int, first: int, dims: Dims) -> int:
    """Only half of the RoPE table was loaded, and later positions start over."""
    return position % (dims.S // 2)


@fault("rope_row", "indexing", *_TURNS)
def positions_stop(position: int, row: int, first: int, dims: Dims) -> int:
    """Positions in the second half of the table are clamped to its first half."""
    return min(position, dims.S // 2)


@fault("rotation", "dependency", *_TURNS)
def low_half_overwritten(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The low half is rotated in place before the high half reads it."""
    half = low.shape[-1]
    low = low * c[..., :half] - high * s[..., :half]
    return low, high * c[..., half:] + low * s[..., half:]


@fault("rotation", "indexing", *_TURNS)
def halves_exchanged(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The two rotated halves of a head are stored in each other's place."""
    half = low.shape[-1]
    return high * c[..., half:] + low * s[..., half:], low * c[..., :half] - high * s[..., :half]


@fault("rotation", "value", *_TURNS)
def high_half_not_rotated(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Only the low half of a head is rotated."""
    half = low.shape[-1]
    return low * c[..., :half] - high * s[..., :half], high


@fault("rotation", "value", *_TURNS)
def partial_rotation(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Only the first half of a head's pairs is rotated, as in models with partial RoPE."""
    half, kept = low.shape[-1], low.shape[-1] // 2
    c, s = c.clone(), s.clone()
    for start in (0, half):
        c[..., start + kept : start + half], s[..., start + kept : start + half] = 1, 0
    return low * c[..., :half] - high * s[..., :half], high * c[..., half:] + low * s[..., half:]


@fault("rotation", "value", *_TURNS)
def sine_added_in_both(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The sine's term is added in both halves."""
    half = low.shape[-1]
    return low * c[..., :half] + high * s[..., :half], high * c[..., half:] + low * s[..., half:]


@fault("rotation", "precision", "rope", rounds=("rotation products",))
def rotation_in_bf16(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The four products of the rotation are rounded to bf16."""
    half = low.shape[-1]
    a, b, d, e = (
        rounded(term, BF16) for term in (low * c[..., :half], high * s[..., :half], high * c[..., half:], low * s[..., half:])
    )
    return a - b, d + e


@fault("rotated_head", "indexing", *_TURNS)
def first_head_only_rotated(head: int, count: int) -> bool:
    """Only the first head is rotated."""
    return head == 0


@fault("rotated_head", "indexing", *_TURNS)
def last_head_not_rotated(head: int, count: int) -> bool:
    """The loop over heads ends one too early: the last head is not rotated."""
    return head < count - 1


@fault("rotated_head", "indexing", *_TURNS)
def odd_heads_not_rotated(head: int, count: int) -> bool:
    """Every second head is not rotated."""
    return head % 2 == 0


@fault("rope_row", "indexing", "rope", *CONTIGUOUS_LAYERS)
def position_off_by_one(position: int, row: int, first: int, dims: Dims) -> int:
    """RoPE is taken at position seq_len instead of seq_len - 1."""
    return position + 1 if position + 1 < dims.S else position - 1


@fault("rope_row", "indexing", *PREFILLS)
def position_of_the_first(position: int, row: int, first: int, dims: Dims) -> int:
    """Every token of a chunk is rotated to the position of its first."""
    return first


@fault("rope_row", "indexing", *PREFILLS)
def position_from_zero(position: int, row: int, first: int, dims: Dims) -> int:
    """Positions of a chunk start from zero, whatever the cache holds."""
    return position - first


@fault("rope_tables", "value", "rope")
def wrong_sign(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """RoPE turns the other way: the sine has the wrong sign."""
    return cos[row], -sin[row]


@fault("rope_tables", "precision", "rope", *ALL_LAYERS, detectors=("element", *SIGNATURES), rounds=("rope tables",))
def bf16_tables(cos: Tensor, sin: Tensor, row: int) -> tuple[Tensor, Tensor]:
    """RoPE tables are kept in bf16."""
    return rounded(cos[row], BF16), rounded(sin[row], BF16)


@fault("rotation", "indexing", "rope", *CONTIGUOUS_LAYERS)
def interleaved_pairs(low: Tensor, high: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE rotates neighbouring pairs, as GPT-J does, instead of halves."""
    half = low.shape[-1]
    head = torch.cat([low, high], -1)
    even, odd, c, s = head[..., ::2], head[..., 1::2], c[..., :half], s[..., :half]
    rotated = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2)
    return rotated[..., :half], rotated[..., half:]
