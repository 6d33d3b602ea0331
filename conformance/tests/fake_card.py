"""A fake driver underneath PyPTO's own Python: ``torch.npu``, ``torch_npu`` and the native launch, with a script of faults.

Tensors are placed on torch's device ``npu``, in memory that the host cannot read, where torch has what that takes
(``fake_memory``), otherwise on the host.

The launch does what the one of PyPTO 0.2.0 does, as its source says: it looks for a program in the kernel's module by the shapes
of its arguments, with wildcards where an axis is dynamic; lets the kernel's object compile if there is none; asks it for a
workspace; and launches. Errors that a card finds out later are raised when somebody waits for it. Once there was one, every call
of the process fails.

``CONFORMANCE_FAKE_CARDS`` names a folder with ``script.json``. What happens is appended to ``events.jsonl`` there:

``cards``    by number the fault of a card: ``wedged``, ``hangs``, ``gone``, ``old_driver``; ``after`` so many launches
``kernels``  by name the fault of a kernel, with ``at``: only at these launches of it, counted from 1
``compute``  by name what a kernel of the user's computes, ``module:function``, called with the arguments and ``dims``; a kernel
             that is not named computes what the exam's torch kernel of its stage does
``seconds``  how long a launch takes; by default it ends at once
``compile``  ``real`` to let PyPTO compile, which takes half a second; otherwise compiling is only counted
``compiler`` how the device's compiler fails: ``exits`` as in PyPTO 0.2.0, ``silent`` or ``printed`` as in later ones;
             ``kernels`` if not for all
"""

from __future__ import annotations

import ctypes
import datetime
import importlib
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from conformance.contract.dims import Dims, Role
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel
from conformance.lanes.buffers import poisoned
from conformance.lanes.cards import Card
from conformance.lanes.pypto.device import NpuCard
from conformance.lanes.pypto.runtime import Runtime
from conformance.lanes.pypto.serve import Build
from conformance.tests.fake_memory import MISSING, FakeMemory, HostMemory

FOLDER = "CONFORMANCE_FAKE_CARDS"
CARD = f"{__name__}:FakeCard"
#: Bytes of a launch's workspace.
WORKSPACE = 1 << 12
OTHER_VERSION = "Get KFC DynTileFwkKernelServer api success, but func is nullptr: (null)"
COMPILER_ERROR = "pto_instr.hpp:12:5: error: use of undeclared identifier 'copy_gm_to_ubuf_align_v2'"
AICORE = "there is an aivec error exception, core id is 12, errorStr: The DDR address of the MTE instruction is out of range"


class FakeCard(NpuCard):
    """The lane's own card on the fake driver."""

    def __init__(self, runtime: Runtime, card: Card, folder: Path) -> None:
        self._fake = FakeDriver(runtime, card.number, Path(os.environ[FOLDER]))
        super().__init__(runtime, card, folder)

    def place(self, storage: torch.Tensor) -> torch.Tensor:
        """Remembered, to see later what is left there."""
        placed = super().place(storage)
        self._fake.placed.append(placed)
        return placed

    def read_back(self, storage: torch.Tensor) -> torch.Tensor:
        """Told, with its size in bytes."""
        self._fake.tell("read", nbytes=storage.nbytes)
        return super().read_back(storage)

    def compile(self, build: Build, kept: Path) -> None:
        """Remembered: what is launched later says nothing of its stage and little of its dimensions."""
        self._fake.builds[id(build.jit)] = build
        super().compile(build, kept)

    def driver(self) -> Any:
        """The fake one, installed."""
        from pypto import pypto_impl

        module: Any = types.ModuleType("torch_npu")
        module.get_npu_format = lambda tensor: 2  # rows one after another (ND)
        sys.modules["torch_npu"] = module
        torch.npu = self._fake  # type: ignore[attr-defined]
        pypto_impl.LaunchKernelTorch = self._fake.launch
        return self._fake

    def device(self, index: int) -> torch.device:
        """Where tensors are placed."""
        return torch.device("cpu") if MISSING else super().device(index)


class FakeDriver:
    """``torch.npu`` and the native launch of one process."""

    def __init__(self, runtime: Runtime, index: int, folder: Path) -> None:
        self._runtime, self._index, self._folder = runtime, index, folder
        self._memory = HostMemory() if MISSING else FakeMemory(self, self._before_operator)
        self._device = ""
        self._script = json.loads((folder / "script.json").read_text())
        #: The programs of each kernel module, by the shapes that they take.
        self._programs: list[tuple[Any, list[tuple[int, ...]]]] = []
        self.placed: list[torch.Tensor] = []
        self.builds: dict[int, Build] = {}
        self._computes: dict[str, Callable[..., Any]] = {}
        self._pending = ""
        self._late = False
        self._dead = False
        #: Seconds that the launch takes which goes on.
        self._running = 0.0

    def tell(self, event: str, **details: Any) -> None:
        """Append an event."""
        line = json.dumps({"event": event, "card": self._index, "process": os.getpid(), **details})
        with (self._folder / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    # torch.npu

    def set_device(self, index: int) -> None:
        self._require_alive()
        self.tell("set_device", index=index, variable=os.environ["TILE_FWK_DEVICE_ID"])
        if self._fault() == "gone":
            self._fail("SetDevice: error code is 107001 (invalid device id)")
        self._device = "cpu" if MISSING else f"npu:{index}"

    def get_device_name(self, index: int) -> str:
        return "Ascend910B4 (fake)"

    def synchronize(self) -> None:
        time.sleep(self._running)
        self._running = 0.0
        self.tell("synchronize")
        self.Event.waits += 1
        if self._pending == "hang":
            time.sleep(60)
        if self._pending:
            self._fail(self._pending)
        self._require_alive()

    def current_stream(self) -> Any:
        return types.SimpleNamespace(npu_stream=7)

    class Event:
        """An event of a clock that only a wait for the card moves: by a second."""

        waits = 0

        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = type(self).waits

        def elapsed_time(self, other: FakeDriver.Event) -> float:
            return 2.5 + 1000 * (other.at - self.at)

    # pypto_impl.LaunchKernelTorch

    def launch(self, jit: Any, stream: int, tensors: Sequence[torch.Tensor], definitions: Sequence[Any]) -> None:
        """Compile if need be, and launch."""
        import pypto
        from pypto import pypto_impl

        self._require_alive()
        if {str(tensor.device) for tensor in tensors} != {self._device}:
            raise RuntimeError(f"not on {self._device}: {[str(tensor.device) for tensor in tensors]}")
        name = jit.__name__
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if not any(module is jit.kmodule and _match(known, shapes) for module, known in self._programs):
            self.tell("compile", kernel=name, shapes=shapes)
            if self._script.get("compile") == "real":
                asked = jit._host_options
                # What follows needs the device's compiler.
                jit._host_options = {**asked, "compile_stage": pypto.CompStage.EXECUTE_GRAPH}
                with pypto.options("jit_scope"):
                    pypto_impl.Reset()
                    jit.compile(tensors, definitions)
                jit._host_options = asked
            else:
                self._runtime.compiles += 1
            if self._compiler_fails(name):
                return
            takes = [_wildcards(definition, shape) for definition, shape in zip(definitions, shapes, strict=True)]
            self._programs.append((jit.kmodule, takes))
        workspace = jit.alloc(WORKSPACE)
        pointers = [tensor.data_ptr() for tensor in tensors]
        used = [one for one in self.placed if any(0 <= at - one.data_ptr() < one.nbytes for at in pointers)]
        left = [one for one in self.placed if not any(one is other for other in used)]
        readable = sum(not bool(poisoned(self._memory.on_host(one)).all()) for one in left)
        self.tell(
            "launch",
            kernel=name,
            stream=stream,
            device=self._device,
            pointers=pointers,
            workspace=workspace,
            shapes=shapes,
            placed=len(self.placed),
            readable=readable,
        )
        self._running = float(self._script.get("seconds", 0))
        on_host = self._memory.address_on_host
        bound = [_bound(on_host(address), tensor) for address, tensor in zip(pointers, tensors, strict=True)]
        self._run(name, self.builds.get(id(jit)), bound, on_host(workspace))

    def _compiler_fails(self, name: str) -> bool:
        """Whether it does as in later versions: the failure is logged, and no program is there to launch."""
        fails = self._script.get("compiler", {})
        if name not in fails.get("kernels", [name]) or not fails:
            return False
        print(COMPILER_ERROR, file=sys.stderr, flush=True)
        if fails["how"] == "exits":
            print("Caught exception: 'Errcode: F0F619!\nParallel compilation failed with return code: 512, func", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        os.environ["ASCEND_HOME_PATH"] = str(self._folder)
        log = Path(os.environ["ASCEND_PROCESS_LOG_PATH"]) / "debug" / "plog" / f"pypto-log-{os.getpid()}_20261129000216513.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        now = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}.513"
        failed = "[codegen_npu.cpp:638][CODEGEN]:ErrCode: F63001! kernel compilation failed, ret = 512"
        logged = f"[ERROR] PYPTO({os.getpid()}):{now} {failed}\ncompile cmd is:\n make -j8\n"
        if fails["how"] == "printed":
            print(logged, flush=True)
        else:
            log.write_text(logged)
        return True

    def _run(self, name: str, build: Build | None, tensors: Sequence[torch.Tensor], workspace: int) -> None:
        fault, count = self._fault(), self._launches(name)
        if fault in ("wedged", "hangs"):
            self._pending = "hang" if fault == "hangs" else "synchronize: error code is 507018"
            return
        if fault == "old_driver":
            print(
                "[ERROR] CCECPU(1,aicpu_scheduler): Get KFC DynTileFwkKernelServer api success, but func is nullptr: (null)",
                flush=True,
            )
            self._fail("launch aicpu failed: 507018")
        own = self._script.get("kernels", {}).get(name, {})
        fault = own.get("fault", "") if count in own.get("at", [count]) else ""
        if fault == "at_launch":
            print(f"[ERROR] {AICORE}; retcode: 507015", flush=True)
            self._fail("launch aicore failed: 507015")
        if fault == "at_synchronize":
            self._pending = "synchronize: NPU function error, error code is 507018"
            return
        if fault == "hang":
            self._pending = "hang"
            return
        if fault == "sticky":
            self._fail("synchronize: error code is 507899")
        if fault == "out_of_memory":
            self._fail("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity)[ERROR] ERR00006")
        if fault == "wedges":
            (self._folder / f"wedged-{self._index}").touch()
            self._pending = "synchronize: error code is 507018"
            return
        if build is None:
            assert name == "conformance_probe"
            a, b, out = tensors
            out.copy_(a.float() @ b.float() + 1)
            return
        self._compute(name, build)(*tensors, dims=_dims_of(build, tensors))
        out = [tensor for tensor, argument in zip(tensors, build.stage.arguments, strict=True) if argument.access != "in"][-1]
        if fault == "wrong":
            out.view(-1)[5] += 1
        self._late = fault == "late"
        if fault == "spoils":
            largest = max((tensor for tensor in tensors if tensor is not out), key=lambda tensor: tensor.nbytes)
            largest.view(torch.uint8).view(-1)[-1] ^= 1
        if fault == "overrun":
            torch.frombuffer(_memory(out.data_ptr() + out.nbytes, 40_000), dtype=out.dtype).fill_(1.0)
        if fault == "stale_workspace":
            # What a kernel does that sums up in its workspace and never cleared it.
            stale = torch.frombuffer(_memory(workspace, 16), dtype=torch.bfloat16)
            out.view(-1)[:8] += stale

    def _compute(self, name: str, build: Build) -> Callable[..., Any]:
        """What a kernel does with its arguments: it writes all that are outputs."""
        if name not in self._computes:
            module, _, attribute = self._script.get("compute", {}).get(name, "").partition(":")
            own = getattr(importlib.import_module(module), attribute) if module else torch_kernel(build.stage.name)
            self._computes[name] = own
        return self._computes[name]

    def _fault(self) -> str:
        if (self._folder / f"wedged-{self._index}").exists():
            return "wedged"
        own = self._script.get("cards", {}).get(str(self._index), {})
        return str(own.get("fault", "")) if self._launches(card=self._index) > own.get("after", 0) else ""

    def _launches(self, kernel: str = "", card: int | None = None) -> int:
        path = self._folder / "events.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        launched = [event for event in events if event["event"] == "launch"]
        return sum((not kernel or one["kernel"] == kernel) and card in (None, one["card"]) for one in launched) or (not kernel)

    def _before_operator(self) -> None:
        # What went wrong in a launch that was waited for and read back shows where the card is used next.
        self._dead |= self._late
        self._require_alive()

    def _require_alive(self) -> None:
        if self._dead:
            raise RuntimeError("NPU function error, error code is 507899")

    def _fail(self, message: str) -> None:
        self._dead, self._pending = True, ""
        raise RuntimeError(message)


def _wildcards(definition: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size if isinstance(axis, int) else -1 for axis, size in zip(definition.shape, shape, strict=True))


def _match(known: list[tuple[int, ...]], shapes: list[tuple[int, ...]]) -> bool:
    return all(
        len(one) == len(shape) and all(axis in (-1, size) for axis, size in zip(one, shape, strict=True))
        for one, shape in zip(known, shapes, strict=True)
    )


def _dims_of(build: Build, tensors: Sequence[torch.Tensor]) -> Dims:
    """The dimensions of a launch: those of the build, but for the axes that one build serves at any size."""
    found: dict[str, int] = {}
    roles: tuple[Role, ...] = ("batch", "tokens")
    for role in roles:
        symbol = build.dims.symbol(role)
        for argument, tensor in zip(build.stage.arguments, tensors, strict=True):
            if (symbol,) in argument.axes:
                found[role] = tensor.shape[argument.axes.index((symbol,))]
    return build.dims.resized(**found)


def _memory(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


def _bound(address: int, like: torch.Tensor) -> torch.Tensor:
    """What the native side makes of an argument: its address and its shape, nothing else."""
    return torch.frombuffer(_memory(address, like.nbytes), dtype=like.dtype).view(like.shape)


def events(folder: Path, event: str | None, **details: Any) -> list[dict[str, Any]]:
    """The events of one kind, or of all, in their order, of which all ``details`` are as given."""
    path = folder / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    of_kind = [one for one in found if event in (None, one["event"])]
    return [one for one in of_kind if all(one.get(name) == value for name, value in details.items())]


def overlaps(told: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The launches on a card before another process had waited for its own there."""
    running: dict[int, int] = {}
    found = []
    for event in told:
        card, process = event["card"], event["process"]
        if event["event"] == "launch":
            if running.get(card, process) != process:
                found.append(event)
            running[card] = process
        elif event["event"] == "synchronize" and running.get(card) == process:
            del running[card]
    return found
