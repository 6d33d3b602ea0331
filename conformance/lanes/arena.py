"""Memory shared with a worker process: one file without a name, mapped by both.

A decode layer's weights are hundreds of megabytes: they are copied once into the arena and used in place on the other side.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile

import torch


class Arena:
    """One side's view of the shared file. The side that made it decides how large it is: ``reach``."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._map: mmap.mmap | None = None
        if descriptor is not None:
            self.descriptor = descriptor
        elif hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("conformance-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            # A file that a kernel makes shorter takes the process that reads it along (SIGBUS). The second seal: no other can
            # be set, such as one against growing it.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())

    def reach(self, size: int) -> None:
        """Make it at least so many bytes large; raises ``OSError`` if there is no memory for that."""
        if self._map is not None and len(self._map) >= size:
            return
        # In steps, so that cases of slightly different sizes do not map anew every time.
        step = -(-size * 5 // (4 * mmap.PAGESIZE)) * mmap.PAGESIZE
        length = os.fstat(self.descriptor).st_size
        if length < size:
            length = step
            os.ftruncate(self.descriptor, length)
        # Not all of a file that a kernel made larger than memory. Tensors in the old mapping keep it alive until they die.
        length = min(length, step)
        self._map = mmap.mmap(self.descriptor, length) if length else None

    def view(self, offset: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        """So many elements from byte ``offset`` on, in place: writing to the tensor writes to the arena."""
        self.reach(offset + count * dtype.itemsize)
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)

    def close(self) -> None:
        """Close the file; tensors that are still in use keep their memory."""
        self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
