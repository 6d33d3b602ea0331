"""The dimensions of a model and of a case."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from conformance.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Dims:
    """The dimensions of one model and of one case; the symbols are those of the Qwen3 decode contract.

    ``NH``, ``NKV``, ``D``, ``I``, ``V``, ``S`` and ``BS`` are fixed by the model; ``B``, ``L`` and ``NB`` vary from case to case,
    and so does ``T``, the tokens of a prefill; it is 1 for stages that take one token a sequence.
    Raises ``UsageError`` if a value is not positive or if the heads cannot be shared evenly.
    """

    B: int
    NH: int
    NKV: int
    D: int
    I: int  # noqa: E741  the contract's symbol
    V: int
    L: int
    S: int
    BS: int
    NB: int
    T: int = 1
    #: Hidden size. ``NH * D`` unless given, and then it follows the heads when they are replaced.
    H: int = 0
    eps: float = 1e-6
    theta: float = 1e6

    def __post_init__(self) -> None:
        if self.H == 0 and all(isinstance(value, int) for value in (self.NH, self.D)):
            object.__setattr__(self, "H", self.NH * self.D)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("eps", "theta"):
                if not (isinstance(value, (int, float)) and value > 0):
                    raise UsageError(f"dimension {field.name} must be a positive number, found {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"dimension {field.name} must be a positive whole number, found {value!r}")
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
        return -(-self.S // self.BS)

    @property
    def scale(self) -> float:
        """The attention scale, ``D ** -0.5``."""
        return 1.0 / math.sqrt(self.D)

    def replace(self, **changes: Any) -> Dims:
        """A copy with some dimensions changed; raises ``UsageError`` for a name that is not a dimension."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise UsageError(f"unknown dimension {name!r}; known are {', '.join(sorted(known))}")
        if self.H == self.NH * self.D and {"NH", "D"} & changes.keys():
            changes = {"H": 0, **changes}
        return dataclasses.replace(self, **changes)
