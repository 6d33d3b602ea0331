"""What tests see of processes."""

from __future__ import annotations

from pathlib import Path


def alive(process: int) -> bool:
    """Whether a process runs: one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
