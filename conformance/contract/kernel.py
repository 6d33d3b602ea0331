"""A kernel: one system under test.

A torch kernel is a function with the contract's argument names that writes its outputs in place. A PyPTO kernel is a *builder*:
a function of ``dims`` that returns the compiled-on-call object, so that one text serves every shape. Neither is registered
anywhere: a module's kernels are its attributes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from conformance.contract.dims import Dims
from conformance.contract.precision import CONTRACT, TIES, declared_names, require_ties
from conformance.contract.registry import model_named, short_name, stage_named
from conformance.contract.stage import Stage
from conformance.errors import UsageError
from conformance.outside import one_line, told

TOOLCHAINS = ("torch", "pypto")


#: The one capability that the harness itself acts on: a build that serves several batches is made once.
VARIABLE_BATCH = "variable_batch"
#: The longest name of a kernel, in characters.
MOST_OF_NAME = 100


Kind = TypeVar("Kind", bound="Declaration")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is known of one implementation of one stage without running any of it.

    ``profile`` names the one error-model profile that the kernel declares; ``None`` lets any legal one pass. ``rounds`` names
    further roundings to bf16 that it declares, ``precision`` a policy of them, and ``ties="any"`` says that it takes any of
    several equals. ``capacity`` is the largest user batch that one build serves, for a kernel that declares ``variable_batch``.
    ``reorders_sums``: the order of its sums varies from run to run (atomic additions, split K), and with it the last bits of
    floating-point outputs. ``source`` is the file that defines the kernel, ``summary`` the first line of its docstring;
    ``digest`` is the SHA-256 of the file, where it was listed.
    """

    stage_name: str
    name: str
    toolchain: str = "torch"
    capabilities: tuple[str, ...] = ()
    profile: str | None = None
    capacity: int = 1
    reorders_sums: bool = False
    # What is declared of a kernel when it is judged leaves it the same kernel to whoever runs it.
    rounds: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    precision: str = dataclasses.field(default=CONTRACT, compare=False)
    ties: str = dataclasses.field(default=TIES[0], compare=False)
    source: Path = Path("<unknown>")
    summary: str = ""
    digest: str = ""

    @property
    def stage(self) -> Stage:
        """The stage that the kernel claims to implement."""
        return stage_named(self.stage_name)

    @property
    def judged_by(self) -> dict[str, Any]:
        """What it declares of its numbers, as ``judge`` takes it."""
        names = declared_names(self.stage, self.rounds, self.precision)
        return {"profile": self.profile, "rounds": names, "ties": self.ties}

    def declaring(self: Kind, rounds: Sequence[str] = (), precision: str = CONTRACT, ties: str = TIES[0]) -> Kind:
        """The same kernel with more declared of its numbers; raises ``UsageError`` for what its stage does not have."""
        policy = self.precision if precision == CONTRACT else precision
        taken = self.ties if ties == TIES[0] else ties
        names = declared_names(self.stage, (*self.rounds, *rounds), policy)
        require_ties(self.stage, taken)
        return dataclasses.replace(self, rounds=names, precision=policy, ties=taken)

    @property
    def id(self) -> str:
        """``model/name``: kernels of two models may have one name."""
        return f"{self.stage.model}/{self.name}"

    def refusal(self, dims: Dims) -> str | None:
        """Why the kernel does not take these dimensions, or ``None`` if it does."""
        if VARIABLE_BATCH in self.capabilities and self.capacity < dims.batch:
            return f"kernel {self.name} serves batches of 1 to {self.capacity}, not {dims.batch}"
        return self.asked(dims)

    def asked(self, dims: Dims) -> str | None:
        """What the kernel's own ``accepts`` says; a subclass knows how to ask it."""
        return None

    def built_for(self, dims: Dims) -> Dims:
        """The dimensions that a build is made for: with ``variable_batch`` one build serves every batch up to the capacity.

        The builder is then given the capacity as the batch, and 1 as the number of tokens, which varies likewise in a prefill.
        """
        return dims.resized(batch=self.capacity, tokens=1) if VARIABLE_BATCH in self.capabilities else dims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel(Declaration):
    """A kernel in the process that runs it, made by ``conformance.kernel``: a declaration and its code.

    ``accepts(dims)`` returns ``True``, or a sentence that says which dimensions the kernel takes.
    """

    function: Callable[..., Any]
    accepts: Callable[[Dims], bool | str] | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(*arguments, **keywords)

    def asked(self, dims: Dims) -> str | None:
        """What ``accepts`` says; raises ``UsageError`` if it raises."""
        if self.accepts is None:
            return None
        try:
            answer = self.accepts(dims)
        except Exception as error:
            raise UsageError(f"accepts of kernel {self.name} raised {told(error)}") from error
        if answer is True:
            return None
        return answer if isinstance(answer, str) else f"kernel {self.name} does not take {dims}"

    def build(self, dims: Dims) -> Any:
        """The object that a toolchain compiles, for these dimensions; raises ``UsageError`` if they are refused."""
        refusal = self.refusal(dims)
        if refusal is not None:
            raise UsageError(refusal)
        return self.function(self.built_for(dims))


def kernel(
    stage: str,
    *,
    name: str | None = None,
    toolchain: str = "torch",
    capabilities: Sequence[str] = (),
    profile: str | None = None,
    accepts: Callable[[Dims], bool | str] | None = None,
    capacity: int | None = None,
    reorders_sums: bool = False,
    rounds: Sequence[str] = (),
    precision: str = CONTRACT,
    ties: str = TIES[0],
) -> Callable[[Callable[..., Any]], Kernel]:
    """Declare that a function implements ``stage``.

    For ``toolchain="torch"`` the function takes the contract's arguments by name, and ``dims`` if it has such a keyword-only
    parameter. For ``toolchain="pypto"`` it is a builder: it takes ``dims`` alone and returns a ``pypto.frontend.jit`` object.
    A builder that declares ``variable_batch`` is called once, with a batch of ``capacity`` (2 to the contract's largest, which is
    the default), and what it returns must take every batch from 1 to that. ``name`` defaults to the function's own name.

    ``rounds`` and ``precision`` declare roundings to bf16 that the contract does not have (``conformance list`` shows a stage's),
    ``ties="any"`` that any of several equals is taken, ``reorders_sums=True`` that repeated runs agree within the error model and
    not bit for bit. Raises ``UsageError`` for an unknown stage, toolchain, capability or rounding, for a capacity that means
    nothing, and for a signature that does not match.
    """
    if not isinstance(stage, str):
        raise UsageError('conformance.kernel takes the stage\'s name, as in @conformance.kernel("rms_norm")')
    contract = stage_named(stage)
    if toolchain not in TOOLCHAINS:
        raise UsageError(f"unknown toolchain {toolchain!r}; known are {', '.join(TOOLCHAINS)}")
    if isinstance(capabilities, str) or not isinstance(capabilities, Sequence):
        raise UsageError(f"capabilities is a list of names, found {capabilities!r}")
    if accepts is not None and not callable(accepts):
        raise UsageError(f"accepts is a function of dims, found {accepts!r}")
    model = model_named(contract.model)
    largest = model.largest_batch
    served = largest if capacity is None else capacity
    if isinstance(served, bool) or not isinstance(served, int) or served < 1:
        raise UsageError(f"capacity is the largest batch that one build serves, a positive whole number, found {capacity!r}")
    if served > largest:
        raise UsageError(f"capacity is at most {largest}, the largest batch of the contract, found {capacity}")
    if VARIABLE_BATCH in capabilities and served == 1:
        raise UsageError(f"a kernel of capacity 1 serves one batch only: it has no {VARIABLE_BATCH} to declare")
    if VARIABLE_BATCH not in capabilities and served != largest:
        raise UsageError(f"capacity goes with {VARIABLE_BATCH}, which is not declared, found capacity {capacity}")
    if not isinstance(reorders_sums, bool):
        raise UsageError(f"reorders_sums is True or False, found {reorders_sums!r}")
    for capability in capabilities:
        if capability not in model.meanings:
            known = ", ".join(model.meanings) or "none"
            raise UsageError(f"unknown capability {capability!r}; known are {known}")
    if profile is not None and profile not in {known.name for known in contract.profiles}:
        names = ", ".join(known.name for known in contract.profiles)
        raise UsageError(f"stage {stage} has no profile {profile!r}; it has {names}")
    declared_names(contract, rounds, precision)
    require_ties(contract, ties)

    def decorate(function: Callable[..., Any]) -> Kernel:
        if toolchain == "torch":
            require_signature(function, contract)
        else:
            require_builder(function)
        return Kernel(
            function=function,
            stage_name=stage,
            name=require_name(name or _name_of(function)),
            toolchain=toolchain,
            capabilities=tuple(capabilities),
            profile=profile,
            accepts=accepts,
            capacity=served,
            reorders_sums=reorders_sums,
            source=_source(function),
            summary=_summary(function),
            rounds=tuple(rounds),
            precision=precision,
            ties=ties,
        )

    return decorate


def _source(function: Callable[..., Any]) -> Path:
    """The file that defines a callable."""
    # A callable object has no source of its own; its class has.
    plain = unbound(function)
    subject = plain if hasattr(plain, "__code__") else type(plain)
    try:
        return Path(inspect.getsourcefile(inspect.unwrap(subject)) or "<unknown>")
    except (TypeError, ValueError):
        return Path("<unknown>")


def _summary(function: Callable[..., Any]) -> str:
    """The first line of the docstring, or an empty string."""
    return one_line((inspect.getdoc(function) or "").split("\n", 1)[0], 200)


def require_name(name: object) -> str:
    """The name of a kernel, which stands in reports, file names and commands; raises ``UsageError`` for one that cannot."""
    if isinstance(name, str) and 0 < len(name) <= MOST_OF_NAME and name.isprintable() and not set(name) & {" ", "/"}:
        return name
    shown = one_line(repr(name), 60)
    raise UsageError(f"a kernel's name has at most {MOST_OF_NAME} characters, no space and no '/' among them, found {shown}")


def unbound(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``functools.partial`` was applied to, or the function itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name_of(function: Callable[..., Any]) -> str:
    function = unbound(function)
    return str(getattr(function, "__name__", type(function).__name__))


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def takes_dims(function: Callable[..., Any]) -> bool:
    """Whether a torch kernel asks for the dimensions by a keyword-only parameter ``dims``."""
    parameter = _parameters(function).get("dims")
    return parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY


def call_of(
    function: Callable[..., Any], stage: Stage, tensors: Mapping[str, Any], dims: Dims
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a torch kernel is called with the stage's arguments: those by position, and those by keyword.

    Raises ``UsageError`` as ``require_signature`` does.
    """
    count = require_signature(function, stage)
    names = [argument.name for argument in stage.arguments]
    keywords = {name: tensors[name] for name in names[count:]}
    return tuple(tensors[name] for name in names[:count]), keywords | ({"dims": dims} if takes_dims(function) else {})


def require_signature(function: Callable[..., Any], stage: Stage) -> int:
    """How many of the stage's arguments are passed by position, the others by keyword.

    Raises ``UsageError`` unless the function takes all of them, by name and in their order, and needs nothing else: what has a
    default may stand anywhere, and ``*args`` or ``**kwargs`` take what has no parameter of its own.
    """
    expected = [argument.name for argument in stage.arguments]
    parameters = _parameters(function).values()
    kinds = {parameter.kind for parameter in parameters}
    positional = [parameter for parameter in parameters if parameter.kind in _BY_POSITION]
    for parameter in parameters:
        required = parameter.default is inspect.Parameter.empty
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and required and parameter.name not in ("dims", *expected):
            raise UsageError(
                f"{_name_of(function)} has a required keyword-only parameter {parameter.name!r}: only dims is passed by keyword"
            )
    agreeing = [parameter.name == name for parameter, name in zip(positional, expected, strict=False)]
    count = [*agreeing, False].index(False)
    rest, others = expected[count:], positional[count:]
    if not others and inspect.Parameter.VAR_POSITIONAL in kinds:
        return len(expected)
    by_keyword = [parameter.name for parameter in parameters if parameter.kind in _BY_KEYWORD]
    named = [parameter.name for parameter in others if parameter.name in rest]
    in_order = named == [name for name in rest if name in named]
    taken = all(name in by_keyword or inspect.Parameter.VAR_KEYWORD in kinds for name in rest)
    missing = [one for one in others if one.name not in rest and one.default is inspect.Parameter.empty]
    if in_order and taken and not missing:
        return count
    raise UsageError(
        f"{_name_of(function)} must take the arguments of {stage.name} by name and order: expected ({', '.join(expected)}), "
        f"found ({', '.join(parameter.name for parameter in positional)})"
    )


def require_builder(function: Callable[..., Any]) -> None:
    """Raise ``UsageError`` unless the function can be called with ``dims`` alone."""
    required = [name for name, parameter in _parameters(function).items() if parameter.default is inspect.Parameter.empty]
    if len(required) != 1:
        raise UsageError(
            f"a PyPTO kernel is a builder that takes dims and returns the jit object; "
            f"{getattr(function, '__name__', 'the builder')} takes ({', '.join(required)})"
        )


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    if not callable(function):
        raise UsageError(f"a kernel must be callable, found {type(function).__name__}")
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the signature of {function!r} cannot be read: {error}") from error


def as_kernel(stage: str, function: Callable[..., Any] | Kernel) -> Kernel:
    """A ``Kernel`` for any callable; raises ``UsageError`` if it claims another stage or has another signature."""
    if isinstance(function, Kernel):
        require_kernel_of(function, stage)
        return function
    contract = stage_named(stage)
    require_signature(function, contract)
    capacity = model_named(contract.model).largest_batch
    return Kernel(
        function=function,
        stage_name=stage,
        name=_name_of(function),
        capacity=capacity,
        source=_source(function),
        summary=_summary(function),
    )


def require_kernel_of(kernel: Declaration, stage: str) -> None:
    """Raise ``UsageError`` unless the kernel is one of that stage."""
    contract = stage_named(stage)
    if kernel.stage.id != contract.id:
        raise UsageError(f"kernel {kernel.name} implements {short_name(kernel.stage)}, not {short_name(contract)}")
