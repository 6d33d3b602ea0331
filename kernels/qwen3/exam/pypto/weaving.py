"""How a faulty kernel, or a legal variant, is made of a bundled one: its builder is run with some fragments replaced.

A builder imports ``fragments`` when it is called. For the time of that call the module is a fresh copy that an
*edit* has changed; the program keeps the copy, everyone else the original. Where a fault lies in a kernel's own text and not in a
fragment, the kernel is one of ``programs.py``, whose whole text is a call of ``fragments.compute``, and the edit supplies that.

Both are declared by a decorator, ``Collection.edits`` or ``Collection.computes``, above one small function, which is named as the
fault or the variant. The kernels become attributes of its module, where a worker process finds them. A fault that torch kernels
have too is declared without a kind: it is the same fault, of the same kind, summary and detectors (``Faults.declare``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import conformance.kernels.qwen3
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.contract.registry import model_named
from conformance.exam.known_kernels import Faults, Kind, KnownKernel, as_clause
from conformance.kernels.qwen3.exam.torch import faults as torch_faults
from conformance.lanes import lane_named
from conformance.lanes.interpret import INTERPRET

#: Changes a copy of ``conformance.kernels.qwen3.fragments`` in place.
Edit = Callable[[Any], None]


@contextlib.contextmanager
def replaced_fragments(edit: Edit) -> Iterator[ModuleType]:
    """Until the block ends, ``import fragments`` of the model's package gives a copy of that module with ``edit`` applied."""
    from conformance.kernels.qwen3 import fragments as original

    spec = original.__spec__
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    edit(copy)
    conformance.kernels.qwen3.fragments = copy
    try:
        yield copy
    finally:
        conformance.kernels.qwen3.fragments = original


def edited(bundled: Kernel, name: str, edit: Edit, **changes: Any) -> Kernel:
    """The kernel that the bundled one's builder makes of edited fragments; ``changes`` are other fields of ``Kernel``."""

    @functools.wraps(edit)
    def build(dims: Dims) -> Any:
        with replaced_fragments(edit):
            return bundled.function(dims)

    return dataclasses.replace(bundled, function=build, name=name, **changes)


def bundled(stage: str) -> Kernel:
    """The kernel of a stage that comes with the model."""
    (module,) = (name for name in model_named("qwen3").kernel_modules if name.rpartition(".")[2] == stage)
    kernel: Kernel = getattr(importlib.import_module(module), stage)
    return kernel


#: Small dimensions: a case of a single stage takes a few hundredths of a second, one of a layer half a second.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "rms_norm": {"B": 3},
    "qkv_proj": {"B": 3},
    "qk_norm": {"B": 3},
    "rope": {"B": 3, "S": 48},
    "kv_write": {"B": 3, "BS": 8, "D": 16, "S": 32},
    "attention": {"B": 2, "BS": 8, "S": 48},
    "paged_attention": {"B": 3, "BS": 8, "D": 16, "S": 32},
    "o_proj": {"B": 3},
    "mlp": {"B": 3},
    "lm_head": {"B": 3, "V": 500},
    "greedy_sample": {"B": 3},
    "decode_layer": {"B": 2, "S": 48},
    "paged_decode_layer": {"B": 2, "S": 48},
    "decode_fwd_layers": {"B": 2, "S": 48, "L": 2},
    "decode_fwd": {"B": 2, "S": 48, "L": 2},
    "prefill_layer": {"B": 2, "S": 48, "T": 24},
}


READS_ZEROS = "the interpreter reads memory that nothing wrote as 0.0; the compiled graph shows it, on compile_only"


class Collection:
    """The kernels that a module declares, in order: with faults, which ``faults`` collects, or without it legal variants."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.known: list[KnownKernel] = []
        self._faults = faults

    def edits(self, *stages: str, **keywords: Any) -> Callable[[Edit], Edit]:
        """An edit of the fragments, and with it a kernel of each of these stages; the keywords are those of ``_weave``."""

        def declare(edit: Edit) -> Edit:
            self._weave("fragments", edit, edit, [bundled(stage) for stage in stages], **keywords)
            return edit

        return declare

    def computes(self, *stages: str, **keywords: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """The whole text of a kernel: a function of ``fragments``, the stage's arguments and ``dims``."""
        from conformance.kernels.qwen3.exam.pypto import programs

        def declare(compute: Callable[..., None]) -> Callable[..., None]:
            def edit(fragments: Any) -> None:
                fragments.compute = functools.partial(compute, fragments)

            bases = [getattr(programs, stage) for stage in stages]
            self._weave("program", functools.wraps(compute)(edit), compute, bases, **keywords)
            return compute

        return declare

    def _weave(
        self,
        hook: str,
        edit: Edit,
        declared: Callable[..., None],
        bases: Sequence[Kernel],
        *,
        name: str = "",
        kind: Kind | None = None,
        detectors: tuple[str, ...] = (),
        dims: Mapping[str, Any] | None = None,
        lane: str = INTERPRET.name,
        **changes: Any,
    ) -> None:
        """Make the kernels attributes of the module that declares them, and kernels of the exam.

        ``name`` is given where it is no Python name; ``dims`` replaces the small ones; ``lane`` is the one that shows the fault;
        ``changes`` are fields of ``Kernel``. A kernel declares nothing that is not asked for: a declared profile is judged more
        strictly than it need be, and proving capabilities takes longer than finding the fault.
        """
        name = name or declared.__name__
        made = []
        for base in bases:
            one = edited(base, f"{base.stage.name}[{name}]", edit, **{"capabilities": (), "profile": None, **changes})
            setattr(sys.modules[declared.__module__], f"{base.stage.name}_{declared.__name__}", one)
            made.append(one)
        self.add(*made, name=name, hook=hook, function=declared, kind=kind, detectors=detectors, dims=dims, lane=lane)

    def add(
        self,
        *kernels: Kernel,
        name: str,
        hook: str,
        function: Callable[..., Any],
        kind: Kind | None = None,
        detectors: tuple[str, ...] = (),
        dims: Mapping[str, Any] | None = None,
        lane: str = INTERPRET.name,
    ) -> None:
        """Kernels that are attributes of their module already: one fault, or one variant, in several stages."""
        fault = None
        if self._faults is not None:
            stages = [kernel.stage.name for kernel in kernels]
            self._faults.declare(hook, kind, *stages, name=name, detectors=detectors)(function)
            fault = self._faults.by_stage[stages[0]][name]
        for kernel in kernels:
            known = KnownKernel(
                kernel.stage.name,
                name,
                fault.kind if fault else None,
                fault.summary if fault else as_clause(kernel.summary),
                functools.partial(_same, kernel),
                lane=lane,
                dims=SMALL[kernel.stage.name] if dims is None else dims,
                detectors=fault.detectors if fault else (),
                rounds=fault.rounds if fault else (),
            )
            self.known.append(known)
            if not lane_named(lane).executes:
                self.known.append(dataclasses.replace(known, lane=INTERPRET.name, hidden=READS_ZEROS))


def _same(kernel: Kernel) -> Kernel:
    return kernel


#: The faulty kernels; a fault of the same name as a torch kernel's is the same fault.
faulty = Collection(Faults(like=torch_faults.FAULTS))
#: The legal variants.
legal = Collection()
