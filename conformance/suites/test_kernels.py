"""Every kernel against its contract, lane by lane. The kernels and presets are chosen by options; see ``pytest --help``."""

from __future__ import annotations

from typing import Any

import pytest

from conformance.suites.machine import require_lane, require_memory


@pytest.mark.conformance("compiles")
def test_compiles(subject: Any, judging: Any) -> None:
    judging.compiled()


@pytest.mark.conformance("values")
def test_agrees_with_its_contract(subject: Any, judging: Any) -> None:
    require_lane(judging)
    judging.cases()


@pytest.mark.conformance("capabilities")
def test_holds_what_it_declares(subject: Any, judging: Any) -> None:
    require_lane(judging)
    judging.capabilities()


@pytest.mark.full_size
@pytest.mark.conformance("values")
def test_agrees_at_full_size(subject: Any, judging: Any) -> None:
    require_lane(judging)
    require_memory(judging, subject.memory)
    judging.full_size()


@pytest.mark.full_size
@pytest.mark.conformance("compiles")
def test_compiles_at_full_size(subject: Any, judging: Any) -> None:
    # The interpreter copies whatever a loop's body reads at every trip: stacked real weights would take hours. Compiling needs
    # their shapes alone.
    require_memory(judging, subject.memory)
    judging.compiled()
