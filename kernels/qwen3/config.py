"""The axes of Qwen3 models, and the dimensions of some.

``qwen3_*`` are the published dense models, from their public configurations; ``tiny`` is small enough for an interpreter. So are
``narrow`` and ``awkward``: an odd number of heads of which five share one KV head, as in Qwen3-14B, a small head, lengths no page
divides, and a hidden size, an intermediate size and a vocabulary that no tile divides. Their ``G`` is not their ``NKV``: in
``tiny`` they are equal, and a kernel that takes KV head ``h // NKV`` for ``h // G`` is right there. ``narrow`` differs from
``awkward`` in its hidden size, which is not ``NH * D`` but less, as in Qwen3-0.6B, 4B and 32B.

``B``, ``L``, ``NB`` and ``T`` are upper limits: a case draws them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from conformance.contract.dims import Dims, axis
from conformance.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Qwen3Dims(Dims):
    """The dimensions of one Qwen3 model and of one case, by the symbols of the contract.

    ``NH``, ``NKV``, ``D``, ``H``, ``I``, ``V``, ``S`` and ``BS`` are fixed by the model; ``B``, ``L`` and ``NB`` vary from case
    to case, and so does ``T``, the tokens of a prefill; it is 1 for stages that take one token a sequence. ``H`` is ``NH * D``
    unless it is given. Raises ``UsageError`` if a value is not positive or if the heads cannot be shared evenly.
    """

    derived: ClassVar[Mapping[str, str]] = {"MB": "page_index", "G": "group"}

    B: int = axis("row", "batch")
    NH: int = axis("head")
    NKV: int = axis("kv_head")
    D: int = axis("lane")
    I: int = axis("column")  # noqa: E741  the contract's symbol
    V: int = axis("column")
    L: int = axis("layer", "depth")
    S: int = axis("position", "length")
    BS: int = axis("offset", "page_size")
    NB: int = axis("page", "pages")
    T: int = axis("token", "tokens", default=1)
    H: int = axis("column", default=0)
    eps: float = 1e-6
    theta: float = 1e6

    def __post_init__(self) -> None:
        if self.H == 0 and all(isinstance(value, int) for value in (self.NH, self.D)):
            object.__setattr__(self, "H", self.NH * self.D)
        super().__post_init__()

    def require_consistent(self) -> None:
        """Heads are shared evenly, and have two halves."""
        if self.NH % self.NKV:
            raise UsageError(f"NH must be a multiple of NKV (query heads share KV heads), found NH={self.NH}, NKV={self.NKV}")
        if self.D % 2:
            raise UsageError(f"D must be even (RoPE rotates two halves), found D={self.D}")

    @property
    def G(self) -> int:  # noqa: N802  the contract's symbol
        """Query heads that share one KV head."""
        return self.NH // self.NKV

    @property
    def MB(self) -> int:  # noqa: N802
        """Pages a sequence can have, ``ceil(S / BS)``."""
        return self.pages_per_sequence

    @property
    def scale(self) -> float:
        """The attention scale, ``D ** -0.5``."""
        return 1.0 / math.sqrt(self.D)

    def replace(self, **changes: Any) -> Qwen3Dims:
        """As of any ``Dims``; a hidden size that was ``NH * D`` follows the heads."""
        if self.H == self.NH * self.D and {"NH", "D"} & changes.keys():
            changes = {"H": 0, **changes}
        return super().replace(**changes)


def _published(*, H: int, NH: int, I: int, L: int) -> Qwen3Dims:  # noqa: E741  the contract's symbol
    """A published model, served in pages of 128 tokens: what all sizes have in common is here."""
    return Qwen3Dims(B=16, NH=NH, NKV=8, D=128, H=H, I=I, V=151936, L=L, S=4096, BS=128, NB=520, T=256)


TINY = Qwen3Dims(B=16, NH=4, NKV=2, D=64, I=512, V=512, L=8, S=128, BS=16, NB=136, T=64)
AWKWARD = Qwen3Dims(B=16, NH=15, NKV=3, D=16, I=360, V=500, L=3, S=76, BS=8, NB=168, T=40)

PRESETS: dict[str, Qwen3Dims] = {
    "tiny": TINY,
    "narrow": AWKWARD.replace(H=144),
    "awkward": AWKWARD,
    "qwen3_0_6b": _published(H=1024, NH=16, I=3072, L=28),
    "qwen3_1_7b": _published(H=2048, NH=16, I=6144, L=28),
    "qwen3_4b": _published(H=2560, NH=32, I=9728, L=36),
    "qwen3_8b": _published(H=4096, NH=32, I=12288, L=36),
    "qwen3_14b": _published(H=5120, NH=40, I=17408, L=40),
    "qwen3_32b": _published(H=5120, NH=64, I=25600, L=64),
}
