"""What a worker on a card leaves in its folder besides logs, where its owner finds it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from conformance.contract.dims import Dims

#: Which card and chip a worker used, and by what version of torch_npu: JSON.
CARD_FILE = "card.json"
#: What PyPTO wrote when it compiled, a folder for each dimensions: intermediate graphs, the sources of the kernel's parts.
BUILDS = "builds"
#: So many of them are kept, the newest.
MOST_BUILDS = 4


def build_folder(folder: Path, built_for: Dims) -> Path:
    """Where what was compiled for these dimensions lies, below a worker's folder."""
    return folder / BUILDS / hashlib.sha256(repr(built_for).encode()).hexdigest()[:16]
