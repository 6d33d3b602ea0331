"""The dimensions of a model and of a case: a model declares its axes as the fields of a class of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from conformance.errors import UsageError

#: What the harness has to know of an axis, where a model has such an axis at all:
#:
#: ``batch``      sequences, or rows, that a call serves
#: ``depth``      layers of a chain
#: ``length``     tokens that a sequence may have
#: ``page_size``  tokens of a page of memory
#: ``pages``      pages in the pool
#: ``tokens``     new tokens of all sequences together, of a call that takes several a sequence
Role = Literal["batch", "depth", "length", "page_size", "pages", "tokens"]

#: Largest size of an axis: what an int32 can count.
LARGEST_SIZE = 2**31 - 1

_AXIS = "axis"
Self = TypeVar("Self", bound="Dims")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a model: what a step along it is called, such as ``row``, and its role in the harness."""

    label: str
    role: Role | None = None


def axis(label: str, role: Role | None = None, *, default: int | None = None) -> Any:
    """A field of a ``Dims`` class: a positive whole number, the size of an axis."""
    metadata = {_AXIS: Axis(label, role)}
    if default is None:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Dims:
    """The dimensions of one model and of one case.

    A model subclasses it: fields made by ``axis`` are sizes, other fields are constants of the model (positive numbers that no
    case overrides, such as eps), and properties are derived axes, which ``derived`` labels. ``require_consistent`` says what else
    must hold. Raises ``UsageError`` if a value is not positive or does not fit the others.

    ``batch``, ``depth``, ``length``, ``page_size``, ``pages`` and ``tokens`` are the sizes of the axes of that role: 1 where the
    model has none.
    """

    #: Labels of the axes that are computed from others.
    derived: ClassVar[Mapping[str, str]] = {}

    if TYPE_CHECKING:
        # Stages and kernels of any model read its axes from ``Dims``; only the model's own class declares them.
        def __getattr__(self, name: str) -> int: ...

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if _AXIS not in field.metadata:
                if isinstance(value, bool) or not (isinstance(value, (int, float)) and value > 0):
                    raise UsageError(f"dimension {field.name} must be a positive number, found {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"dimension {field.name} must be a positive whole number, found {value!r}")
            elif value > LARGEST_SIZE:
                raise UsageError(f"dimension {field.name} is at most {LARGEST_SIZE:,}, found a larger one")
        self.require_consistent()

    def require_consistent(self) -> None:
        """Raise ``UsageError`` if the dimensions do not fit one another."""

    @classmethod
    def axes(cls) -> Mapping[str, Axis]:
        """The declared axes by symbol, without derived ones."""
        return _axes(cls)  # type: ignore[arg-type]  # mypy takes the class's own __hash__ for that of its instances

    @classmethod
    def constants(cls) -> tuple[str, ...]:
        """The names of the model's constants, which belong to its contract."""
        return tuple(field.name for field in dataclasses.fields(cls) if _AXIS not in field.metadata)

    @classmethod
    def symbol(cls, role: Role) -> str:
        """The symbol of the axis that has a role, or an empty string where the model has none."""
        return next((symbol for symbol, found in cls.axes().items() if found.role == role), "")

    @classmethod
    def label(cls, symbol: str) -> str:
        """What one step along an axis is called; raises ``KeyError`` for an axis that the model does not have."""
        if symbol.isdigit():
            return "row"
        declared = cls.axes().get(symbol)
        return declared.label if declared is not None else cls.derived[symbol]

    def size(self, symbol: str) -> int:
        """The size of an axis, declared or derived, or the number that stands for one; raises ``UsageError`` for any other."""
        if symbol.isdigit():
            return int(symbol)
        if symbol not in self.axes() and symbol not in self.derived:
            known = ", ".join([*self.axes(), *self.derived])
            raise UsageError(f"{type(self).__name__} has no axis {symbol!r}; it has {known}")
        return int(getattr(self, symbol))

    def _of_role(self, role: Role) -> int:
        symbol = self.symbol(role)
        return self.size(symbol) if symbol else 1

    @property
    def batch(self) -> int:
        """Sequences, or rows, that a call serves."""
        return self._of_role("batch")

    @property
    def depth(self) -> int:
        """Layers."""
        return self._of_role("depth")

    @property
    def length(self) -> int:
        """Tokens that a sequence may have."""
        return self._of_role("length")

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._of_role("page_size")

    @property
    def pages(self) -> int:
        """Pages in the pool."""
        return self._of_role("pages")

    @property
    def tokens(self) -> int:
        """New tokens of all sequences together."""
        return self._of_role("tokens")

    @property
    def pages_per_sequence(self) -> int:
        """Pages that a sequence can have."""
        return -(-self.length // self.page_size)

    @property
    def sizes(self) -> dict[str, int | float]:
        """Every dimension by name, constants included: what the class is called with to have the same again."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def replace(self: Self, **changes: Any) -> Self:
        """A copy with some dimensions changed; raises ``UsageError`` for a name that is not a dimension."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise UsageError(f"unknown dimension {name!r}; known are {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    def resized(self: Self, **sizes: int) -> Self:
        """A copy with the axes of some roles resized; a role that the model does not have must have the size 1."""
        changes = dict(_by_symbol(self, sizes))
        return self.replace(**changes) if changes else self


@functools.cache
def _axes(kind: type[Dims]) -> Mapping[str, Axis]:
    return {field.name: field.metadata[_AXIS] for field in dataclasses.fields(kind) if _AXIS in field.metadata}


def _by_symbol(dims: Dims, sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    for role, size in sizes.items():
        symbol = dims.symbol(role)  # type: ignore[arg-type]
        if symbol:
            yield symbol, size
        elif size != 1:
            raise UsageError(f"this model has no axis for {role}, found {role} = {size}")
