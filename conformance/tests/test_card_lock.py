"""Which card a process runs on, and that no two kernels run on one card at a time."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from conformance.errors import UsageError
from conformance.lanes import cards
from conformance.lanes.cards import Card, CardChoice, CardLock, CardUnavailableError, parse_cards
from conformance.suites.state import PluginState
from conformance.tests.fake_machine import SMI_BUSY, SMI_IDLE, FakeMachine


@pytest.fixture
def fake(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


@pytest.mark.parametrize(("text", "numbers"), [("0", (0,)), ("0,2-3", (0, 2, 3)), ("3, 1-1,3", (3, 1)), ("007", (7,))])
def test_cards_are_named_by_numbers_and_ranges(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_cards(text) == numbers


@pytest.mark.parametrize("text", ["", "x", "-1", "0,", "3-1", "1.0", "0x1", "0;1", "²", "99999", "0-", "npu:0"])
def test_what_names_no_card_is_an_error_and_not_card_0(text: str) -> None:
    with pytest.raises(UsageError, match=r"^TASK_DEVICE takes numbers of cards, such as 0 or 0,2-3, found '"):
        parse_cards(text, "TASK_DEVICE")


def numbers_of(choice: CardChoice, fake: FakeMachine) -> list[int]:
    return [card.number for card in choice.cards(fake.machine)]


def test_the_option_comes_before_the_schedulers_variable_and_that_before_pyptos(tmp_path: Path) -> None:
    fake = FakeMachine(tmp_path, cards=4)
    assert numbers_of(CardChoice(), fake) == [0, 1, 2, 3]
    fake.environment["TILE_FWK_DEVICE_ID"] = "1"
    assert numbers_of(CardChoice(), fake) == [1]
    fake.environment["TASK_DEVICE"] = "2-3"
    assert numbers_of(CardChoice(), fake) == [2, 3]
    assert numbers_of(CardChoice((0,)), fake) == [0]
    fake.environment["TASK_DEVICE"] = "two"
    with pytest.raises(UsageError, match="TASK_DEVICE takes"):
        CardChoice().cards(fake.machine)


def test_each_process_of_a_run_takes_the_next_card_in_turn(fake: FakeMachine) -> None:
    choices = [CardChoice(worker=worker, wait_seconds=7) for worker in range(3)]
    assert [choice.card(fake.machine) for choice in choices] == [Card(0, 0, 7), Card(1, 1, 7), Card(0, 0, 7)]
    assert [card.number for card in choices[1].in_turn(fake.machine)] == [1, 0]


def test_a_card_is_named_by_its_node_and_used_by_its_place(fake: FakeMachine) -> None:
    fake.environment["ASCEND_RT_VISIBLE_DEVICES"] = "1"
    assert CardChoice((1,)).card(fake.machine) == Card(1, 0)
    with pytest.raises(CardUnavailableError, match=r"card 0 is not there.*are 1, by ASCEND_RT_VISIBLE_DEVICES=1"):
        CardChoice((0,)).card(fake.machine)


def test_pyptos_variable_counts_the_cards_that_torch_sees(tmp_path: Path) -> None:
    fake = FakeMachine(tmp_path, cards=4)
    fake.environment |= {"ASCEND_RT_VISIBLE_DEVICES": "2,3", "TILE_FWK_DEVICE_ID": "1"}
    assert CardChoice(wait_seconds=7).cards(fake.machine) == (Card(3, 1, 7),)
    fake.environment["TILE_FWK_DEVICE_ID"] = "2"
    with pytest.raises(CardUnavailableError, match=r"^TILE_FWK_DEVICE_ID: there is no 2; there are 0 \(card 2\), 1 \(card 3\)$"):
        CardChoice().cards(fake.machine)


def test_a_card_that_is_not_there_is_one_line(fake: FakeMachine) -> None:
    with pytest.raises(CardUnavailableError) as raised:
        CardChoice((0, 7)).cards(fake.machine)
    assert str(raised.value) == "card 7 is not there (--device): the cards of this machine are 0, 1"


def test_a_card_that_may_not_be_used_is_left_out_unless_it_is_asked_for(fake: FakeMachine) -> None:
    (fake.root / "dev" / "davinci0").chmod(0o660)
    (fake.root / "dev" / "davinci1").chmod(0o666)
    machine = dataclasses.replace(fake.machine, user=12345)
    assert [card.number for card in CardChoice().cards(machine)] == [1]
    with pytest.raises(CardUnavailableError, match=r"card 0 may not be used \(--device\): /dev/davinci0 has mode 660"):
        CardChoice((0,)).cards(machine)


def test_each_process_of_xdist_is_another_worker() -> None:
    option = SimpleNamespace(conformance_device="4-6", conformance_device_wait=None)
    for inputs, worker in (({}, 0), ({"workerinput": {"workerid": "gw0"}}, 0), ({"workerinput": {"workerid": "gw2"}}, 2)):
        state = PluginState(SimpleNamespace(option=option, **inputs))  # type: ignore[arg-type]
        assert state.cards == CardChoice((4, 5, 6), worker)


# The lock

RUN = """
import sys, time
from pathlib import Path
from conformance.lanes.cards import Card, CardLock
from conformance.toolchains.machine import Machine

lock = CardLock(Card(0, 0, 30), machine=Machine(Path(sys.argv[1]), {}))
for _ in range(int(sys.argv[2])):
    with lock, open(sys.argv[1] + "/log", "ab", buffering=0) as log:
        log.write(b"begin\\n")
        time.sleep(float(sys.argv[3]))
        log.write(b"end\\n")
"""


def started(fake: FakeMachine, runs: int, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RUN, str(fake.root), str(runs), str(seconds)])


def events(fake: FakeMachine) -> list[str]:
    log = fake.root / "log"
    return log.read_text().split() if log.exists() else []


def lock_of(fake: FakeMachine, wait: float, progress: list[str] | None = None) -> CardLock:
    return CardLock(Card(0, 0, wait), machine=fake.machine, progress=None if progress is None else progress.append)


def test_two_runs_that_are_started_at_once_never_overlap_on_a_card(fake: FakeMachine) -> None:
    both = [started(fake, 4, 0.02) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert events(fake) == ["begin", "end"] * 8


@pytest.fixture
def holder(fake: FakeMachine) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has card 0."""
    process = started(fake, 1, 60)
    while not events(fake):
        assert process.poll() is None
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


def test_a_busy_card_is_waited_for_and_then_unavailable_with_who_has_it(
    fake: FakeMachine, holder: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "FIRST_TOLD_SECONDS", 0.1)
    told: list[str] = []
    began = time.monotonic()
    with pytest.raises(CardUnavailableError, match=rf"card 0 was busy for 0.3 s: process {holder.pid} of user \d+ runs a kernel"):
        lock_of(fake, 0.3, told).__enter__()
    assert 0.3 <= time.monotonic() - began < 5
    assert told == [f"waiting for card 0: process {holder.pid} of user {os.getuid()} runs a kernel on it"]
    with CardLock(Card(1, 1, 0), machine=fake.machine):
        pass  # the other card is free


def test_a_run_that_is_killed_gives_its_card_back(fake: FakeMachine, holder: subprocess.Popen[bytes]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    with lock_of(fake, 20):
        assert events(fake) == ["begin"]


def test_every_user_may_open_the_lock_whatever_the_umask(fake: FakeMachine) -> None:
    before = os.umask(0o077)
    try:
        with lock_of(fake, 0) as lock:
            assert lock.path.stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


def test_a_lock_that_somebody_removed_is_made_anew(fake: FakeMachine) -> None:
    with lock_of(fake, 0) as first:
        first.path.unlink()
    with lock_of(fake, 0) as again:
        assert again.path.exists()


def test_where_no_lock_can_be_made_the_card_is_unavailable(fake: FakeMachine) -> None:
    fake.environment["CONFORMANCE_LOCK_DIR"] = str(fake.root / "file")
    fake.write(fake.root / "file")
    with pytest.raises(CardUnavailableError, match=r"card 0 cannot be locked: .*CONFORMANCE_LOCK_DIR"):
        lock_of(fake, 0).__enter__()


def test_what_stands_in_the_place_of_a_lock_is_neither_followed_nor_waited_for(fake: FakeMachine) -> None:
    target = fake.root / "theirs"
    lock = lock_of(fake, 60)
    fake.write(target, "kept")
    lock.path.symlink_to(target)
    with pytest.raises(CardUnavailableError, match="cannot be locked"):
        lock.__enter__()
    assert target.read_text() == "kept"
    lock.path.unlink()
    os.mkfifo(lock.path)
    with pytest.raises(CardUnavailableError, match="it is no regular file"):
        lock.__enter__()


def test_a_folder_for_locks_is_made_for_all_users(fake: FakeMachine) -> None:
    fake.environment["CONFORMANCE_LOCK_DIR"] = str(fake.root / "locks")
    with lock_of(fake, 0) as lock:
        assert lock.path.parent == fake.root / "locks"
        assert lock.path.parent.stat().st_mode & 0o7777 == 0o1777


def test_a_card_with_a_process_of_somebody_elses_is_busy_until_that_ends(fake: FakeMachine) -> None:
    fake.smi(SMI_BUSY)
    lock = CardLock(Card(1, 1, 0.2), machine=fake.machine)
    with pytest.raises(CardUnavailableError, match=r"card 1 was busy for 0.2 s: npu-smi shows python3.1 \(632268\)"):
        lock.__enter__()
    with lock_of(fake, 0):
        pass  # card 0 has none
    fake.smi(SMI_IDLE)
    with lock:
        pass


def test_a_process_of_this_harness_takes_the_lock_and_does_not_make_a_card_busy(fake: FakeMachine) -> None:
    fake.smi(SMI_BUSY)
    fake.write(fake.root / "proc" / "632268" / "cmdline", "python\0-c\0from conformance.lanes.keeper import main\0")
    with CardLock(Card(1, 1, 0), machine=fake.machine):
        pass


def test_where_npu_smi_fails_the_lock_alone_counts(fake: FakeMachine) -> None:
    fake.program("npu-smi", "echo dcmi module initialize failed; exit 1")
    with lock_of(fake, 0):
        pass
