"""How a faulty kernel, or a legal variant, is made of a bundled one: its builder is run with some fragments replaced.

A builder imports ``kernels.qwen3.fragments`` when it is called. For the time of that call the module is a fresh copy that an
*edit* has changed; the program keeps the copy, everyone else the original. Where a fault lies in a kernel's own text and not in a
fragment, the kernel is one of ``programs.py``, whose whole text is a call of ``fragments.compute``, and the edit supplies that.

Both kinds are declared by a decorator, ``Exam.edits`` or ``Exam.computes``, above one small function. Its name is the fault's,
the first line of its docstring the summary; the kernels become attributes of its module, where a worker process finds them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import kernels.qwen3
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.exam.known_kernels import Kind, KnownKernel
from kernels.qwen3.contract import MODEL

#: Changes a copy of ``kernels.qwen3.fragments`` in place.
Edit = Callable[[Any], None]


@contextlib.contextmanager
def replaced_fragments(edit: Edit) -> Iterator[ModuleType]:
    """``from kernels.qwen3 import fragments`` gives a copy of that module with ``edit`` applied, until the block ends."""
    from kernels.qwen3 import fragments as original

    spec = original.__spec__
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    edit(copy)
    kernels.qwen3.fragments = copy
    try:
        yield copy
    finally:
        kernels.qwen3.fragments = original


def edited(bundled: Kernel, name: str, edit: Edit, **changes: Any) -> Kernel:
    """The kernel that the bundled one's builder makes of edited fragments; ``changes`` are other fields of ``Kernel``."""

    @functools.wraps(edit)
    def build(dims: Dims) -> Any:
        with replaced_fragments(edit):
            return bundled.function(dims)

    return dataclasses.replace(bundled, function=build, name=name, **changes)


def bundled(stage: str) -> Kernel:
    """The kernel of a stage that comes with the model."""
    (module,) = (name for name in MODEL.kernel_modules if name.rpartition(".")[2] == stage)
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


class Exam:
    """Collects the subjects that a module declares, in order; ``kind`` is given for each fault, and for no legal variant."""

    def __init__(self) -> None:
        self.subjects: list[KnownKernel] = []

    def edits(self, *stages: str, **keywords: Any) -> Callable[[Edit], Edit]:
        """An edit of the fragments, and with it a kernel of each of these stages; the keywords are those of ``_add``."""

        def declare(edit: Edit) -> Edit:
            for stage in stages:
                self._add(bundled(stage), edit, edit, **keywords)
            return edit

        return declare

    def computes(self, *stages: str, **keywords: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """The whole text of a kernel: a function of ``fragments``, the stage's arguments and ``dims``."""
        from kernels.qwen3.exam.pypto import programs

        def declare(compute: Callable[..., None]) -> Callable[..., None]:
            def edit(fragments: Any) -> None:
                fragments.compute = functools.partial(compute, fragments)

            for stage in stages:
                self._add(getattr(programs, stage), functools.wraps(compute)(edit), compute, **keywords)
            return compute

        return declare

    def _add(
        self,
        base: Kernel,
        edit: Edit,
        declared: Callable[..., None],
        *,
        name: str | None = None,
        kind: Kind | None = None,
        dims: Mapping[str, Any] | None = None,
        lane: str = "interpret",
        **changes: Any,
    ) -> None:
        """Make the kernel an attribute of the module that declares it, and a subject of the exam.

        ``name`` is given where it is no Python name; ``dims`` replaces the small ones; ``lane`` is the one that shows the fault;
        ``changes`` are fields of ``Kernel``. A kernel declares nothing that is not asked for: a declared profile is judged more
        strictly than it need be, and proving capabilities takes longer than finding the fault.
        """
        name = name or declared.__name__
        made = edited(base, f"{base.stage_name}[{name}]", edit, **{"capabilities": (), "profile": None, **changes})
        setattr(sys.modules[declared.__module__], f"{base.stage_name}_{declared.__name__}", made)
        self.add(made, name, kind=kind, dims=dims, lane=lane)

    def add(
        self,
        kernel: Kernel,
        name: str,
        *,
        kind: Kind | None = None,
        dims: Mapping[str, Any] | None = None,
        lane: str = "interpret",
    ) -> None:
        """A kernel that is an attribute of its module already is a subject too."""
        chosen = SMALL[kernel.stage_name] if dims is None else dims
        subject = KnownKernel(kernel.stage_name, name, kind, kernel.summary, lambda: kernel, lane=lane, dims=chosen)
        self.subjects.append(subject)
        if lane == "compile_only":
            self.subjects.append(dataclasses.replace(subject, lane="interpret", hidden=READS_ZEROS))
