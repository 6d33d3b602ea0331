"""Tensors shared with a worker process through one memory-mapped file without a name.

A decode layer's weights are hundreds of megabytes: they are copied once into the arena and used in place on the other side.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
from collections.abc import Iterable

import torch

#: NPU copies want 512 bytes; it also keeps every dtype aligned.
ALIGNMENT = 512


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the arena: ``offset`` in bytes."""

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first byte behind the tensor."""
        return self.offset + _bytes(self.dtype, self.shape)


class Arena:
    """One side's view of the shared file. Both sides may grow it; the other then catches up with ``reach``."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is not None:
            self.descriptor = descriptor
        elif hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("conformance-arena", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self._map: mmap.mmap | None = None

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]], start: int = 0) -> tuple[Slot, ...]:
        """Copy contiguous tensors into the arena from byte ``start`` on, growing it if needed; says where they are."""
        named = list(tensors)
        slots: list[Slot] = []
        for name, tensor in named:
            start = -(-start // ALIGNMENT) * ALIGNMENT
            slots.append(Slot(name, start, tensor.dtype, tuple(tensor.shape)))
            start = slots[-1].end
        self.reach(start)
        for (_, tensor), slot in zip(named, slots, strict=True):
            self.view(slot).copy_(tensor)
        return tuple(slots)

    def view(self, slot: Slot) -> torch.Tensor:
        """The tensor in place: writing to it writes to the arena, and it stays valid when the arena grows."""
        if 0 in slot.shape:
            return torch.empty(slot.shape, dtype=slot.dtype)
        self.reach(slot.end)
        assert self._map is not None
        count = (slot.end - slot.offset) // slot.dtype.itemsize
        return torch.frombuffer(self._map, dtype=slot.dtype, count=count, offset=slot.offset).view(slot.shape)

    def reach(self, size: int) -> None:
        """Make the mapping cover at least ``size`` bytes, growing the file if it is shorter."""
        if self._map is not None and len(self._map) >= size:
            return
        length = os.fstat(self.descriptor).st_size
        if length < size:
            # In steps, so that cases of slightly different sizes do not map anew every time.
            length = -(-size * 5 // (4 * mmap.PAGESIZE)) * mmap.PAGESIZE
            os.ftruncate(self.descriptor, length)
        # Tensors in the old mapping keep it alive until they die themselves.
        self._map = mmap.mmap(self.descriptor, max(length, mmap.PAGESIZE)) if length else None

    def close(self) -> None:
        """Close the file; tensors that are still in use keep their memory."""
        self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    return count
