"""Temporary folders that do not pile up when their owner is killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "conformance-"
_LOCK = "owner.lock"


class ScratchFolder:
    """A new folder in ``parent``, removed by ``close``.

    If its owner is killed first, the next one that is made in the same place removes it: the owner holds a lock on a file in
    it, which the kernel releases however the owner dies.
    """

    def __init__(self, parent: Path) -> None:
        remove_abandoned(parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            # Not inheritable: the worker may outlive its owner by a moment and must not hold the lock.
            try:
                self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            except OSError:  # no more files; without a lock nobody would remove it
                self.path.rmdir()
                raise
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / _LOCK).exists():
                break
            os.close(self._lock)  # another took it for abandoned before it was locked

    def clear(self) -> None:
        """Remove what is in the folder, which stays."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder; closing twice is harmless."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_abandoned(parent: Path) -> None:
    """Remove the folders in ``parent`` whose owners have died."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass  # its owner lives
        else:
            shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(descriptor)
