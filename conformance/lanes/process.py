"""One persistent worker process round one kernel: started on first use, limited, killed, started anew; never left behind."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.errors import UsageError
from conformance.lanes import lane_named, lanes_of
from conformance.lanes.arena import Arena
from conformance.lanes.base import Outcome
from conformance.lanes.device import DEVICE_EXECUTORS
from conformance.lanes.forking import UNKNOWN_EXIT, ForkedProcess, fork_server
from conformance.lanes.messages import Done, KernelAddress, Passes, Ready, Refused, Run, Start
from conformance.lanes.scratch import ScratchFolder
from conformance.toolchains.calculator import Progress
from conformance.toolchains.detection import ToolchainUnavailableError

if TYPE_CHECKING:
    from conformance.cases.case import Case

#: Set in a worker's environment: a kernel's file that itself judges kernels would start workers without end.
INSIDE_WORKER = "CONFORMANCE_INSIDE_WORKER"
#: How often limits are looked at, in seconds. A kernel that allocates as fast as memory allows gains some 100 MB in between.
POLL_SECONDS = 0.05
#: How much of what a dead worker printed is shown.
TAIL_LINES = 12
#: A worker's log is emptied after a run that left it larger than this, in bytes.
LOG_LIMIT = 1 << 20


#: The fault handler's list of frames, which is reduced to the kernel's own line.
_FAULT_HANDLER = re.compile(r'  File "|  <.*>$|Extension modules:|(Current thread|Thread) 0x')


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a kernel may use: wall-clock seconds of one run, of starting its process, and resident memory in bytes."""

    seconds: float = 120.0
    start_seconds: float = 120.0
    memory_bytes: int = 8 << 30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise UsageError(f"limit {field.name} must be a positive number, found {value!r}")


class _FailureError(Exception):
    """The worker was killed or died; ``outcome`` says how."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


class _UnknownEndError(Exception):
    """The worker has ended, and so had its fork server: nobody knows how it ended."""


class KernelProcess:
    """Runs one kernel in one lane, in a process of its own.

    ``lane`` is the name of one that takes the kernel's toolchain (``conformance.lanes.LANES``). ``folder`` takes the worker's
    logs; without one they go to a temporary folder that ``close`` removes. ``device_executor="interpret"`` lets the interpreter
    stand in for the card in the device lane. ``progress`` is told of a wait (the calculator's first build).

    What a kernel does is an ``Outcome``, whatever it does. ``UsageError`` is raised for what is wrong with the question: a lane
    that the toolchain does not have, a kernel that another process cannot import, annotations that are not the contract's.
    """

    def __init__(
        self,
        kernel: Kernel,
        lane: str,
        *,
        limits: Limits = Limits(),
        folder: Path | None = None,
        device_executor: str = "npu",
        progress: Progress | None = None,
    ) -> None:
        self._lane = lane_named(lane)
        if kernel.toolchain not in self._lane.toolchains:
            known = ", ".join(one.name for one in lanes_of(kernel.toolchain))
            raise UsageError(f"kernel {kernel.name} is a {kernel.toolchain} kernel, whose lanes are {known}; found {lane!r}")
        if device_executor not in DEVICE_EXECUTORS:
            raise UsageError(f"device_executor is {' or '.join(map(repr, DEVICE_EXECUTORS))}, found {device_executor!r}")
        self.kernel = kernel
        self.lane = lane
        self.limits = limits
        if os.environ.get(INSIDE_WORKER):
            raise UsageError("this file judges kernels when it is imported: put that below if __name__ == '__main__':")
        self._address = address_of(kernel)
        self._device_executor = device_executor
        self._progress = progress
        self._folder = folder
        self._temporary: ScratchFolder | None = None
        self._scratch: ScratchFolder | None = None
        self._arena: Arena | None = None
        self._process: ForkedProcess | subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._lifeline: int | None = None
        self._unavailable: str | None = None
        self._forks = True
        #: How many worker processes were started so far.
        self.starts = 0

    def __enter__(self) -> KernelProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A forgotten process must not outlive its owner's interest in it.
        if getattr(self, "_process", None) is not None:
            self.close()

    @property
    def pid(self) -> int | None:
        """The number of the worker process; ``None`` while there is none."""
        return None if self._process is None else self._process.pid

    def run(self, case: Case, passes: Passes = "last") -> Outcome:
        """Run the kernel on a case; ``passes`` says which compiler passes the interpret lane compares with the tensor graph."""
        if not self._lane.executes:
            raise UsageError(f"the {self.lane} lane executes nothing: use compile(dims)")
        if passes not in ("last", "all", "none"):
            raise UsageError(f"passes is 'last', 'all' or 'none', found {passes!r}")

        def request() -> Run:
            assert self._arena is not None
            inputs = ((argument.name, case.inputs[argument.name].contiguous()) for argument in case.stage.inputs)
            return Run(case.dims, passes, case.key, self._arena.write(inputs))

        outcome = self._ask(request)
        missing = [argument.name for argument in case.stage.outputs if argument.name not in outcome.outputs]
        if outcome.status == "ok" and missing:
            # Not the kernel's doing, and no pass: a run that executed leaves every output.
            raise UsageError(
                f"lane {self.lane} ended well and returned no {', '.join(missing)}: a lane that executes returns them all"
            )
        return outcome

    def compile(self, dims: Dims) -> Outcome:
        """Compile the kernel for these dimensions; no input is needed and nothing is executed."""
        if self._lane.executes:
            raise UsageError(f"the {self.lane} lane runs cases: use run(case)")
        return self._ask(lambda: Run(dims, "none"))

    def close(self) -> None:
        """End the worker and remove its temporary files; closing twice is harmless, and a later run starts anew."""
        self._stop()
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        if self._temporary is not None:
            self._temporary.close()
            self._temporary = self._folder = None

    def _ask(self, request: Callable[[], Run]) -> Outcome:
        """Ask the worker, started first if there is none; ``request`` writes what it needs into the arena."""
        if self._unavailable is not None:
            return Outcome("unavailable", message=self._unavailable)
        began = time.monotonic()
        try:
            self._start()
            run = request()
            began = time.monotonic()
            answer = self._exchange(run, self.limits.seconds)
        except ToolchainUnavailableError as error:
            # What a machine lacks it will lack for the next case too.
            self._unavailable = str(error)
            self._stop()
            return Outcome("unavailable", message=self._unavailable)
        except _FailureError as failure:
            self._stop()
            failure.outcome.seconds = time.monotonic() - began
            return failure.outcome
        except _UnknownEndError:
            # It may have nothing to do with the kernel: ask once more, in a process whose end is seen here.
            self._stop()
            self._forks = False
            return self._ask(request)
        except UsageError:
            raise
        except BaseException:
            # An interrupt: the worker may be in the middle of anything.
            self._stop()
            raise
        assert isinstance(answer, Done)
        assert self._arena is not None or not answer.slots
        for slot in answer.slots:
            assert self._arena is not None
            # Copied, since the next case reuses the memory.
            answer.outcome.outputs[slot.name] = self._arena.view(slot).clone()
        if answer.healthy:
            self._trim_logs()
        else:
            self._stop()
        return answer.outcome

    def _start(self) -> None:
        if self._process is not None:
            return
        library = self._lane.require(self._device_executor, self._progress)
        if self._folder is None:
            self._temporary = ScratchFolder(Path(tempfile.gettempdir()))
            self._folder = self._temporary.path
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._scratch is None:
            memory = Path("/dev/shm")
            self._scratch = ScratchFolder(memory if os.access(memory, os.W_OK) else self._folder)
        if self._arena is None:
            self._arena = Arena()
        ours, theirs = socket.socketpair()
        reading, self._lifeline = os.pipe()
        self._connection = Connection(ours.detach())
        descriptors = (theirs.fileno(), self._arena.descriptor, reading)
        self.starts += 1
        try:
            with (self._folder / "stdout.log").open("ab") as out, (self._folder / "stderr.log").open("ab") as errors:
                out.truncate(0)
                errors.truncate(0)
                self._process = self._start_process(descriptors, out.fileno(), errors.fileno())
        finally:
            theirs.close()
            os.close(reading)
        start = Start(
            kernel=self._address,
            lane=self.lane,
            search_path=tuple(entry for entry in sys.path if entry),
            folder=self._folder.resolve(),
            scratch=self._scratch.path,
            calculator=library,
            device_executor=self._device_executor,
        )
        self._exchange(start, self.limits.start_seconds)

    def _start_process(self, descriptors: tuple[int, ...], out: int, errors: int) -> ForkedProcess | subprocess.Popen[bytes]:
        """A worker, forked where the lane allows that; else a new interpreter, which imports everything anew."""
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
        environment = {**os.environ, "PYTHONPATH": path, INSIDE_WORKER: "1"}
        preload = self._lane.preloads(self._device_executor)
        server = fork_server(preload, environment) if preload is not None and self._forks else None
        forked = server.fork(descriptors, out, errors, environment) if server is not None else None
        if forked is not None:
            return forked
        return subprocess.Popen(
            [sys.executable, "-m", "conformance.lanes.worker", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            pass_fds=descriptors,
            # A group of its own: what the kernel starts is killed with it, and Ctrl-C is left to the owner.
            start_new_session=True,
            env=environment,
        )

    def _exchange(self, request: object, seconds: float) -> object:
        """Send a request and wait for its answer, within the limits."""
        assert self._connection is not None
        assert self._process is not None
        what = "starting its process" if isinstance(request, Start) else "the run"
        deadline = time.monotonic() + seconds
        try:
            self._connection.send(request)
            while not self._connection.poll(POLL_SECONDS):
                if self._process.poll() is not None and not self._connection.poll(0):
                    raise EOFError
                resident = _resident_bytes(self._process.pid)
                if resident > self.limits.memory_bytes:
                    self._kill()
                    limit = f"its limit of {self.limits.memory_bytes >> 20} MiB"
                    message = f"its process used {resident >> 20} MiB of memory during {what}, more than {limit}, and was killed"
                    raise _FailureError(Outcome("crashed", message=message))
                if time.monotonic() > deadline:
                    self._kill()
                    raise _FailureError(Outcome("timed_out", message=f"{what} did not end within its limit of {seconds:g} s"))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise _FailureError(self._post_mortem(what)) from error
        if isinstance(answer, Refused):
            if isinstance(request, Start):
                self._stop()
            if answer.unavailable:
                raise ToolchainUnavailableError(answer.message)
            raise UsageError(answer.message)
        assert isinstance(answer, (Ready, Done))
        return answer

    def _post_mortem(self, what: str) -> Outcome:
        assert self._process is not None
        assert self._folder is not None
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._kill()
            return Outcome("crashed", message=f"its process closed the connection during {what} and was killed")
        if code == UNKNOWN_EXIT:
            raise _UnknownEndError
        text = _tail(self._folder / "stderr.log")
        how = f"died of {_signal_name(-code)}" if code < 0 else f"ended itself with exit code {code}"
        said = [line for line in text if line.strip() and not _FAULT_HANDLER.match(line)]
        printed = "; it printed:\n" + "\n".join(said[-TAIL_LINES:]) if said else ""
        return Outcome("crashed", message=f"its process {how} during {what}{printed}", location=self._location_in(text))

    def _location_in(self, lines: list[str]) -> str | None:
        # The fault handler prints the Python stack, innermost frame first.
        source = str(self.kernel.source)
        for line in lines:
            match = re.search(r'File "([^"]+)", line (\d+)', line)
            if match and match[1] == source:
                return f"{match[1]}:{match[2]}"
        return None

    def _kill(self) -> None:
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.wait()

    def _stop(self) -> None:
        """Kill the worker, if any; the next run starts another."""
        try:
            self._kill()
        finally:
            self._process = None
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._lifeline is not None:
                os.close(self._lifeline)
                self._lifeline = None
            if self._scratch is not None:
                self._scratch.clear()

    def _trim_logs(self) -> None:
        # The worker appends, so that a file that is emptied here stays small.
        assert self._folder is not None
        for name in ("stdout.log", "stderr.log"):
            path = self._folder / name
            try:
                if path.stat().st_size > LOG_LIMIT:
                    os.truncate(path, 0)
            except OSError:
                pass


def address_of(kernel: Kernel) -> KernelAddress:
    """How a worker finds the kernel; raises ``UsageError`` if it is not an attribute of a module."""
    module = sys.modules.get(getattr(kernel.function, "__module__", ""))
    attributes = vars(module) if module is not None else {}
    names = [name for name, value in attributes.items() if isinstance(value, Kernel) and value == kernel]
    # A torch callable may be judged as it is, without the decorator.
    names = names or [name for name, value in attributes.items() if value is kernel.function and kernel.toolchain == "torch"]
    if module is None or not names:
        inside = getattr(kernel.function, "__qualname__", type(kernel.function).__name__).rsplit(".<locals>", 1)[0]
        raise UsageError(
            f"kernel {kernel.name} cannot be run in a process of its own: expected an attribute of a module, found one that is "
            f"defined inside {inside}; define it at module level"
        )
    spec = getattr(module, "__spec__", None)
    if spec is not None and spec.parent and spec.name == module.__name__:
        return KernelAddress(module.__name__, names[0], kernel.stage_name)
    file = getattr(module, "__file__", None)
    if not file:
        raise UsageError(f"kernel {kernel.name} is defined in {module.__name__}, which has no file: put it into a .py file")
    return KernelAddress(str(Path(file).resolve()), names[0], kernel.stage_name)


def _resident_bytes(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (64 << 10)))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
