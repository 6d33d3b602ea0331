"""What a card's error codes say about whose fault it was: the kernel's, the card's, the machine's, or only a lost process.

Names and numbers are those of CANN's public header ``acl/error_codes/rt_error_codes.h``; what each means in practice is from the
troubleshooting guides of PyPTO and its runtime. A code alone seldom decides: after each of them the card is probed
(``conformance.lanes.on_card``), and a card that fails the probe is not the kernel's finding.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

#: ``kernel``: the kernel did it, if the card is well afterwards. ``card``: it cannot have. ``machine``: nothing runs here as
#: things are. ``process``: fallout of an earlier error in the same process, which says nothing; another one is asked again.
Blame = Literal["kernel", "card", "machine", "process"]


@dataclasses.dataclass(frozen=True)
class DeviceError:
    """One error code: CANN's name for it without ``ACL_ERROR_RT_``, what it means, and whose fault it is."""

    code: int
    name: str
    meaning: str
    blame: Blame

    def __str__(self) -> str:
        return f"error {self.code} ({self.name}: {self.meaning})"


_ERRORS: tuple[tuple[int, str, str, Blame], ...] = (
    (107001, "INVALID_DEVICEID", "there is no such card", "card"),
    (107022, "DEVICE_TASK_ABORT", "a task was aborted after an earlier error", "process"),
    (207000, "FEATURE_NOT_SUPPORT", "the driver does not support it", "machine"),
    (207001, "MEMORY_ALLOCATION", "the card's memory is used up", "machine"),
    (207004, "NO_DEVICE", "there is no card", "card"),
    (207006, "NO_PERMISSION", "no permission to use the card", "machine"),
    (207018, "DEVICE_OOM", "the card's memory is used up", "machine"),
    (507000, "INTERNAL_ERROR", "internal error of the runtime", "process"),
    (507008, "SOC_VERSION", "compiled for another chip", "machine"),
    (507010, "LOST_HEARTBEAT", "the card's task scheduler is silent", "card"),
    (507011, "MODEL_EXECUTE", "execution failed", "kernel"),
    (507014, "AICORE_TIMEOUT", "an AI core did not end in time", "kernel"),
    (507015, "AICORE_EXCEPTION", "an exception on an AI core", "kernel"),
    (507016, "AICORE_TRAP_EXCEPTION", "a trap on an AI core", "kernel"),
    (507017, "AICPU_TIMEOUT", "the kernel's control flow did not end in time", "kernel"),
    # The generic one: control flow that fails, a card that is wedged (the probe tells), a driver of another version (the log
    # does), and two processes that share a chip.
    (507018, "AICPU_EXCEPTION", "an exception in the kernel's control flow", "kernel"),
    (507034, "VECTOR_CORE_TIMEOUT", "a vector core did not end in time", "kernel"),
    (507035, "VECTOR_CORE_EXCEPTION", "an exception on a vector core", "kernel"),
    (507036, "VECTOR_CORE_TRAP_EXCEPTION", "a trap on a vector core", "kernel"),
    (507042, "AICORE_TRAP_READ_OVERFLOW", "an AI core read out of bounds", "kernel"),
    (507043, "AICORE_TRAP_WRITE_OVERFLOW", "an AI core wrote out of bounds", "kernel"),
    (507044, "VECTOR_CORE_TRAP_READ_OVERFLOW", "a vector core read out of bounds", "kernel"),
    (507045, "VECTOR_CORE_TRAP_WRITE_OVERFLOW", "a vector core wrote out of bounds", "kernel"),
    (507046, "STREAM_SYNC_TIMEOUT", "the launch did not end in time", "kernel"),
    (507051, "SEND_MSG", "the card does not answer", "card"),
    (507053, "DEVICE_MEM_ERROR", "an error of the card's memory", "card"),
    (507054, "HBM_MULTI_BIT_ECC_ERROR", "an error of the card's memory", "card"),
    (507055, "SUSPECT_DEVICE_MEM_ERROR", "a likely error of the card's memory", "card"),
    (507056, "LINK_ERROR", "an error of a link between cards", "card"),
    # Sticky: once a context has failed, every call of its process ends so.
    (507899, "DRV_INTERNAL_ERROR", "internal error of the driver, as after any earlier one in the process", "process"),
    (507900, "AICPU_INTERNAL_ERROR", "internal error of the AI CPU", "card"),
    (507901, "SOCKET_CLOSE", "the connection to the card broke", "card"),
)
DEVICE_ERRORS: dict[int, DeviceError] = {fields[0]: DeviceError(*fields) for fields in _ERRORS}

_CODE = re.compile(r"(?<!\d)(?:107|207|507)\d{3}(?!\d)")
#: One that the table does not have is taken for a code only where it is called one.
_TOLD = re.compile(r"(?:error code is|ret(?:code)?\s*[:=]|failed:)\s*(507\d{3})(?!\d)", re.IGNORECASE)
#: What torch_npu says instead of a code, or of its own memory's end: its allocator and its queue of operators name none.
_WORDS = (
    ("NPU out of memory", 207001),
    ("FORCE STOP", 107022),
    ("UCE ERROR", 507053),
    ("HBM MULTI BIT ECC ERROR", 507054),
    ("SUSPECT MEM ERROR", 507055),
    ("HCCS LINK ERROR", 507056),
)
#: Said by the device's log where driver and CANN are of versions that do not fit (PyPTO's FAQ), and by PyPTO and CANN of an old
#: driver. The code that comes with it is 507018.
_OTHER_VERSION = re.compile(
    r"api success, but func is nullptr|driver\b[^\n]*\bversion\b[^\n]*\b(?:mismatch|low|old|not (?:match|support)|incompatible)",
    re.IGNORECASE,
)
#: What a log line has that describes an exception: the most telling first.
_EXCEPTIONS = (
    re.compile(r"errorStr|error info|out of range", re.IGNORECASE),
    re.compile(r"ai(?:core|vec|cpu)\b.*(?:error|exception)|(?:error|exception).*\bai(?:core|vec|cpu)\b", re.IGNORECASE),
    re.compile(r"hand ?shake|timeout|exception", re.IGNORECASE),
)
#: How many lines of a log are shown, and how much of each.
MOST_LINES, MOST_OF_LINE = 2, 300


def device_error(texts: Sequence[str]) -> DeviceError | None:
    """The error that some texts tell of; ``None`` if they tell of none.

    The first of a cause, also where the code of its fallout comes before it. A code of a device error that the table does not
    have counts as one of the runtime (``process``).
    """
    found = [int(code) for text in texts for code in _CODE.findall(text)]
    found += [code for text in texts for words, code in _WORDS if words in text]
    errors = [DEVICE_ERRORS[code] for code in found if code in DEVICE_ERRORS]
    causes = [error for error in errors if error.blame != "process"]
    if causes or errors:
        return (causes or errors)[0]
    unknown = [int(code) for text in texts for code in _TOLD.findall(text)]
    return known_error(unknown[0]) if unknown else None


def known_error(code: int) -> DeviceError:
    """What is known of a code."""
    return DEVICE_ERRORS.get(code) or DeviceError(code, "unknown", "an error that the table does not have", "process")


def of_another_version(texts: Sequence[str]) -> str | None:
    """The line that says that driver, firmware and CANN do not fit together; ``None`` if no text does."""
    for text in texts:
        for line in text.splitlines():
            if _OTHER_VERSION.search(line):
                return line.strip()[:MOST_OF_LINE]
    return None


def exception_lines(logged: Sequence[str]) -> list[str]:
    """The lines of a log that describe the exception best, at most ``MOST_LINES``."""
    found = [line for pattern in _EXCEPTIONS for line in logged if pattern.search(line)]
    return [line[:MOST_OF_LINE] for line in list(dict.fromkeys(found))[:MOST_LINES]]
