"""Torch kernels that do what no kernel should; a right one beside them. Run in worker processes only."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import torch

import conformance
from conformance.contract.kernel import kernel
from conformance.contract.registry import stage_named
from conformance.contract.stage import Stage
from conformance.lanes.channel import Channel
from conformance.lanes.messages import Result, encode

Tensor = torch.Tensor
EPS = 1e-6


@kernel("rms_norm")
def right(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Does what it should."""
    wide = x.float()
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight)


# Forged results: none of them writes ``out``


def _sockets() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.append(int(name))
    return found


def _message(number: int) -> bytes:
    content = encode(Result("ok", "", None, (), 5, (), True, 0.1, 1 << 20, True))
    return struct.pack("<4sQII", b"KCW1", number, len(content), zlib.crc32(content)) + content


def _send(data: bytes) -> None:
    for descriptor in _sockets():
        os.write(descriptor, data)


@kernel("rms_norm")
def forges_an_answer(x: Tensor, weight: Tensor, out: Tensor) -> None:
    _send(_message(1))


@kernel("rms_norm")
def forges_the_answer(x: Tensor, weight: Tensor, out: Tensor) -> None:
    # The number of the request is in the frames below: somebody who sets out to find it does.
    frame = sys._getframe()
    while frame.f_back is not None and "number" not in frame.f_locals:
        frame = frame.f_back
    _send(_message(frame.f_locals["number"]))


@kernel("rms_norm")
def half_an_answer(x: Tensor, weight: Tensor, out: Tensor) -> None:
    _send(_message(1)[:11])
    os._exit(0)


@kernel("rms_norm")
def endless_answer(x: Tensor, weight: Tensor, out: Tensor) -> None:
    _send(struct.pack("<4sQII", b"KCW1", 1, (6 << 30) % (1 << 32), 0))
    time.sleep(60)


@kernel("rms_norm")
def garbage_on_every_descriptor(x: Tensor, weight: Tensor, out: Tensor) -> None:
    for descriptor in range(3, 256):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\x80\x04\x95 some pickle " * 40)


@kernel("rms_norm")
def answers_twice(x: Tensor, weight: Tensor, out: Tensor) -> None:
    right.function(x, weight, out)
    os.fork()


@kernel("rms_norm")
def closes_every_descriptor(x: Tensor, weight: Tensor, out: Tensor) -> None:
    os.closerange(0, 256)


# Ends


@kernel("rms_norm")
def exits(x: Tensor, weight: Tensor, out: Tensor) -> None:
    os._exit(0)


@kernel("rms_norm")
def raises_what_is_no_exception(x: Tensor, weight: Tensor, out: Tensor) -> None:
    raise GeneratorExit("never mind")


@kernel("rms_norm")
def stops_itself(x: Tensor, weight: Tensor, out: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@kernel("rms_norm")
def kills_its_keeper(x: Tensor, weight: Tensor, out: Tensor) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    right.function(x, weight, out)


@kernel("rms_norm")
def stops_its_keeper(x: Tensor, weight: Tensor, out: Tensor) -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(600)


@kernel("rms_norm")
def sets_the_clock(x: Tensor, weight: Tensor, out: Tensor) -> None:
    right.function(x, weight, out)
    time.perf_counter = lambda: -time.monotonic()


# Texts


class TextlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@kernel("rms_norm")
def raises_what_has_no_text(x: Tensor, weight: Tensor, out: Tensor) -> None:
    raise TextlessError


@kernel("rms_norm")
def says_too_much(x: Tensor, weight: Tensor, out: Tensor) -> None:
    raise ValueError("\x1b]0;owned\x07\x1b[31m\udcff" + "a" * 50_000_000)


@kernel("rms_norm")
def prints_without_end(x: Tensor, weight: Tensor, out: Tensor) -> None:
    line = b"nothing to say\n" * 5000
    while True:
        os.write(1, line)


# The right answer, from somewhere else


@kernel("rms_norm")
def imports_the_reference(x: Tensor, weight: Tensor, out: Tensor) -> None:
    from conformance.kernels.qwen3 import reference

    out.copy_(reference.rms_norm(x, weight, None, a=None)[0])  # type: ignore[call-arg, arg-type]


@kernel("rms_norm")
def asks_the_stage(x: Tensor, weight: Tensor, out: Tensor, *, dims: conformance.Dims) -> None:
    from conformance.numerics.arithmetic import CONTRACT

    out.copy_(stage_named("rms_norm").reference({"x": x, "weight": weight}, dims, CONTRACT)["out"])


@kernel("rms_norm")
def searches_memory(x: Tensor, weight: Tensor, out: Tensor, *, dims: conformance.Dims) -> None:
    from conformance.numerics.arithmetic import CONTRACT

    for found in gc.get_objects():
        if isinstance(found, Stage) and found.name == "rms_norm":
            out.copy_(found.reference({"x": x, "weight": weight}, dims, CONTRACT)["out"])


# Memory


@kernel("rms_norm")
def shortens_the_arena(x: Tensor, weight: Tensor, out: Tensor) -> None:
    for name in os.listdir("/proc/self/fd"):
        if "conformance-arena" in os.readlink(f"/proc/self/fd/{name}"):
            os.ftruncate(int(name), 0)


@kernel("rms_norm")
def lengthens_the_arena(x: Tensor, weight: Tensor, out: Tensor) -> None:
    right.function(x, weight, out)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if "conformance-arena" in os.readlink(f"/proc/self/fd/{name}"):
                os.ftruncate(int(name), 1 << 50)


@kernel("rms_norm")
def writes_behind_an_input(x: Tensor, weight: Tensor, out: Tensor) -> None:
    import ctypes

    right.function(x, weight, out)
    ctypes.memset(weight.data_ptr() + weight.nbytes, 0, 64)


@kernel("rms_norm")
def changes_what_it_is_judged_by(x: Tensor, weight: Tensor, out: Tensor) -> None:
    from conformance.lanes import buffers, worker

    buffers.same_bits = lambda left, right: True
    worker.result_of = lambda *arguments, **keywords: None  # type: ignore[attr-defined, assignment]
    x.zero_()


# Processes of its own

SLEEPS = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); time.sleep(600)"
#: Names the file that these write their numbers to.
NUMBERS = "HOSTILE_NUMBERS"


def _leave_a_process() -> None:
    # Twice removed, in a session of its own, with everything open that can be inherited.
    if os.fork() == 0:
        subprocess.Popen([sys.executable, "-c", SLEEPS, os.environ[NUMBERS]], close_fds=False, start_new_session=True)
        os._exit(0)
    deadline = time.monotonic() + 20
    while not Path(os.environ[NUMBERS]).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@kernel("rms_norm")
def leaves_a_process(x: Tensor, weight: Tensor, out: Tensor) -> None:
    right.function(x, weight, out)
    _leave_a_process()


@kernel("rms_norm")
def leaves_a_process_and_hangs(x: Tensor, weight: Tensor, out: Tensor) -> None:
    _leave_a_process()
    time.sleep(600)


@kernel("rms_norm")
def forks_copies_of_itself(x: Tensor, weight: Tensor, out: Tensor) -> None:
    right.function(x, weight, out)
    for _ in range(20):
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)


@kernel("rms_norm")
def hogs_memory_elsewhere(x: Tensor, weight: Tensor, out: Tensor) -> None:
    code = "import time; kept = bytearray(1 << 30); kept[::4096] = b'x' * (1 << 18); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(600)


@kernel("rms_norm")
def answers_from_a_thread(x: Tensor, weight: Tensor, out: Tensor) -> None:
    def later() -> None:
        time.sleep(0.3)
        Channel(socket.socket(fileno=_sockets()[0])).send(1, b"")

    right.function(x, weight, out)
    threading.Thread(target=later, daemon=True).start()
    time.sleep(0.5)
