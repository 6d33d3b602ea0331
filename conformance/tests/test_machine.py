"""What a machine with cards lacks is told in one line: every part missing or wrong, on a folder that stands for the machine."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import conformance
from conformance.tests.fake_machine import SMI_A2, SMI_BUSY, FakeMachine, torch_npu_of
from conformance.toolchains import doctor, find_npu
from conformance.toolchains.npu import device_compiler_problem
from conformance.toolchains.npu_smi import CardProcess, parse


@pytest.fixture
def fake(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_a_machine_with_everything_is_usable_and_every_part_is_named(fake: FakeMachine) -> None:
    fake.smi(SMI_BUSY)
    status = find_npu(fake.machine)
    assert status.usable, status.reason
    for told in (
        f"CANN 9.1.0 in {fake.cann}",
        "bisheng /",
        f"pto-isa {fake.cann}/include/pto",
        "driver 25.5.0",
        "firmware 7.8.0.5.216",
        "/dev/davinci0 (mode 644), /dev/davinci1 (mode 644)",
        "torch_npu 2.7.1, torch 2.7.1, Ascend910B3, 2 of 2 cards",
        "card 0: 60.7 of 64.0 GiB; card 1: 60.9 of 64.0 GiB, 1 process",
    ):
        assert told in status.reason
    assert "\n" not in status.reason
    lines = {line.name: line for line in doctor(fake.machine)}
    assert lines["npu"].ok
    assert lines["- driver"].found == "25.5.0"


def remove(fake: FakeMachine, *paths: str) -> None:
    for path in paths:
        target = fake.root.parent / path
        target.unlink() if target.is_file() else target.rename(target.with_name("away"))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda fake: fake.environment.pop("ASCEND_HOME_PATH"), "CANN not found: ASCEND_HOME_PATH is not set (source"),
        (lambda fake: fake.environment.update(ASCEND_HOME_PATH="/nowhere"), "ASCEND_HOME_PATH is /nowhere, which is no folder"),
        (lambda fake: fake.cann_says("8.0.RC3"), "CANN 8.0.RC3 in"),
        (lambda fake: remove(fake, "cann/bin/bisheng"), "bisheng not found on PATH"),
        (lambda fake: remove(fake, "cann/toolkit/toolchain/hcc"), "hcc not found: "),
        (lambda fake: remove(fake, "cann/include/pto"), "pto-isa not found: ASCEND_HOME_PATH has no"),
        (
            lambda fake: fake.environment.update(PTO_TILE_LIB_CODE_PATH="/nowhere"),
            "PTO_TILE_LIB_CODE_PATH has no /nowhere/include",
        ),
        (lambda fake: remove(fake, "root/dev/davinci_manager"), "driver not found: /dev/davinci_manager (install it"),
        (lambda fake: fake.driver_says("24.1.rc3"), "driver 24.1.rc3 is too old (25.2 or newer is needed)"),
        (lambda fake: remove(fake, "root/dev/davinci0", "root/dev/davinci1"), "cards not found: /dev/davinci0"),
        (lambda fake: fake.environment.update(ASCEND_RT_VISIBLE_DEVICES="7"), "by ASCEND_RT_VISIBLE_DEVICES=7"),
        (lambda fake: remove(fake, "packages/torch_npu"), "torch_npu not found (install the harness into the Python"),
        (lambda fake: fake.torch_npu("raise ImportError('libhccl.so: cannot open')"), "does not import: ImportError: libhccl.so"),
        (lambda fake: fake.torch_npu(torch_npu_of(cards=0)), "torch_npu 2.7.1, torch 2.7.1 sees no card"),
        (lambda fake: fake.torch_npu("import os; os.abort()"), "torch_npu 2.7.1, torch 2.7.1 does not start: exit code -6"),
    ],
)
def test_what_is_missing_or_wrong_is_told_in_one_line(fake: FakeMachine, broken, told: str) -> None:  # type: ignore[no-untyped-def]
    broken(fake)
    status = find_npu(fake.machine)
    assert not status.usable
    assert status.reason.startswith("no usable NPU: ")
    assert told in status.reason.partition(". Found: ")[0]
    assert "\n" not in status.reason


@pytest.mark.slow  # two imports of torch
def test_a_torch_npu_that_breaks_torch_is_told_and_keeps_nothing_else_from_running(tmp_path: Path) -> None:
    # torch imports it by itself, and does not import without it.
    fake = FakeMachine(tmp_path, torch=False)
    fake.torch_npu("raise ImportError('libhccl.so: cannot open shared object file')")
    fake.write(fake.packages / "torch_npu-2.7.1.dist-info" / "entry_points.txt", "[torch.backends]\nnpu = torch_npu:autoload\n")
    place = {"CONFORMANCE_MACHINE_ROOT": str(fake.root), "CONFORMANCE_CACHE_DIR": str(tmp_path)}
    fake.environment["PYTHONPATH"] += os.pathsep + str(Path(conformance.__file__).parents[1])
    command = [sys.executable, "-c", "from conformance.cli import main; main()", "doctor"]
    done = subprocess.run(command, env={**fake.environment, **place}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "does not import: ImportError: libhccl.so: cannot open shared object file" in done.stdout
    assert "calculator" in done.stdout


def test_cards_that_this_user_may_not_use_are_no_cards(fake: FakeMachine) -> None:
    (fake.root / "dev" / "davinci0").chmod(0o660)
    assert find_npu(dataclasses.replace(fake.machine, user=12345)).reason.count("may not be used") == 1
    (fake.root / "dev" / "davinci1").chmod(0o666)
    assert find_npu(dataclasses.replace(fake.machine, user=12345)).usable


def test_without_cann_kernels_are_compiled_for_the_host_and_with_a_broken_one_not_at_all(fake: FakeMachine) -> None:
    assert device_compiler_problem(fake.machine) == ""
    remove(fake, "cann/bin/bisheng")
    problem = device_compiler_problem(fake.machine)
    assert problem.startswith("no device compiler: bisheng not found on PATH")
    fake.environment["ASCEND_HOME_PATH"] = ""
    assert device_compiler_problem(fake.machine) == ""


def test_a_compiler_that_is_not_on_the_path_is_named_with_the_way_out(fake: FakeMachine) -> None:
    fake.write(fake.cann / "compiler" / "ccec_compiler" / "bin" / "bisheng")
    remove(fake, "cann/bin/bisheng")
    assert f"not found on PATH, but as {fake.cann}/compiler/ccec_compiler/bin/bisheng" in find_npu(fake.machine).reason


def test_the_visible_cards_are_counted_as_torch_counts_them(fake: FakeMachine) -> None:
    for number in (2, 3):
        fake.write(fake.root / "dev" / f"davinci{number}")
    # CANN reads the list up to what is no number.
    fake.environment["ASCEND_RT_VISIBLE_DEVICES"] = "1,3, 2"
    assert [(node.number, node.position) for node in fake.machine.card_nodes()] == [(1, 0), (3, 1)]
    for text, numbers in (("1,3x", [1, 3]), ("3,1", []), ("1,1", []), ("1,9,2", [1]), ("", []), ("-1", [])):
        fake.environment["ASCEND_RT_VISIBLE_DEVICES"] = text
        assert [node.number for node in fake.machine.card_nodes()] == numbers, text


def test_the_tables_of_npu_smi_are_read_on_both_kinds_of_cards() -> None:
    states = parse(SMI_BUSY)
    assert sorted(states) == [0, 1, 2]
    assert states[2].free == (65536 - 3415) << 20
    assert [len(states[number].processes) for number in (0, 1, 2)] == [0, 1, 0]
    states = parse(SMI_A2)
    assert sorted(states) == [6, 7]
    assert states[7].processes == (CardProcess(4242, "vllm", 17),)
    assert parse("npu-smi: command failed\n| nonsense | 1 | 2 |\n") == {}
