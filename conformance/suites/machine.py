"""What a machine may lack: checked by a suite's test, recorded and skipped with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from conformance.lanes import lane_named
from conformance.lanes.cards import CardUnavailableError
from conformance.suites.state import fail_for_lack

if TYPE_CHECKING:
    from conformance.suites.judging import SubjectJudging


def available_memory() -> int:
    """Bytes that programs can still use, by ``/proc/meminfo``; 0 where that cannot be read."""
    try:
        with open("/proc/meminfo", encoding="ascii") as table:
            for line in table:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def require_memory(judging: SubjectJudging, needed: int) -> None:
    """Skip, with a record, where less memory is available."""
    found = available_memory()
    if found < needed:
        reason = f"needs {needed / 2**30:.0f} GB of available memory, found {found / 2**30:.1f} GB"
        judging.log.skipped(judging.subject, reason)
        pytest.skip(reason)


def require_lane(judging: SubjectJudging) -> None:
    """Skip, with a record, where the machine lacks the subject's lane or card; fail with ``--conformance-require-device``."""
    lane, executor = lane_named(judging.subject.lane), judging.options.conformance_device_executor
    reason = lane.missing(executor)
    if not reason and lane.takes_card(executor):
        with judging.usage_errors():
            try:
                judging.cards.card()
            except CardUnavailableError as error:
                reason = str(error)
    if not reason:
        return
    if judging.options.conformance_require_device:
        judging.log.could_not_run(judging.subject, reason)
        fail_for_lack(f"--conformance-require-device: {reason}")
    judging.log.skipped(judging.subject, reason)
    pytest.skip(reason)
