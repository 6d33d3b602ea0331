"""Buffers that tell what a kernel did to them: poisoned outputs between guard regions.

Outputs are filled with a bit pattern that no computation yields, so that an element that was never written is known even
where the right answer is 0. Guards before and after keep the alignment that NPU copies want.
"""

from __future__ import annotations

import dataclasses

import torch

from conformance.errors import UsageError

#: Guard regions are whole multiples of this, in bytes, so that a guarded output is as aligned as an unguarded one.
GUARD_ALIGNMENT = 512
GUARD_BYTES = 2 * GUARD_ALIGNMENT

#: Quiet NaNs with a payload that arithmetic does not produce, and integers that are no index.
_PATTERNS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.bfloat16: (torch.int16, 0x7FD5),
    torch.float16: (torch.int16, 0x7ED5),
    torch.float32: (torch.int32, 0x7FD5A5A5),
    torch.int32: (torch.int32, -0x5A5A5A5B),
    torch.int64: (torch.int64, -0x5A5A5A5B5A5A5A5B),
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers; raises ``UsageError`` for a dtype that no contract uses."""
    if tensor.dtype not in _PATTERNS:
        raise UsageError(f"no poison is defined for {tensor.dtype}")
    return tensor.view(_PATTERNS[tensor.dtype][0])


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor in place with its dtype's poison and return it."""
    bits(tensor).fill_(_PATTERNS[tensor.dtype][1])
    return tensor


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """A boolean tensor: which elements still hold the poison, bit for bit."""
    return bits(tensor) == _PATTERNS[tensor.dtype][1]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit (so that NaN equals itself and 0.0 differs from -0.0)."""
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A contiguous tensor of one dtype with guard regions on both sides of it in the same storage."""

    storage: torch.Tensor
    tensor: torch.Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device = "cpu") -> Guarded:
        """A poisoned tensor of that shape between poisoned guards."""
        size = torch.empty((), dtype=dtype).element_size()
        margin = GUARD_BYTES // size
        count = 1
        for extent in shape:
            count *= extent
        tail = -count % (GUARD_ALIGNMENT // size) + margin
        # torch aligns CPU storage to 64 bytes only: start at the next address that is aligned.
        slack = GUARD_ALIGNMENT // size
        whole = torch.empty(slack + margin + count + tail, dtype=dtype, device=device)
        start = (-whole.data_ptr() % GUARD_ALIGNMENT) // size
        storage = poison(whole[start : start + margin + count + tail])
        return cls(storage, storage[margin : margin + count].view(shape))

    def damage(self, storage: torch.Tensor | None = None) -> str | None:
        """Where a guard was overwritten, as a sentence, or ``None``; ``storage`` may be a copy read back from a device."""
        held = self.storage if storage is None else storage
        touched = ~poisoned(held)
        before = self.tensor.storage_offset() - self.storage.storage_offset()
        after = before + self.tensor.numel()
        left = torch.nonzero(touched[:before])
        right = torch.nonzero(touched[after:])
        if not len(left) and not len(right):
            return None
        parts = []
        if len(left):
            parts.append(f"{len(left)} elements before the start, the nearest {before - int(left[-1])} before it")
        if len(right):
            parts.append(f"{len(right)} elements past the end, the nearest {int(right[0]) + 1} past it")
        return " and ".join(parts)
