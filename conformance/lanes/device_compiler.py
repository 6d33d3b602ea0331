"""Whether it was the device's compiler that failed, and what it said: of a kernel, or of every kernel on this machine.

PyPTO calls CANN's compiler by the shell for every part of a kernel, and says of a failure only that there was one. Up to 0.2.0
such a failure ends the process; later versions log it, go on, and launch nothing. What the compiler said is in the process's
output alone. A kernel may be at fault, or headers and a compiler that do not fit, which no kernel can do anything about: so a
kernel that is known to be right is compiled in the same way (``probe``), once in a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from conformance.outside import one_line
from conformance.toolchains.detection import ToolchainUnavailableError

#: What PyPTO says where a command failed that compiles or links a kernel: of its cores, and of its control flow.
_FAILED = re.compile(
    r"kernel compilation failed, ret|Parallel compilation failed with return code|DoCompileCmd failed|CheckInjectStr failed"
    r"|CompileCoreMachine failed|LinkObject failed|Compile ccec failed|Link kernel failed|Compile dynamic aicore\.o failed"
    r"|the device's compiler failed|Compile aicore construct cmd failed|func CompileSourceCode\b|Pto-isa path\b"
)
#: What a compiler, a linker, ``make`` or the shell says of it: the most telling first.
_SAID = (
    re.compile(r"\b(?:fatal )?error: ", re.IGNORECASE),
    re.compile(r"not found|No such file|Permission denied|Killed|No space left|undefined symbol"),
    _FAILED,
)


class CompilerUnavailableError(ToolchainUnavailableError):
    """The device's compiler of this machine compiles nothing: one line that has what it said."""


def compiler_failure(texts: Iterable[str]) -> str:
    """What a compiler said where some texts tell that it failed; empty where none tells."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    if not any(_FAILED.search(line) for line in lines):
        return ""
    return next(one_line(line, 300) for pattern in _SAID for line in lines if pattern.search(line))


def no_kernel_compiles(said: str) -> str:
    """Why nothing can be compiled here, in one line."""
    return f"this machine's device compiler fails also for a kernel that is known to be right: {said}"
