"""The process that runs one kernel: ``python -m conformance.lanes.worker CONNECTION ARENA LIFELINE`` (descriptors).

It owns nothing that must be tidied up: whoever started it reads its answers, kills it when it takes too long and deletes its
folders. It ends when its owner does.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import fcntl
import importlib
import os
import select
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from conformance.contract.kernel import Kernel, as_kernel
from conformance.contract.loading import load_module
from conformance.errors import UsageError
from conformance.lanes import Lane, lane_named
from conformance.lanes.arena import Arena
from conformance.lanes.messages import Done, KernelAddress, Ready, Refused, Run, RunRequest, Start
from conformance.toolchains.detection import ToolchainUnavailableError


def main(arguments: list[str]) -> int:
    """Serve runs until the owner closes the connection."""
    connection_descriptor, arena_descriptor, lifeline = map(int, arguments)
    _end_with_owner(lifeline)
    faulthandler.enable()
    # Two workers share two cores, and small operators only lose time in a thread pool.
    torch.set_num_threads(1)
    connection: Connection[object, object] = Connection(connection_descriptor)
    arena = Arena(arena_descriptor)
    start = connection.recv()
    assert isinstance(start, Start)
    try:
        lane = lane_named(start.lane)
        run = _open_lane(lane, start)
    except UsageError as error:
        connection.send(Refused(str(error)))
        return 0
    except ToolchainUnavailableError as error:
        connection.send(Refused(str(error), unavailable=True))
        return 0
    connection.send(Ready())
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return 0
        assert isinstance(request, Run)
        connection.send(_serve(lane, run, request, arena))


def _serve(lane: Lane, run: RunRequest, request: Run, arena: Arena) -> Done | Refused:
    _reset_peak_memory()
    began = time.perf_counter()
    tensors = {slot.name: arena.view(slot) for slot in request.slots}
    try:
        outcome = run(request, tensors)
    except UsageError as error:
        return Refused(str(error))
    except ToolchainUnavailableError as error:
        return Refused(str(error), unavailable=True)
    end = max((slot.end for slot in request.slots), default=0)
    slots = arena.write(((name, tensor.contiguous()) for name, tensor in outcome.outputs.items()), start=end)
    bare = dataclasses.replace(outcome, outputs={}, seconds=time.perf_counter() - began, peak_memory=_peak_memory())
    return Done(bare, slots, healthy=outcome.status == "ok" or lane.survives_failure)


def _open_lane(lane: Lane, start: Start) -> RunRequest:
    sys.path.extend(entry for entry in start.search_path if entry not in sys.path)
    kernel = find(start.kernel)
    if start.kernel.module.endswith(".py"):
        # A builder may import what lies beside its file when it is called, long after the file itself was imported.
        sys.path.append(str(Path(start.kernel.module).parent))
    # Imported here, and only in a worker: a toolchain's native libraries stay out of every other process.
    opened: RunRequest = importlib.import_module(lane.worker).open_lane(kernel, start)
    return opened


def find(address: KernelAddress) -> Kernel:
    """Import the module that defines a kernel and return the kernel; raises ``UsageError``."""
    module = load_module(address.module)
    found = vars(module).get(address.attribute)
    if found is None:
        raise UsageError(f"{address.module} defines no {address.attribute} when it is imported anew: define it at module level")
    return as_kernel(address.stage_name, found)


def _end_with_owner(lifeline: int) -> None:
    # The owner holds the writing end of this pipe and never writes. When it dies, however it dies, the kernel raises SIGIO
    # here, whose default action ends the process even inside a native call that never returns to Python.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # It may have died before this was set: then the pipe is at its end already.
    if select.select([lifeline], [], [], 0)[0]:
        sys.exit(0)


def _reset_peak_memory() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _peak_memory() -> int | None:
    """Peak resident memory since the last reset, in bytes, where the system tells."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
