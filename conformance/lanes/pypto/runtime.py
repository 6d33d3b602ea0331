"""PyPTO inside a worker: load it, configure one compile, and explain its failures. Nothing else imports ``pypto``.

Two private methods of its jit object are replaced: the one that starts the cost model after every simulated call, and, where
kernels are interpreted, the one that hands arguments to the interpreter (its own copies them through a device that is not there
and leaves zeros). What a version has of these names is looked up in its text (``conformance.toolchains.capabilities``).
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import datetime
import faulthandler
import inspect
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from conformance.contract.arguments import DTYPE_NAMES
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.errors import UsageError
from conformance.lanes.card_files import MOST_BUILDS
from conformance.lanes.device_compiler import compiler_failure
from conformance.outside import tail_of, told
from conformance.toolchains.detection import ToolchainUnavailableError, detect
from conformance.toolchains.dumps import fewer_dumps

#: How the annotations of a kernel name the dtypes of a contract.
PYPTO_DTYPES: dict[torch.dtype, str] = {
    torch.bfloat16: "DT_BF16",
    torch.float16: "DT_FP16",
    torch.float32: "DT_FP32",
    torch.int32: "DT_INT32",
}

#: Shapes for which a kernel was built last, so that a run of cases of one shape builds once.
KEPT_BUILDS = 8
#: With less than this free, in bytes, a failure is put down to the disk.
LEAST_FREE = 1 << 20


class Runtime:
    """The imported toolchain. ``calculator`` is the library that the interpreter computes with; ``None`` can only compile."""

    def __init__(self, folder: Path, scratch: Path, calculator: Path | None) -> None:
        toolchain = detect()
        toolchain.require("compile_only" if calculator is None else "interpret")
        self._folder = folder
        self._scratch = scratch
        self._write_to(folder)
        if "pypto" not in sys.modules:
            prepare(folder)
        self._logs = Path(os.environ[_LOGS])
        try:
            import pypto
            from pypto import pypto_impl
            from pypto.frontend.parser import entry
            from pypto.runtime import _pto_verify_datas
        except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            # The latter two: a version that builds its native module when it is first imported, and cannot.
            home = os.environ.get("ASCEND_HOME_PATH")
            cann = (
                f"; it loads CANN's libraries, by ASCEND_HOME_PATH={home}: source CANN's set_env.sh, or unset it" if home else ""
            )
            raise ToolchainUnavailableError(f"pypto is installed but does not import: {error}{cann}") from error
        # PyPTO installs a handler of its own for fatal signals, which says less: take it back.
        faulthandler.disable()
        faulthandler.enable()
        self.pypto: Any = pypto
        self._golden: Any = _pto_verify_datas
        self._wrapper: Any = entry.JitCallableWrapper
        self._wrapper._run_with_cpu = lambda jit, inputs, outputs: None
        self._build_without_card()
        #: ``capabilities.checks_attributes``: elsewhere that option dumps data of the device.
        self._checks = toolchain.capabilities is not None and toolchain.capabilities.checks_attributes
        #: Whether it is the version whose intermediate files are known.
        self.knows_files = toolchain.supported
        if calculator is not None:
            from pypto._utils import BuildOnlineManager

            try:
                ctypes.CDLL(str(calculator), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise ToolchainUnavailableError(
                    f"PyPTO's calculator does not load ({error}): delete {calculator.parent} so that it is built anew"
                ) from error
            BuildOnlineManager().calculator_loaded = True

            def hand_over_arguments(tensors: Sequence[Any]) -> None:
                if pypto.get_verify_options().get("enable_pass_verify"):
                    pypto_impl.SetVerifyData(entry._pto_to_tensor_data(tensors), [], _pto_verify_datas.get_data())

            self._wrapper._setup_verify_data = staticmethod(hand_over_arguments)
        #: How often PyPTO compiled a kernel in this process.
        self.compiles = 0
        compile_kernel = self._wrapper.compile

        def count_and_compile(jit: Any, *arguments: Any, **keywords: Any) -> None:
            self.compiles += 1
            compile_kernel(jit, *arguments, **keywords)

        self._wrapper.compile = count_and_compile

    def _build_without_card(self) -> None:
        """Let kernels be built that name no mode, where CANN is and no card: newer versions refuse. ``call`` says the mode."""
        choose = vars(self._wrapper).get("_set_run_mode")
        if choose is None:
            return

        def choose_unless_named(jit: Any) -> None:
            jit._runtime_options = {"run_mode": self.pypto.RunMode.SIM.value, **(jit._runtime_options or {})}
            choose(jit)

        self._wrapper._set_run_mode = choose_unless_named

    def take_workspace_from(self, allocate: Callable[[int], int]) -> None:
        """Let ``allocate(bytes)`` give the address of the memory that a launch on a card works in.

        PyPTO asks for it once before each launch, after compiling. Its own is ``torch.empty``, given back before the launch.
        """
        self._wrapper.alloc = staticmethod(allocate)

    def logged_errors(self, since: datetime.datetime) -> list[str]:
        """What PyPTO's native side logged as errors since then, oldest first: the cause that its exception leaves out."""
        return errors_in(self._logs, since)

    def require_space(self) -> None:
        """Raise ``ToolchainUnavailableError`` where nothing can be written: what went wrong then is no finding about a kernel."""
        for folder in (self._scratch, self._folder):
            with contextlib.suppress(OSError):
                if shutil.disk_usage(folder).free < LEAST_FREE:
                    raise ToolchainUnavailableError(f"there is no space left in {folder}, where PyPTO writes its files")

    @contextmanager
    def output_folder(self, scale: int) -> Iterator[Path]:
        """A folder for what one compile writes, deleted afterwards; ``scale`` is the size of the arguments in bytes.

        Small cases write dozens of small files, which in memory take half the time that they take on a disk; what large
        cases write belongs on the disk.
        """
        memory = Path("/dev/shm")
        fits = scale < 64 << 20 and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
        parent = self._scratch if fits else self._folder
        parent.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
        try:
            self._write_to(folder / "output")
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def kept_folder(self, folder: Path) -> Iterator[None]:
        """A folder for what one compile writes, which stays until ``MOST_BUILDS`` others are newer."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        others = sorted(folder.parent.iterdir(), key=lambda one: one.stat().st_mtime)
        for old in others[:-MOST_BUILDS]:
            shutil.rmtree(old, ignore_errors=True)
        self._write_to(folder / "output")
        yield

    def _write_to(self, folder: Path) -> None:
        """Let PyPTO write below a folder. Versions after 0.2.0 read where only once in a process, so it is a link that moves."""
        for needed in (folder, self._scratch):
            needed.mkdir(parents=True, exist_ok=True)
        link = self._scratch / "written-to"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.resolve())
        os.environ["TILE_FWK_OUTPUT_DIR"] = str(link)

    def call(
        self,
        jit: Any,
        arguments: Sequence[torch.Tensor],
        *,
        stage: str,
        run_mode: str = "SIM",
        golden: Sequence[torch.Tensor | None] | None = None,
        verify: dict[str, Any] | None = None,
        keep: bool = False,
    ) -> None:
        """Compile the kernel for these arguments up to ``stage`` and, if ``verify`` is given, interpret it.

        With ``run_mode="NPU"`` PyPTO launches it too; with ``keep`` what was built is used again by the next call.
        """
        pypto = self.pypto
        # The kernel may set options of its own; these decide the lane.
        jit._runtime_options = {**(jit._runtime_options or {}), "run_mode": getattr(pypto.RunMode, run_mode).value}
        jit._host_options = {**(jit._host_options or {}), "compile_stage": getattr(pypto.CompStage, stage)}
        jit._verify_options = {"enable_pass_verify": verify is not None, **(verify or {})}
        if self._checks:  # what is passed must be what is annotated
            jit._debug_options = {**(jit._debug_options or {}), "runtime_debug_mode": 3}
        if golden is not None:
            pypto.set_verify_golden_data(goldens=list(golden))
        began, compiles = datetime.datetime.now(), self.compiles
        try:
            jit(*arguments)
            if self.compiles > compiles and os.environ.get("ASCEND_HOME_PATH"):
                # Versions after 0.2.0 log that the device's compiler failed, and go on without a program.
                # Where CANN is told to print its logs (ASCEND_SLOG_PRINT_TO_STDOUT), PyPTO's are printed too.
                logged = [*self.logged_errors(began), tail_of(self._folder / "stdout.log")]
                if compiler_failure(logged):
                    said = compiler_failure([tail_of(self._folder / "stderr.log"), *logged])
                    raise RuntimeError(f"the device's compiler failed: {said}")
        finally:
            # PyPTO forgets these only after a success, and its module cache keeps every kernel ever built.
            self._golden.reset()
            if not keep:
                self._wrapper._kernel_module_cache.clear()
            # The native side keeps its tables in C buffers.
            ctypes.CDLL(None).fflush(None)


#: Where PyPTO's native side logs: read once, when its libraries start. Without it PyPTO writes to the home folder.
_LOGS = "ASCEND_PROCESS_LOG_PATH"


def prepare(folder: Path) -> None:
    """What must be so before ``pypto`` is imported for the first time in a process; logs go below ``folder``."""
    os.environ[_LOGS] = str(folder / "plog")
    # Read when a compile begins, and when the libraries start.
    os.environ.setdefault("TILE_FWK_OUTPUT_DIR", str(folder))
    library = fewer_dumps()
    if library is not None:
        with contextlib.suppress(OSError):  # one that does not load costs time, and nothing else
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Builds:
    """The jit objects of one kernel, built and checked once per dimensions."""

    def __init__(self, runtime: Runtime, kernel: Kernel, most: int = KEPT_BUILDS) -> None:
        self._runtime = runtime
        self._kernel = kernel
        self._most = most
        self._kept: dict[Dims, Any] = {}

    def __getitem__(self, dims: Dims) -> Any:
        key = self._kernel.built_for(dims)
        if key not in self._kept:
            jit = self._kernel.build(dims)
            require_agreement(jit, self._kernel, key, self._runtime.pypto)
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = jit
        require_one_program(self._kept[key], self._kernel, key, dims)
        return self._kept[key]


def require_agreement(jit: Any, kernel: Kernel, dims: Dims, pypto: Any) -> None:
    """Raise ``UsageError`` unless the kernel's annotated parameters are the stage's arguments: number, order, dtype, shape.

    PyPTO itself accepts tensors of another dtype or shape than annotated and computes nonsense. An axis may be
    ``pypto.DYNAMIC``, or ``pypto.STATIC``, of which ``require_one_program`` says what it is worth.
    """
    if not hasattr(jit, "_cached_signature"):
        raise UsageError(
            f"kernel {kernel.name}: the builder must return a pypto.frontend.jit object, it returned {type(jit).__name__}"
        )
    tensors, others = jit._cached_signature
    expected = [argument.name for argument in kernel.stage.arguments]
    found = [tensor.name for tensor in tensors]
    required = [name for name in others if name not in jit._cached_non_tensor_defaults]
    if found != expected or required:
        raise UsageError(
            f"kernel {kernel.name}: expected the parameters of {kernel.stage.name}, ({', '.join(expected)}), each annotated "
            f"with pypto.Tensor(shape, dtype); found ({', '.join([*found, *required])})"
        )
    for argument, tensor in zip(kernel.stage.arguments, tensors, strict=True):
        where = f"kernel {kernel.name}, argument {argument.name}: "
        wanted = PYPTO_DTYPES[argument.dtype]
        annotated = tensor.explicit_dtype if hasattr(tensor, "explicit_dtype") else tensor.status_dtype
        if annotated is None or tensor.dtype != getattr(pypto, wanted):
            given = "no dtype" if annotated is None else f"pypto.{tensor.dtype.name}"
            raise UsageError(
                f"{where}expected {DTYPE_NAMES[argument.dtype]} (pypto.{wanted}), found {given}; correct its annotation"
            )
        size = argument.size(dims)
        axes = list(tensor.shape)
        fits = len(axes) == len(size) and all(
            not isinstance(axis, int) or axis == extent for axis, extent in zip(axes, size, strict=True)
        )
        if not fits or any(axis is Ellipsis for axis in axes):
            shown = ", ".join(str(getattr(axis, "name", axis)) for axis in axes)
            raise UsageError(
                f"{where}expected shape [{', '.join(map(str, size))}] ({argument.shape}), found [{shown}]; correct its annotation"
            )


def require_one_program(jit: Any, kernel: Kernel, built: Dims, dims: Dims) -> None:
    """Raise ``RuntimeError`` where a build for ``built`` would be compiled anew for ``dims``: an axis is ``pypto.STATIC``.

    PyPTO takes any extent there, and makes another program of each.
    """
    for argument, tensor in zip(kernel.stage.arguments, jit._cached_signature[0], strict=True):
        sizes = zip(tensor.shape, argument.shape.split(), argument.size(built), argument.size(dims), strict=True)
        for position, (axis, symbols, before, now) in enumerate(sizes):
            if before != now and getattr(axis, "name", None) == "STATIC":
                raise RuntimeError(
                    f"argument {argument.name}: axis {position} ({symbols}) is pypto.STATIC, and PyPTO compiles another program "
                    f"for {now} than for {before}; annotate it as pypto.DYNAMIC"
                )


def errors_in(logs: Path, since: datetime.datetime) -> list[str]:
    """What this process's logs below a folder have as errors since then, by file, oldest first."""
    found: list[str] = []
    for path in sorted(logs.glob(f"**/*-{os.getpid()}_*.log")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            match = _LOGGED.match(line)
            if match and f"{match[1]} {match[2]}" >= f"{since:%Y-%m-%d %H:%M:%S}":
                found.append(match[3].strip())
    return found


#: A line of a log: PyPTO's has a space between date and time, CANN's a hyphen (``2025-12-22-19:40:01.123.456``).
_LOGGED = re.compile(r"\[ERROR\] [^:]*:(\d{4}-\d\d-\d\d)[ -](\d\d:\d\d:\d\d)\S* (?:\[[^\]]*\][: ]?)*(.*)")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A failure as a person wants it: the cause in one line, and ``file:line`` in the kernel's text if it is known."""

    message: str
    location: str | None


class FirstCause(logging.Handler):
    """Remembers the first failure that PyPTO logged.

    When tracing fails, PyPTO goes on to compile what there is, fails again, and raises the second error.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.error: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the exception that is being handled."""
        if self.error is None:
            self.error = sys.exc_info()[1]

    @contextmanager
    def listening(self) -> Iterator[FirstCause]:
        """Listen to the root logger, which PyPTO uses."""
        root = logging.getLogger()
        root.addHandler(self)
        try:
            yield self
        finally:
            root.removeHandler(self)


def explain(error: BaseException, jit: Any, first: BaseException | None = None, logged: Sequence[str] = ()) -> Explanation:
    """What went wrong in building, compiling or interpreting, without colours, banners and native stack frames.

    ``logged`` is what the native side logged: its first line is the cause, where the exception only says that a pass failed.
    """
    cause = first or error
    source = inspect.getsourcefile(jit._original_func) if jit is not None else None
    location = None
    for candidate in (first, error, error.__context__):
        if candidate is not None and location is None:
            location = _location(candidate, source)
    message = clean(cause)
    if "Run pass failed" in message and logged:
        passes = [match[1] for line in logged if (match := _FAILED_PASS.search(line))]
        message = f"compiler pass {passes[0] if passes else ''} failed: {logged[0]}".replace("  ", " ")
    return Explanation(message, location)


_FAILED_PASS = re.compile(r"Run pass \[(\w+)\] failed")
_NOISE = re.compile(r"\x1b\[[0-9;]*m|INTERNAL BUG \S+:\d+:\d+:")
_NATIVE_FRAME = re.compile(r"^\S+\.so\S*\(.*\) ?\[0x[0-9a-f]+\]|^lib\S+\(.*\[0x|^#\d+ ")
_CODED = re.compile(r"Err[Cc]ode: (\w+)!\s*(.*?), func \w+, file \S+, line \d+", re.DOTALL)


def clean(error: BaseException) -> str:
    """An error's cause in one line."""
    said = told(error).removeprefix(f"{type(error).__name__}: ")
    lines = [line.strip() for line in _NOISE.sub("", said).splitlines()]
    text = " ".join(line for line in lines if line and not _NATIVE_FRAME.match(line))
    text = _CODED.sub(lambda match: f"{match[2].strip()} (PyPTO error {match[1]})", text).strip()
    if type(error).__module__.startswith("pypto") or isinstance(error, RuntimeError):
        named = text.removeprefix("RuntimeError: ")
    else:
        named = f"{type(error).__name__}: {text}"
    if len(named) > 600:
        named = named[:597] + "..."
    return named or type(error).__name__


def _location(error: BaseException, source: str | None) -> str | None:
    """The line of the kernel's text that an error belongs to.

    The kernel's body is not executed by Python but visited as a syntax tree, so the line is that of the node that was being
    visited; a builder or a helper function has frames of its own.
    """
    line: int | None = None
    file = source
    node = getattr(error, "node", None)
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        visited = frame.f_locals.get("node")
        if isinstance(visited, (ast.stmt, ast.expr)) and hasattr(visited, "lineno"):
            file, line = source, visited.lineno
        elif source is not None and frame.f_code.co_filename == source:
            file, line = source, traceback.tb_lineno
        traceback = traceback.tb_next
    if line is None and isinstance(node, (ast.stmt, ast.expr)):
        line = node.lineno
    return f"{file}:{line}" if file and line else None
