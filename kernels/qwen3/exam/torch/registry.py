"""Faults that are one small function each: what an engineer wrote in the place of the right thing.

Where the right kernels compute something that is easily got wrong they ask for what stands at a *hook*: usually the right
function, or the fault's, which takes the same arguments. The hooks, and the function that belongs there:

- in ``arithmetic.py``: ``statistic eps eps_of root norm gamma``, ``operands sum``, ``activation activated``, ``angle tables
  rotated_head turn``, ``attend scale scores mask exponential probabilities carry merge quotient``, ``cast normalised_cast``;
- in ``layers.py``: ``weight prepared first_sum second_input second_sum``, ``length seen heads kv_head history depth page cell``,
  ``slot head_written written``, ``query_cast key_cast value_cast attention_cast carried_cast``;
- in ``kernels.py``: ``winner`` of greedy sampling, and ``call``, which has the whole call of a right kernel in its hands
  (``Call``) and may give it other arguments or spoil what it wrote.

So a fault is added by one function in ``of_values.py``, ``of_places.py`` or ``of_calls.py``: its name is the fault's, its
docstring says in one line what the engineer did, and the decorator has the class and the stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from conformance.exam.known_kernels import KINDS, Kind

Function = TypeVar("Function", bound=Callable[..., Any])

# Stages that have something in common.
ROWS = ("rms_norm", "qkv_proj", "qk_norm", "rope", "attention", "paged_attention", "o_proj", "mlp", "lm_head")
NORMS = ("rms_norm", "qk_norm", "lm_head", "decode_layer")
PRODUCTS = ("qkv_proj", "o_proj", "mlp", "lm_head", "decode_layer")
ATTENTIONS = ("attention", "paged_attention")
DECODE_LAYERS = ("decode_layer", "paged_decode_layer")
CHAINS = ("decode_fwd_layers", "decode_fwd", "paged_decode_fwd", "prefill_fwd")
PREFILLS = ("prefill_layer", "prefill_fwd")
ALL_LAYERS = (*DECODE_LAYERS, "prefill_layer", *CHAINS)
#: One layer, a chain to the logits, and chunks of tokens: enough for what all layers would show alike.
LAYERS_OF_EACH_KIND = ("decode_layer", "decode_fwd", "prefill_layer")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What stands at one hook in the place of the right thing, in which stages.

    ``choices`` are those of ``Choices`` without which it does not show, ``dims`` the dimensions.
    """

    name: str
    kind: Kind
    summary: str
    stages: tuple[str, ...]
    hook: str
    function: Callable[..., Any]
    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dims: Mapping[str, str | int] = dataclasses.field(default_factory=dict)


#: Every fault that is a function of its own, by name.
REGISTERED: dict[str, Fault] = {}


def fault(
    hook: str,
    kind: Kind,
    *stages: str,
    name: str = "",
    summary: str = "",
    dims: Mapping[str, str | int] | None = None,
    **choices: Any,
) -> Callable[[Function], Function]:
    """Make a function a fault of these stages; raises ``ValueError`` for one that is there, or does not say what it is."""

    def register(function: Function) -> Function:
        found = Fault(
            name or function.__name__,
            kind,
            summary or _clause(function.__doc__ or ""),
            stages,
            hook,
            function,
            choices,
            dict(dims or {}),
        )
        if found.name in REGISTERED or kind not in KINDS or not stages:
            raise ValueError(f"fault {found.name!r} is there already, of an unknown class, or of no stage")
        if not found.summary or "\n" in found.summary:
            raise ValueError(f"fault {found.name!r} must say in one line what the engineer did, found {found.summary!r}")
        REGISTERED[found.name] = found
        return function

    return register


def _clause(sentence: str) -> str:
    """A docstring as one clause among others: without its full stop, and small where it is no name that begins it."""
    word = sentence.split(" ", 1)[0]
    is_name = not word[1:].islower() and word != "A"
    return (sentence if is_name else sentence[:1].lower() + sentence[1:]).rstrip(".")


def at(hook: str, name: str, right: Function) -> Function:
    """What stands at a hook of a kernel with the fault ``name``: the fault's function, or the right one."""
    found = REGISTERED.get(name)
    return found.function if found is not None and found.hook == hook else right  # type: ignore[return-value]


def faults_of(stage: str) -> tuple[str, ...]:
    """The names of the registered faults of a stage."""
    return tuple(found.name for found in REGISTERED.values() if stage in found.stages)
