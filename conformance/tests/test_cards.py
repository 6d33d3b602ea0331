"""The device lane on fake cards: PyPTO's own Python above a fake driver, and a card that fails in each way that cards do."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.cases.space import Space
from conformance.cli import main
from conformance.contract.kernel import Declaration, Kernel
from conformance.contract.loading import load_module
from conformance.contract.registry import stage_named
from conformance.judge.judgement import judge
from conformance.kernels.qwen3.generation.command import main as generation
from conformance.lanes import card_pool as card_pool_module
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import GUARD_BYTES, guarded_bytes
from conformance.lanes.card_pool import CardPool
from conformance.lanes.cards import LOCK_FOLDER_VARIABLE, Card, CardLock
from conformance.lanes.device import CARD_VARIABLE
from conformance.lanes.device_errors import device_error, of_another_version
from conformance.lanes.listing import bundled_kernels
from conformance.lanes.process import KernelProcess, Limits
from conformance.lanes.pypto.runtime import errors_in
from conformance.running.check import chosen_keys, judged_runs
from conformance.running.plans import Plans
from conformance.running.records import Record, read_run
from conformance.suites import judging
from conformance.tests.fake_card import CARD, COMPILER_ERROR, FOLDER, events, overlaps
from conformance.tests.fake_memory import MISSING
from conformance.tests.kernels_under_test.on_fake_cards import NAMES
from conformance.tests.processes import alive
from conformance.tests.test_plugin import run_pytest
from conformance.toolchains import detect
from conformance.toolchains.machine import ROOT_VARIABLE

KERNELS = Path(__file__).parent / "kernels_under_test" / "on_fake_cards.py"
#: Options of the suites: nothing but the kernels of that file, at one preset.
ONLY = ("--conformance-only-user-kernels", "--conformance-kernels", str(KERNELS), "--conformance-presets", "tiny")
LIMITS = Limits(launch_seconds=2.0, probe_seconds=2.0)

pytestmark = pytest.mark.skipif(not detect().supported, reason=detect().message)
#: What is nothing where the fake cards' tensors lie on the host.
with_own_memory = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the script of the fake cards and selects them."""

    def write(**content: Any) -> Path:
        folder = tmp_path / "cards"
        folder.mkdir(exist_ok=True)
        (folder / "script.json").write_text(json.dumps(content))
        monkeypatch.setenv(CARD_VARIABLE, CARD)
        monkeypatch.setenv(LOCK_FOLDER_VARIABLE, str(folder))
        monkeypatch.setenv(FOLDER, str(folder))
        return folder

    return write


def cards(*numbers: int) -> list[Card]:
    return [Card(number, number, wait_seconds=0.3) for number in numbers]


def fake_nodes(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A machine that has so many cards."""
    nodes = folder / "machine" / "dev"
    nodes.mkdir(parents=True)
    for number in range(count):
        (nodes / f"davinci{number}").touch()
    monkeypatch.setenv(ROOT_VARIABLE, str(nodes.parent))
    monkeypatch.setattr(card_pool_module, "_POOLS", {})


def named(name: str = "k00") -> Kernel:
    found = vars(load_module(KERNELS))[name]
    assert isinstance(found, Kernel)
    return found


def case_of(B: int = 3, seed: int = 7) -> Case:
    return make_case(CaseKey("rms_norm", "tiny", "normal", seed, (("B", B),), ()))


def run_cases(
    kernel: Declaration, *cases: Case, pool: CardPool | None = None, limits: Limits = LIMITS, folder: Path | None = None
) -> list[Outcome]:
    with KernelProcess(kernel, "device", pool=pool or CardPool(cards(0)), limits=limits, folder=folder) as process:
        return [process.run(case) for case in cases]


def detectors(case: Case, outcome: Outcome) -> list[str]:
    return [finding.detector for finding in judge(case, outcome).findings]


# PyPTO's own Python, down to the last call


def test_a_case_is_compiled_before_it_is_launched_and_waited_for(script: Callable[..., Path]) -> None:
    folder = script(compile="real")
    cases = [case_of(B, seed) for B, seed in ((3, 1), (5, 1), (3, 2), (5, 2))]
    held: list[int] = []

    @contextlib.contextmanager
    def lock(card: Card) -> Iterator[None]:
        held.append(len(events(folder, "compile", kernel="k00")))
        launches = len(events(folder, "launch", kernel="k00"))
        yield
        assert len(events(folder, "launch", kernel="k00")) <= launches + 1
        # But for the first time in a process, when PyPTO sets up what it needs on the card.
        assert len(events(folder, "compile", kernel="k00")) == (held[-1] or held.count(0) - 1), "compiled while the card was held"

    outcomes = run_cases(named(), *cases, pool=CardPool(cards(2), lock))
    assert [(outcome.status, outcome.message, outcome.card) for outcome in outcomes] == [("ok", "", 2)] * 4
    assert [detectors(case, outcome) for case, outcome in zip(cases, outcomes, strict=True)] == [[]] * 4
    # A program for each dimensions, and the cache serves what follows; the probe is the first that takes the card.
    assert [outcome.compiles for outcome in outcomes] == [1, 1, 0, 0]
    assert len(events(folder, "compile", kernel="k00")) == 2
    assert held == [0, 0, 1, 2, 2, 2]
    launches = events(folder, "launch", kernel="k00")
    assert [launch["shapes"][0][0] for launch in launches] == [3, 5, 3, 5]
    assert {launch["stream"] for launch in launches} == {7}
    assert {outcome.device_seconds for outcome in outcomes} == {0.0025}
    # Whoever asks for a workspace has waited for its stamp; after each launch somebody waits for that.
    kinds = [event["event"] for event in events(folder, None, process=launches[0]["process"])]
    assert all(kinds[at - 1] == kinds[at + 1] == "synchronize" for at, kind in enumerate(kinds) if kind == "launch")


def test_one_program_serves_every_batch_where_an_axis_is_dynamic(script: Callable[..., Path]) -> None:
    folder = script()
    cases = [case_of(B) for B in (3, 5, 1)]
    outcomes = run_cases(named("any_batch"), *cases)
    assert [detectors(case, outcome) for case, outcome in zip(cases, outcomes, strict=True)] == [[]] * 3
    assert [outcome.compiles for outcome in outcomes] == [1, 0, 0]
    assert len(events(folder, "launch", kernel="rms_norm")) == 3


@pytest.mark.parametrize("stage", ["qkv_proj", "kv_write", "paged_decode_fwd", "prefill_layer", "greedy_sample"])
def test_a_fake_card_computes_every_output_of_a_bundled_kernel(script: Callable[..., Path], stage: str) -> None:
    script()
    (kernel,) = (one for one in bundled_kernels() if one.stage.name == stage)
    cases = [make_case(key) for key in chosen_keys(kernel, [Space.of(kernel.stage)], "device", 2, 0, None)]
    outcomes = run_cases(kernel, *cases)
    assert [(outcome.status, outcome.message) for outcome in outcomes] == [("ok", "")] * 2
    assert [detectors(case, outcome) for case, outcome in zip(cases, outcomes, strict=True)] == [[]] * 2


def test_inputs_stay_on_the_card_while_they_are_the_same_and_nothing_else_does(script: Callable[..., Path]) -> None:
    folder = script()
    one, other = case_of(seed=1), case_of(seed=2)
    same_weight = dataclasses.replace(other, inputs={**other.inputs, "weight": one.inputs["weight"]})
    with KernelProcess(named(), "device", pool=CardPool(cards(0)), limits=LIMITS) as process:
        for case in (one, one, same_weight):
            assert detectors(case, process.run(case)) == []
        one.inputs["weight"].mul_(2)
        assert detectors(same_weight, process.run(same_weight)) == []
    launches = events(folder, "launch", kernel="k00")
    assert [launch["placed"] for launch in launches] == [3, 4, 6, 8]
    first, again, weight, _ = (launch["pointers"] for launch in launches)
    assert first[:2] == again[:2]
    assert again[1] == weight[1]
    # What a case leaves on the card is overwritten before the next one can find it.
    assert [launch["readable"] for launch in launches] == [0] * 4


def test_a_large_input_is_summed_on_the_card_and_read_back_where_it_was_changed(script: Callable[..., Path]) -> None:
    folder = script(kernels={"o_proj": {"fault": "spoils", "at": [2]}})
    (kernel,) = (one for one in bundled_kernels() if one.stage.name == "o_proj")
    case = make_case(CaseKey("o_proj", "qwen3_0_6b", "normal", 1, (("B", 2),)))
    outcomes = run_cases(kernel, case, case, case)
    assert [detectors(case, outcome) for outcome in outcomes] == [[], ["changed_input"], []]
    assert outcomes[1].changed_inputs == {"wo": 1}
    size = guarded_bytes(tuple(case.inputs["wo"].shape), torch.bfloat16)
    process = events(folder, "launch", kernel="o_proj")[0]["process"]
    told = [event["event"] for event in events(folder, None, process=process) if event.get("nbytes", size) == size]
    # Not after the first launch nor, when it has been placed anew, after the last.
    assert [kind for kind in told if kind in ("launch", "read")] == ["launch", "launch", "read", "launch"]


def test_a_card_is_used_by_its_position_and_named_by_its_number(script: Callable[..., Path]) -> None:
    folder = script()
    (outcome,) = run_cases(named(), case_of(), pool=CardPool([Card(5, 1)]))
    assert (outcome.status, outcome.card) == ("ok", 5)
    told = events(folder, "set_device")
    assert {(event["card"], event["index"], event["variable"]) for event in told} == {(5, 1, "1")}
    assert {event["device"] for event in events(folder, "launch")} == {"cpu" if MISSING else "npu:1"}


ON_A_CARD = """
import ctypes, types
import torch
from conformance.lanes.buffers import GUARD_BYTES, Guarded, guarded_bytes, poison
from conformance.tests.fake_memory import FakeMemory

FakeMemory(types.SimpleNamespace())
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64):
    host = poison(torch.empty(guarded_bytes((3, 5), dtype) // dtype.itemsize, dtype=dtype))
    placed = Guarded.over(host.to(torch.device("npu", 1), copy=True), (3, 5))
    assert placed.tensor.data_ptr() == placed.storage.data_ptr() + GUARD_BYTES and not placed.storage.data_ptr() % 512
    placed.tensor.fill_(1)
    assert placed.damage() is None
    placed.storage[GUARD_BYTES // dtype.itemsize + 15 :][:2] = 1
    assert placed.damage() == "2 elements past the end, the nearest 1 past it"
    assert torch.equal(Guarded.over(placed.storage.cpu(), (3, 5)).tensor, torch.ones(3, 5, dtype=dtype))
    try:
        placed.tensor + host[:15].view(3, 5)
    except RuntimeError as error:
        assert "device" in str(error)
    else:
        raise SystemExit("tensors of the card and of the host were mixed")
print("all dtypes", flush=True)
ctypes.string_at(placed.storage.data_ptr(), 1)
"""


@with_own_memory
def test_guards_work_on_a_card_whose_memory_the_host_cannot_read() -> None:
    done = subprocess.run([sys.executable, "-c", ON_A_CARD], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("all dtypes\n", -signal.SIGSEGV), done.stderr


# What goes wrong, and whose it is


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("at_launch", "crashed", "the card reported error 507015 .AICORE_EXCEPTION: an exception on an AI core.: .*errorStr"),
        ("at_synchronize", "crashed", "the card reported error 507018 .AICPU_EXCEPTION"),
        ("hang", "timed_out", "the launch did not end within its limit of 2 s"),
        ("out_of_memory", "unavailable", "card 0: the card reported error 207001 .MEMORY_ALLOCATION"),
    ],
)
def test_a_failure_on_a_card_that_is_well(script: Callable[..., Path], fault: str, status: str, message: str) -> None:
    script(kernels={"k00": {"fault": fault, "at": [2]}})
    pool = CardPool(cards(0))
    before, failed, after = run_cases(named(), *[case_of(seed=seed) for seed in range(3)], pool=pool)
    assert (before.status, failed.status, after.status) == ("ok", status, "ok")
    assert re.match(message, failed.message)
    assert pool.quarantined == {}


def test_a_process_whose_context_is_lost_is_replaced_and_the_case_run_once_more(script: Callable[..., Path]) -> None:
    folder = script(kernels={"k00": {"fault": "sticky", "at": [1]}, "k01": {"fault": "sticky"}})
    (outcome,) = run_cases(named(), case_of())
    assert outcome.status == "ok"
    assert outcome.message.startswith("run once more in another process: the card reported error 507899")
    assert detectors(case_of(), outcome) == []
    # Where it comes again in a process that is new, on a card that is well, it is the kernel's.
    (outcome,) = run_cases(named("k01"), case_of())
    assert outcome.status == "crashed"
    assert len(events(folder, "launch", kernel="k01")) == 2


@with_own_memory
def test_an_error_that_shows_when_the_card_is_used_next_is_told_as_the_cards(script: Callable[..., Path]) -> None:
    script(kernels={"k00": {"fault": "late", "at": [1]}})
    first, second = run_cases(named(), case_of(), case_of(5))
    assert (first.status, first.message, second.status) == ("ok", "", "ok")
    assert second.message.startswith("run once more in another process: the card reported error 507899")


def test_what_values_and_guards_tell_of_a_card(script: Callable[..., Path]) -> None:
    script(kernels={"k00": {"fault": "overrun"}, "k01": {"fault": "stale_workspace"}})
    case = case_of()
    (overrun,) = run_cases(named(), case)
    assert detectors(case, overrun) == ["out_of_bounds"]
    assert f"{GUARD_BYTES // 2} elements past" not in overrun.guard_damage["out"]
    assert "20000 elements past the end" in overrun.guard_damage["out"]
    (stale,) = run_cases(named("k01"), case)
    assert "not_finite" in detectors(case, stale)


def test_a_race_is_told_as_k_of_n(script: Callable[..., Path]) -> None:
    folder = script(kernels={"k00": {"fault": "wrong", "at": [13]}})
    key = case_of().key
    plan = Plans("device", named().stage).following(key)
    with KernelProcess(named(), "device", pool=CardPool(cards(0)), limits=LIMITS) as process:
        example, repeat = judged_runs(named(), key, process.run, plan)
    assert example.verdict.ok
    told = [finding for finding in repeat.verdict.findings if finding.detector == "nondeterministic"]
    assert [finding.message for finding in told] == [
        "1 of 20 further runs on the same inputs gave other bits than the first: run 12 of them in 1 of 768 elements of out, "
        "the first at [0, 5]"
    ]
    assert len(events(folder, "launch", kernel="k00")) == 21
    assert len(events(folder, "compile", kernel="k00")) == 1


def test_a_card_that_is_gone_hands_its_work_to_the_others(script: Callable[..., Path]) -> None:
    folder = script(cards={"0": {"fault": "gone"}})
    pool = CardPool(cards(0, 1))
    outcomes = run_cases(named(), case_of(), case_of(5), pool=pool)
    assert [(outcome.status, outcome.card) for outcome in outcomes] == [("ok", 1)] * 2
    assert "error 107001" in pool.quarantined[0]
    assert events(folder, "launch", card=0) == []
    assert len(events(folder, "compile", kernel="k00")) == 2


def test_where_no_card_is_left_the_rest_ends_at_once(script: Callable[..., Path]) -> None:
    script(cards={"0": {"fault": "old_driver"}, "1": {"fault": "wedged"}})
    pool = CardPool(cards(0, 1))
    with KernelProcess(named(), "device", pool=pool, limits=LIMITS) as process:
        outcome = process.run(case_of())
        assert outcome.status == "unavailable"
        assert "card 0: driver and CANN do not fit together: " in outcome.message
        assert "card 1: the card reported error 507018" in outcome.message
        assert process.run(case_of(5)).message == outcome.message
        assert process.starts == 0


def test_a_kernel_after_which_two_cards_are_wedged_gets_no_third(script: Callable[..., Path]) -> None:
    folder = script(kernels={"k00": {"fault": "wedges"}})
    pool = CardPool(cards(0, 1, 2))
    first, second = run_cases(named(), case_of(), case_of(5), pool=pool)
    assert first.status == second.status == "crashed"
    assert first.message.endswith("; after it card 0 and card 1 could not be used")
    assert set(pool.quarantined) == {0, 1}
    assert events(folder, "launch", kernel="k00", card=2) == []
    (other,) = run_cases(named("k01"), case_of(), pool=pool)
    assert (other.status, other.card) == ("ok", 2)


@pytest.mark.parametrize("how", ["exits", "silent", "printed"])
def test_where_the_compiler_compiles_nothing_no_card_and_no_kernel_is_blamed(script: Callable[..., Path], how: str) -> None:
    folder = script(compiler={"how": how})
    pool = CardPool(cards(0, 1))
    told = f"this machine's device compiler fails also for a kernel that is known to be right: {COMPILER_ERROR}"
    with KernelProcess(named(), "device", pool=pool, limits=LIMITS) as process:
        for _ in range(2):
            outcome = process.run(case_of())
            assert (outcome.status, outcome.message) == ("unavailable", told)
    assert pool.quarantined == {}
    assert [event["card"] for event in events(folder, "compile")] == [0]


@pytest.mark.parametrize(("how", "status"), [("exits", "crashed"), ("silent", "raised")])
def test_what_the_compiler_refuses_of_one_kernel_is_the_kernels(script: Callable[..., Path], how: str, status: str) -> None:
    folder = script(compiler={"how": how, "kernels": ["k00"]})
    pool = CardPool(cards(0))
    (refused,) = run_cases(named(), case_of(), pool=pool)
    assert refused.status == status
    assert COMPILER_ERROR in " ".join(refused.message.split())
    (other,) = run_cases(named("k01"), case_of(), pool=pool)
    assert other.status == "ok"
    assert pool.quarantined == {}
    assert events(folder, "launch", kernel="k00") == []


def test_a_card_that_stays_busy_is_unavailable(script: Callable[..., Path]) -> None:
    folder = script()
    with CardLock(*cards(0)):
        (outcome,) = run_cases(named(), case_of())
        assert outcome.status == "unavailable"
        assert outcome.message.startswith("card 0 was busy for 0.3 s: process ")
        assert events(folder, "launch") == []
    (outcome,) = run_cases(named(), case_of())
    assert outcome.status == "ok"


@pytest.mark.parametrize(
    ("texts", "code", "blame"),
    [
        (["synchronize: error code is 507015[PID: 1]"], 507015, "kernel"),
        (["ret=507899", "taskid: 0, retcode: 507018"], 507018, "kernel"),
        (["error code is 507899"], 507899, "process"),
        (["launch aicore failed: 507777"], 507777, "process"),
        (["argument x: expected shape [507777, 16]"], None, None),
        (["NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 60.97 GiB total capacity)[ERROR] ERR00006"], 207001, "machine"),
        (["current working operator name is aclnnCopy: HBM MULTI BIT ECC ERROR"], 507054, "card"),
        (["error code is 507054"], 507054, "card"),
        (["the launch number 1507015 of 5070150", "Expected 3 tensors"], None, None),
    ],
)
def test_the_cause_is_taken_from_what_is_said(texts: list[str], code: int | None, blame: str | None) -> None:
    found = device_error(texts)
    assert (found and found.code, found and found.blame) == (code, blame)


def test_lines_of_cann_and_of_pypto_are_read_from_the_logs(tmp_path: Path) -> None:
    log = tmp_path / "debug" / "device-0" / f"device-{os.getpid()}_20251222194004973.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "[ERROR] CCECPU(5670,aicpu_scheduler):2025-12-22-19:40:01.899.541 [kfc.cpp:105][Call][tid:5680][AICPU] old\n"
        "[ERROR] CCECPU(5670,aicpu_scheduler):2025-12-22-19:40:03.123.456 [kfc.cpp:105][Call][tid:5680][AICPU] of CANN\n"
        "[ERROR] PYPTO(12,python):2025-12-22 19:40:03.123 [pass.cpp:7][Run] of PyPTO\n"
        "[INFO] PYPTO(12,python):2025-12-22 19:40:03.123 [pass.cpp:7][Run] no error\n"
    )
    assert errors_in(tmp_path, datetime.datetime(2025, 12, 22, 19, 40, 2)) == ["of CANN", "of PyPTO"]


@pytest.mark.parametrize(
    ("text", "mismatch"),
    [
        # What PyPTO of CANN 9.1 says before a launch, and what is no word on the driver.
        ("Ascend driver package version 25.2.0 is not supported for onboard (need >= 25.5).", True),
        ("argument x: version 25.2.0 is not supported", False),
    ],
)
def test_a_driver_that_is_too_old_for_pypto_is_told(text: str, mismatch: bool) -> None:
    assert (of_another_version(["INFO: driver found", text]) == text) is mismatch


def test_check_keeps_evidence_of_what_a_card_reported(
    script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(kernels={"k00": {"fault": "at_launch"}})
    fake_nodes(tmp_path, monkeypatch, 1)
    monkeypatch.chdir(tmp_path)
    command = ["check", "rms_norm", f"{KERNELS}:k00", "--lane", "device", "--dims", "tiny", "--examples", "3", "--out", "kept"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1, done.output
    assert "crashed" in done.stdout
    assert "the card reported error 507015" in done.stdout
    kept = tmp_path / "kept" / "evidence" / "k00-tiny-device-1"
    assert "retcode: 507015" in (kept / "logs" / "stdout.log").read_text()
    assert json.loads((kept / "findings.json").read_text())["findings"][0]["detector"] == "crashed"
    assert not (kept / "outputs.safetensors").exists()


def test_diff_runs_both_kernels_on_the_card_that_is_named(
    script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = script()
    fake_nodes(tmp_path, monkeypatch, 2)
    kernels = [f"{KERNELS}:k00", f"{KERNELS}:k01"]
    command = ["diff", *kernels, "--lane", "device", "--dims", "tiny", "--examples", "2", "--device"]
    done = CliRunner().invoke(main, [*command, "1"])
    assert done.exit_code == 0, done.output
    launched = {(event["kernel"], event["card"]) for event in events(folder, "launch")}
    assert launched == {("conformance_probe", 1), ("k00", 1), ("k01", 1)}
    done = CliRunner().invoke(main, [*command, "7"])
    assert (done.exit_code, done.stderr) == (
        3,
        "conformance: the lane cannot run here: card 7 is not there (--device): the cards of this machine are 0, 1\n",
    )


# Generation

#: The fake's clock says 2.5 ms of every launch: a step is as many of them as it has dispatches.
_DECODE_OF_TWO_LAYERS = {"paged": 2, "host_loop": 4}


@pytest.mark.parametrize("driver", _DECODE_OF_TWO_LAYERS)
def test_generation_runs_on_the_card_that_is_named_and_tells_what_a_step_cost(
    script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    folder = script()
    fake_nodes(tmp_path, monkeypatch, 2)
    monkeypatch.chdir(tmp_path)
    done = generate("--driver", driver, "--device", "1", "--json", "out.json")
    assert done.exit_code == 0, done.output
    launches = Counter(event["kernel"] for event in events(folder, "launch", card=1))
    assert launches.pop("conformance_probe") == 1
    assert events(folder, "launch", card=0) == []
    dispatches = _DECODE_OF_TWO_LAYERS[driver]
    cost = json.loads((tmp_path / "out.json").read_text())["runs"][0]["cost"]
    prefill, decode = cost["steps"]
    assert (prefill["kind"], prefill["steps"], decode["kind"], decode["steps"]) == ("prefill", 1, "decode", 3)
    assert decode["median_seconds"] == pytest.approx(0.0025 * dispatches)
    took = f"{2.5 * dispatches:.2f} ms"
    assert f"  decode: 3 steps, median {took}, worst {took} on card 1\n" in done.stdout
    stages = cost["stages"]
    assert {one["stage"]: one["launches"] for one in stages} == launches
    assert {one["stage"]: one["compiles"] for one in stages} == dict.fromkeys(launches, 1)
    assert {one["median_seconds"] for one in stages} == {0.0025}
    if driver == "paged":
        # All arguments are placed for the first step; for the next ones no weights, but caches, logits and what a step brings.
        placed = [one["placed"] for one in events(folder, "launch", kernel="paged_decode_fwd")]
        contract = stage_named("paged_decode_fwd")
        weights = [one for one in contract.arguments if "weight" in one.name or one.name.startswith(("w", "rope"))]
        step = len(contract.arguments) - len(weights)
        assert placed == [len(contract.arguments) + number * step for number in range(3)]


def test_generation_goes_on_with_the_next_card_and_its_timeout_is_that_of_a_launch(
    script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(cards={"0": {"fault": "wedged", "after": 3}}, kernels={"greedy_sample": {"fault": "hang", "at": [2]}})
    fake_nodes(tmp_path, monkeypatch, 2)
    done = generate("--driver", "paged", "--timeout", "2")
    assert done.exit_code == 1, done.output
    message = "generate: paged: greedy_sample: kernel greedy_sample took too long: the launch did not end within its limit of 2 s"
    assert done.stderr.startswith(message)
    assert "  prefill: 1 step, median 5.00 ms, worst 5.00 ms on cards 0 and 1\n" in done.stdout
    assert "\n  run again: card 0 is used no more (the card reported error 507018" in done.stdout
    done = generate("--device", "7")
    missing = "card 7 is not there (--device): the cards of this machine are 0, 1"
    assert (done.exit_code, done.stderr) == (3, f"generate: the device executor cannot run here: {missing}\n")


def generate(*options: str) -> Result:
    model = ("--random", "1", "--dims", "L=2,S=64", "--prompt", "1,2,3", "--prompt", "7", "--new", "4")
    return CliRunner().invoke(generation, [*model, "--executor", "device", *options])


# Real size


def test_a_kernel_is_judged_at_real_size(script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = script(kernels={"k01": {"fault": "overrun", "at": [1]}})
    fake_nodes(tmp_path, monkeypatch, 1)
    done = run_pytest(tmp_path, "-m", "device and full_size", "-k", "k00 or k01", *ONLY)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    cases = list(read_run(tmp_path / "run").of("case"))
    assert {record.preset for record in cases} == {"qwen3_14b"}
    right, wrong = ([record for record in cases if record.kernel == name] for name in ("k00", "k01"))
    assert [(record.check, record.details.get("launches", 1)) for record in right] == [("example", 1), ("repeat", 20)]
    assert [finding.detector for finding in wrong[0].findings] == ["out_of_bounds"]
    assert len(events(folder, "launch", kernel="k00")) == 21


# Several processes


@pytest.mark.slow
def test_two_processes_of_a_run_keep_two_cards_busy(
    script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = script(seconds=0.02, kernels={"k02": {"fault": "overrun"}})
    fake_nodes(tmp_path, monkeypatch, 2)
    chosen = ("-m", "device and not full_size", "-k", "k00 or k01 or k02 or k03", "--conformance-profile", "dev")
    done = run_pytest(tmp_path, *chosen, *ONLY, "-n", "2")
    assert "1 failed, 3 passed" in done.stdout, done.stdout
    cases = list(read_run(tmp_path / "run").of("case"))
    assert {record.kernel: {finding.detector for finding in record.findings} for record in cases if record.findings} == {
        "k02": {"out_of_bounds"}
    }
    assert overlaps(events(folder, None)) == []
    launches = events(folder, "launch")
    by_card = [[event for event in launches if event["card"] == card] for card in range(2)]
    assert all({"conformance_probe"} < {event["kernel"] for event in told} for told in by_card)
    assert not {event["process"] for event in by_card[0]} & {event["process"] for event in by_card[1]}
    # Both at the same time: neither card's launches end before the other's begin.
    assert max(launches.index(told[0]) for told in by_card) < min(launches.index(told[-1]) for told in by_card)


@pytest.mark.slow
def test_two_runs_take_turns_on_a_card_after_a_run_was_killed_there(
    script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = script(seconds=0.05, kernels={"k00": {"fault": "hang"}})
    fake_nodes(tmp_path, monkeypatch, 1)
    killed = begun("k00", tmp_path)
    while not events(folder, "launch", kernel="k00"):
        assert killed.poll() is None
        time.sleep(0.02)
    others = [begun(name, tmp_path) for name in ("k01", "k02")]
    while not all((tmp_path / name).exists() for name in ("k01", "k02")):
        time.sleep(0.02)
    time.sleep(1.5)  # they have begun, and would launch in this time
    before = events(folder, "launch")
    assert {event["kernel"] for event in before} == {"conformance_probe", "k00"}
    lost = before[-1]["process"]
    killed.kill()
    while launches := events(folder, "launch"):
        if not alive(lost):
            break
        assert launches == before, "the kernel of the run that was killed is still on the card"
        time.sleep(0.002)
    for process in others:
        told, _ = process.communicate(timeout=60)
        assert process.returncode == 0, told
    assert overlaps([event for event in events(folder, None) if event["process"] != lost]) == []
    turns = [event["kernel"] for event in events(folder, "launch") if event["kernel"] in ("k01", "k02")]
    assert sum(one != other for one, other in itertools.pairwise(turns)) > 1, "one waited for the other to end"
    killed.communicate()


def begun(kernel: str, folder: Path) -> subprocess.Popen[str]:
    """``conformance check`` of a kernel on card 0, in a process of its own."""
    options = ["--lane", "device", "--dims", "tiny", "--examples", "3", "--out", str(folder / kernel)]
    command = [sys.executable, "-m", "conformance.cli", "check", "rms_norm", f"{KERNELS}:{kernel}", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


# A night


@pytest.mark.slow
def test_a_night_on_three_cards_of_which_one_wedges_and_one_hangs(
    script: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = script(
        cards={"0": {"fault": "wedged", "after": 60}, "1": {"fault": "hangs", "after": 150}},
        kernels={"k03": {"fault": "wrong", "at": [15, 65]}, "k07": {"fault": "overrun"}},
    )
    fake_nodes(tmp_path, monkeypatch, 3)
    monkeypatch.setattr(judging, "Limits", functools.partial(Limits, launch_seconds=2.0, probe_seconds=2.0))
    done = run_pytest(tmp_path, "-m", "device and not full_size", "-k", "k0 or k1", "--conformance-profile", "dev", *ONLY)
    records = read_run(tmp_path / "run")
    cases = list(records.of("case"))

    def records_of(kernel: str) -> list[Record]:
        return [record for record in cases if record.kernel == kernel]

    found: dict[str, set[str]] = {record.kernel: set() for record in cases}
    for record in cases:
        found[record.kernel] |= {finding.detector for finding in record.findings}
    assert {name for name, told in found.items() if told} == {"k03", "k07"}
    assert {"nondeterministic", "element"} <= found["k03"]
    assert found["k07"] == {"out_of_bounds"}
    assert set(found) == {*NAMES}
    assert list(records.of("error")) == []
    assert "2 failed, 16 passed" in done.stdout
    raced, overran = (tmp_path / "run" / "evidence" / f"{name}-tiny-device-1" for name in ("k03", "k07"))
    tensors = load_file(raced / "outputs.safetensors")
    assert int((tensors["first.out"] != tensors["out"]).sum()) == 1
    key = json.loads((raced / "findings.json").read_text())["case"]
    assert (raced / "command.txt").read_text().endswith(f"{KERNELS.name}:k03 --lane device --case {key}\n")
    about = json.loads((overran / "environment.json").read_text())
    assert (about["chip"], about["card"]) == ("Ascend910B4 (fake)", records_of("k07")[0].details["card"])
    assert about["versions"]["pypto"] == detect().version
    assert (overran / "builds").is_dir()
    assert (overran / "logs" / "stderr.log").is_file()
    # Everybody's work was done: as many cases of each, but of those that stop at a finding.
    counts = Counter(record.kernel for record in cases if record.check == "example")
    assert len({counts[name] for name in NAMES}) == 1
    used = {record.details["card"] for record in cases}
    assert used == {0, 1, 2}
    # What was being run when a card was lost is compiled once more, in another process; nothing else is.
    compiles = [(event["kernel"], str(event["shapes"])) for event in events(folder, "compile") if event["kernel"] in NAMES]
    again = Counter(compiles) - Counter(set(compiles))
    moved = [record for record in records.of("skip") if record.reason.startswith("run again: card ")]
    assert {record.reason.split()[3] for record in moved} == {"0", "1"}
    assert {kernel for kernel, _ in again} <= {record.kernel for record in moved}
    assert sum(record.details["compiles"] for record in cases) == len(compiles)
