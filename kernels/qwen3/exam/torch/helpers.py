"""What several faults are made of."""

from __future__ import annotations

import torch

Tensor = torch.Tensor

FP16, FP8 = torch.float16, torch.float8_e4m3fn
#: Terms of a sum, or columns, that a kernel takes together.
TILE = 32


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values rounded to a narrower format."""
    narrow: Tensor = x.to(dtype).float()
    return narrow


def mean_square(x: Tensor) -> Tensor:
    """The mean of the squares of each row, ``[..., 1]``."""
    return x.square().mean(-1, keepdim=True)


def changed(tensor: Tensor, place: tuple[slice, ...], value: Tensor | float) -> Tensor:
    """A copy with other values in one place."""
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def total_of(parts: list[Tensor]) -> Tensor:
    """The sum of tensors."""
    return torch.stack(parts).sum(0)
