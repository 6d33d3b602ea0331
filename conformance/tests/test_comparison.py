"""A kernel beside its replacement: what is lost, gained or left open, from reports, from kept runs, and through the command."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import conformance
from conformance.cases.key import CaseKey
from conformance.cli import main
from conformance.contract.kernel import Kernel
from conformance.contract.registry import capability_meanings
from conformance.errors import UsageError
from conformance.judge.verdict import Finding, Verdict
from conformance.lanes.base import Outcome
from conformance.reports import diff_report
from conformance.running.capabilities import CHECK_PREFIX
from conformance.running.diff import (
    SERVES_LESS,
    ClaimStatus,
    Comparison,
    KernelSummary,
    compare_runs,
    exit_code,
    of_report,
    of_run,
)
from conformance.running.records import Record, RecordWriter
from conformance.running.runs import Judged
from conformance.running.session import RunLog, Subject
from conformance.tests.reference_kernels import SMALL, reference_kernel

KEY = CaseKey.parse("paged_decode_layer:tiny:B=1,NB=9,seq_lens=3:normal:1")
REASON = "paged_kv does not hold on a pool of pages in random order (element): out[0, 0] is 1, expected 2"
WRONG = Finding("element", "out[0, 0] is 1, expected 2: 128 ulp off", "out", (0, 0), share=9.0)


def run(check: str = "example", *findings: Finding, share: float | None = 0.25) -> Judged:
    return Judged(check, KEY, Verdict(findings, share), Outcome("ok"))


def shown(*names: str) -> Judged:
    return run(CHECK_PREFIX + "+".join(names), share=0.9)


def refuted(name: str) -> Judged:
    return Judged(CHECK_PREFIX + name, KEY, Verdict((Finding("capability", REASON),)), Outcome("ok"))


def standing_of(capabilities: Sequence[str], *runs: Judged, name: str = "k", stage: str = "paged_decode_layer") -> KernelSummary:
    kernel = reference_kernel(stage, capabilities, name=name)
    return of_report(kernel, conformance.Report(stage, name, "eager", runs))


def with_status(**status: ClaimStatus) -> KernelSummary:
    """A judged kernel with these capabilities in these states."""
    declared = tuple(name for name, state in status.items() if state != "no")
    yes = frozenset(name for name, state in status.items() if state == "yes")
    fails = {name: f"{name} is not so" for name, state in status.items() if state == "fails"}
    return KernelSummary("k", "paged_decode_layer", declared, yes, fails, 12, 0, (), 0.25, capacity=16)


# -- what is known of one kernel ------------------------------------------------------------------------------------------------


def test_a_capability_is_shown_refuted_untested_or_not_declared() -> None:
    summary = standing_of(
        ["paged_kv", "variable_batch", "host_loop"],
        run(),
        refuted("paged_kv"),
        shown("variable_batch"),
        shown("variable_batch"),
    )
    states = {name: summary.status(name) for name in capability_meanings()}
    assert states == {
        "paged_kv": "fails",
        "variable_batch": "yes",
        "host_loop": "not shown",
        **dict.fromkeys(("stacked_weights", "fused_layers", "fused_lm_head", "chunked_layers"), "no"),
    }
    assert summary.refuted == {"paged_kv": REASON}


def test_one_run_that_fails_refutes_what_others_showed() -> None:
    summary = standing_of(["paged_kv"], run(), shown("paged_kv"), refuted("paged_kv"))
    assert summary.status("paged_kv") == "fails"


def test_one_run_is_evidence_of_several_capabilities() -> None:
    summary = standing_of(
        ["stacked_weights", "fused_layers"], run(), shown("stacked_weights", "fused_layers"), stage="decode_fwd"
    )
    assert summary.shown == {"stacked_weights", "fused_layers"}


def test_cases_are_counted_without_the_proofs() -> None:
    summary = standing_of(
        ["paged_kv"], run(share=0.3), run("repeat", share=0.4), run(), refuted("paged_kv"), shown("variable_batch")
    )
    assert (summary.runs, summary.failed, summary.detectors, summary.share) == (3, 0, (), 0.4)
    assert diff_report.verdict(summary) == "passed 3 runs, at most 0.40 of the allowance used"


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ((), "not judged"),
        ((refuted("paged_kv"),), "not judged"),
        ((run(share=None),), "passed 1 run"),
        (
            (run(), run("example", WRONG, share=9.0), run("repeat", WRONG, Finding("spread", "s"), share=9.0)),
            "FAILED 2 of 3 runs (element, spread)",
        ),
    ],
)
def test_a_verdict_is_a_few_words(runs: tuple[Judged, ...], verdict: str) -> None:
    assert diff_report.verdict(standing_of(["paged_kv"], *runs)) == verdict


RUNS = (
    run(share=0.3),
    run("repeat", share=0.31),
    run("example", WRONG, share=9.0),
    refuted("paged_kv"),
    shown("variable_batch"),
)


def keep(folder: Path, kernels: dict[Kernel, Sequence[Judged]], *, errors: Sequence[str] = ()) -> Path:
    log = RunLog(folder)
    subjects = {kernel: Subject(kernel, "tiny", "eager") for kernel in kernels}
    log.start(subjects.values(), {})
    for kernel, runs in kernels.items():
        for one in runs:
            log.judged(subjects[kernel], one)
        for reason in errors:
            log.could_not_run(subjects[kernel], reason)
    log.end(0)
    return folder


def test_a_kept_run_says_what_its_report_said(tmp_path: Path) -> None:
    able = ["paged_kv", "variable_batch", "host_loop"]
    kernel = reference_kernel("paged_decode_layer", able, name="k")
    other = reference_kernel("rms_norm", name="other")
    found = of_run(keep(tmp_path, {kernel: RUNS, other: [run()]}))
    assert found == {"k": standing_of(able, *RUNS), "other": standing_of([], run(), name="other", stage="rms_norm")}


def test_what_was_planned_and_not_judged_is_known_too(tmp_path: Path) -> None:
    kernel = reference_kernel("paged_decode_layer", ["paged_kv"], name="k")
    (summary,) = of_run(keep(tmp_path, {kernel: ()}, errors=["no compiler"])).values()
    assert (diff_report.verdict(summary), summary.status("paged_kv"), summary.errors) == (
        "not judged",
        "not shown",
        ("no compiler",),
    )


def test_a_capacity_is_kept(tmp_path: Path) -> None:
    kernel = reference_kernel("paged_decode_layer", ["variable_batch"], name="k", capacity=4)
    assert of_run(keep(tmp_path, {kernel: [run()]}))["k"].capacity == 4
    assert of_report(kernel, conformance.Report("paged_decode_layer", "k", "eager", (run(),))).capacity == 4


def test_what_was_only_compiled_is_not_judged(tmp_path: Path) -> None:
    kernel = reference_kernel("paged_decode_layer", ["paged_kv"], name="k")
    log = RunLog(tmp_path)
    compiled, judged = (Subject(kernel, "tiny", lane) for lane in ("compile_only", "eager"))
    log.start([compiled, judged], {})
    log.judged(compiled, run("compile", share=None))
    log.judged(compiled, run("compile", WRONG))
    log.end(0)
    (summary,) = of_run(tmp_path).values()
    assert (diff_report.verdict(summary), summary.failed, summary.detectors) == ("not judged", 0, ())
    assert Comparison(with_status(), summary).exit_code == 3


@pytest.mark.parametrize(("runs", "errors"), [((), ("no card",)), ((run(),), ())])
def test_a_kernel_that_was_skipped_everywhere_could_not_run(
    tmp_path: Path, runs: tuple[Judged, ...], errors: tuple[str, ...]
) -> None:
    """A lane that this machine lacks is none of the kernel's business where another lane judged it."""
    subject = Subject(reference_kernel("paged_decode_layer", name="k"), "tiny", "eager")
    log = RunLog(tmp_path)
    log.start([subject], {})
    for one in runs:
        log.judged(subject, one)
    log.skipped(subject, "no card")
    log.end(0)
    (summary,) = of_run(tmp_path).values()
    assert summary.errors == errors
    assert Comparison(with_status(), summary).exit_code == (3 if errors else 0)


def test_a_run_that_was_cut_short_leaves_its_kernels_in_doubt(tmp_path: Path) -> None:
    kernel = reference_kernel("paged_decode_layer", ["paged_kv"], name="k")
    keep(tmp_path, {kernel: [run(), shown("paged_kv")]})
    (records,) = tmp_path.glob("records-*.jsonl")
    records.write_text("".join(line for line in records.read_text().splitlines(keepends=True) if '"event": "end"' not in line))
    (summary,) = of_run(tmp_path).values()
    assert summary.errors == ("the run was cut short: it has no end",)
    found = Comparison(with_status(paged_kv="yes"), summary)
    assert found.exit_code == 3
    assert "NEW could not run: the run was cut short: it has no end" in str(found)


def test_a_run_from_before_capabilities_were_recorded_declares_none(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    plan = [{"kernel": "k", "stage": "rms_norm", "lane": "eager", "preset": "tiny"}]
    writer.write(Record("start", details={"plan": plan}))
    writer.write(Record("case", kernel="k", stage="rms_norm", lane="eager", check="example", status="passed", share=0.5))
    writer.close()
    (summary,) = of_run(tmp_path).values()
    assert (summary.declared, summary.capacity) == ((), 16)
    assert diff_report.verdict(summary) == "passed 1 run, at most 0.50 of the allowance used"


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run in") as error:
        of_run(tmp_path)
    assert "\n" not in str(error.value)


# -- two side by side -----------------------------------------------------------------------------------------------------------

#: Before, after, and what follows: what it is called, and the exit code.
PAIRS: list[tuple[ClaimStatus, ClaimStatus, str, int]] = [
    ("yes", "yes", "", 0),
    ("yes", "no", "lost", SERVES_LESS),
    ("yes", "fails", "lost", SERVES_LESS),
    ("yes", "not shown", "open", 3),
    ("not shown", "yes", "", 0),
    ("not shown", "no", "lost", SERVES_LESS),
    ("not shown", "fails", "lost", SERVES_LESS),
    ("not shown", "not shown", "open", 3),
    ("fails", "yes", "gained", 0),
    ("fails", "no", "", 0),
    ("fails", "fails", "", 1),
    ("fails", "not shown", "open", 3),
    ("no", "yes", "gained", 0),
    ("no", "no", "", 0),
    ("no", "fails", "", 1),
    ("no", "not shown", "open", 3),
]


@pytest.mark.parametrize(("before", "after", "called", "code"), PAIRS)
def test_what_becomes_of_a_capability(before: ClaimStatus, after: ClaimStatus, called: str, code: int) -> None:
    found = Comparison(with_status(host_loop="yes", paged_kv=before), with_status(host_loop="yes", paged_kv=after))
    names = {"lost": found.lost, "gained": found.gained, "open": found.open}
    assert names == {name: ("paged_kv",) if name == called else () for name in names}
    assert found.exit_code == code
    text = str(found)
    row = re.search(r"^  paged_kv .*$", text, re.MULTILINE)
    if (before, after) == ("no", "no"):
        assert row is None
        assert "paged_kv" not in text
    else:
        assert row is not None
        mark = {"lost": " LOST", "gained": " gained"}.get(called, "")
        assert re.fullmatch(rf"  paged_kv +{before} +{after} *{mark}", row[0])
    assert (f"lost: paged_kv ({capability_meanings()['paged_kv']}): " in text) is (called == "lost")
    assert ("not shown: paged_kv: no run put it to the test" in text) is (called == "open")
    if after == "fails":
        assert "paged_kv is not so" in text
    elif called == "lost":
        assert "k does not declare it" in text


@pytest.mark.parametrize("after", ["yes", "not shown"])
def test_a_smaller_capacity_is_lost(after: ClaimStatus) -> None:
    before = with_status(variable_batch="yes")
    smaller = dataclasses.replace(with_status(variable_batch=after), capacity=2)
    found = Comparison(before, smaller)
    assert (found.lost, found.exit_code) == (("variable_batch",), SERVES_LESS)
    lines = str(found).splitlines()
    assert f"lost: variable_batch ({capability_meanings()['variable_batch']}): variable_batch 16 -> 2" in lines
    assert Comparison(smaller, before).lost == ()
    # Without the capability the number says nothing.
    assert Comparison(with_status(), dataclasses.replace(with_status(), capacity=2)).lost == ()


def test_what_is_lost_weighs_more_than_findings_and_those_more_than_what_is_open() -> None:
    before = with_status(paged_kv="yes", host_loop="yes")
    wrong = dataclasses.replace(with_status(host_loop="not shown"), failed=1, detectors=("element",))
    assert Comparison(before, wrong).exit_code == SERVES_LESS
    assert Comparison(with_status(host_loop="yes"), wrong).exit_code == 1
    assert Comparison(with_status(host_loop="yes"), dataclasses.replace(wrong, failed=0)).exit_code == 3
    unjudged = dataclasses.replace(with_status(host_loop="yes"), runs=0)
    assert Comparison(with_status(host_loop="yes"), unjudged).exit_code == 3
    assert "NEW could not run: no card" in str(Comparison(before, dataclasses.replace(before, errors=("no card",))))
    assert Comparison(before, dataclasses.replace(before, errors=("no card",))).exit_code == 3
    # What is wrong with the old kernel is no reason against the new one.
    assert Comparison(wrong, with_status(host_loop="yes")).exit_code == 0


def test_the_text_names_both_kernels_their_verdicts_and_the_changed_arguments() -> None:
    old = standing_of(["paged_kv"], run(share=0.5), shown("paged_kv"), name="paged")
    new = standing_of([], run("example", WRONG, share=9.0), name="flat", stage="decode_fwd")
    lines = str(Comparison(old, new)).splitlines()
    assert lines[0] == "OLD paged (paged_decode_layer): passed 1 run, at most 0.50 of the allowance used"
    assert lines[1] == "NEW flat (decode_fwd): FAILED 1 of 1 run (element)"
    gone, come = "block_table, out, slot_mapping", "final_norm_weight, lm_head_weight, logits"
    assert lines[2] == f"    another stage: no longer takes {gone} and now takes {come}"
    assert re.fullmatch(r"  allowance used +0\.50 +9\.00", lines[-2])
    assert lines[-1] == f"lost: paged_kv ({capability_meanings()['paged_kv']}): flat does not declare it"


def named(name: str, **status: ClaimStatus) -> KernelSummary:
    return dataclasses.replace(with_status(**status), kernel=name)


def test_kernels_of_two_runs_are_paired_by_name() -> None:
    old = {name: named(name, paged_kv="yes") for name in ("a", "b")}
    new = {name: named(name, paged_kv="yes") for name in ("b", "c", "a")}
    assert [(one.old.kernel, one.new.kernel) for one in compare_runs(old, new)] == [("a", "a"), ("b", "b")]


def test_the_only_kernels_of_two_runs_are_a_pair_whatever_their_names() -> None:
    (found,) = compare_runs({"a": named("a")}, {"b": named("b")})
    assert (found.old.kernel, found.new.kernel) == ("a", "b")


def test_a_kernel_that_vanished_serves_nothing_any_more() -> None:
    old = {name: named(name, paged_kv="yes", host_loop="not shown") for name in ("a", "b")}
    stays, gone = compare_runs(old, {"a": named("a", paged_kv="yes", host_loop="yes")})
    assert (stays.lost, stays.exit_code) == ((), 0)
    assert (gone.lost, gone.exit_code) == (("paged_kv", "host_loop"), SERVES_LESS)
    assert "b is not judged any more" in str(gone)
    assert exit_code([stays, gone]) == SERVES_LESS
    # One that had declared nothing is missed as well.
    _, gone = compare_runs({"a": named("a"), "b": named("b")}, {"a": named("a")})
    assert gone.exit_code == 3


@pytest.mark.parametrize(
    ("old", "new"), [(("a", "b"), ("c", "d")), ((), ("a",)), (("a",), ()), ((), ()), (("a",), ("b", "c"))], ids=repr
)
def test_runs_without_a_common_kernel_are_refused_in_one_line(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="no kernel is in both runs: OLD has ") as error:
        compare_runs({name: named(name) for name in old}, {name: named(name) for name in new})
    assert "\n" not in str(error.value)


def test_the_gravest_of_several_comparisons_counts() -> None:
    right, wrong, untested = named("a"), dataclasses.replace(named("a"), failed=1), named("a", paged_kv="not shown")
    codes = [Comparison(named("a"), new) for new in (right, untested, wrong)]
    assert exit_code(codes[:1]) == exit_code([]) == 0
    assert exit_code(codes[:2]) == 3
    assert exit_code(codes) == 1
    assert exit_code([*codes, Comparison(named("a", paged_kv="yes"), right)]) == SERVES_LESS


# -- the command ----------------------------------------------------------------------------------------------------------------

FILE = """
import conformance
from conformance.tests.reference_kernels import compute

SERVING = ["paged_kv", "variable_batch", "host_loop"]


@conformance.kernel("paged_decode_layer", capabilities=SERVING)
def paged(*arguments, dims):
    compute("paged_decode_layer", arguments, dims)


@conformance.kernel("decode_layer", capabilities=["host_loop"], accepts=lambda dims: dims.B == 16 or "it takes B = 16 only")
def fixed(*arguments, dims):
    compute("decode_layer", arguments, dims)


def double(tensors, dims):
    if float(tensors["hidden_states"].abs().max()) < 0.1:
        tensors["out"].mul_(2)


@conformance.kernel("paged_decode_layer", capabilities=SERVING)
def wrong_where_small(*arguments, dims):
    compute("paged_decode_layer", arguments, dims, after=double)


@conformance.kernel("paged_decode_layer", capabilities=["paged_kv", "host_loop", "fused_lm_head"])
def claims(*arguments, dims):
    compute("paged_decode_layer", arguments, dims)


def plain(x, weight, out):
    out.zero_()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def diff(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["diff", *arguments])


def judged_diff(old: str, new: str, examples: int = 4) -> Result:
    small = ",".join(f"{name}={size}" for name, size in SMALL.items())
    return diff(old, new, "--dims", small, "--examples", str(examples))


def test_a_kernel_in_its_own_place_loses_nothing(folder: Path) -> None:
    done = judged_diff("mine.py:paged", "mine.py:paged", 1)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("OLD paged (paged_decode_layer): passed ")
    assert lines[1] == "NEW" + lines[0][3:]
    for name in ("paged_kv", "variable_batch", "host_loop"):
        assert f"  {name:<18}{'yes':<11}yes" in lines
    assert lines[-1] == "nothing is lost"
    # The right order is old, then new: nothing is written but what is asked for.
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["mine.py"]


def test_a_contiguous_kernel_of_one_batch_in_the_place_of_a_serving_one_loses_exactly_that(folder: Path) -> None:
    done = judged_diff("mine.py:paged", "mine.py:fixed", 1)
    assert done.exit_code == SERVES_LESS, done.output
    lost = [line for line in done.stdout.splitlines() if line.startswith("lost: ")]
    assert lost == [
        f"lost: {name} ({capability_meanings()[name]}): fixed does not declare it" for name in ("paged_kv", "variable_batch")
    ]
    assert "NEW fixed (decode_layer): passed " in done.stdout
    assert "another stage: no longer takes block_table, slot_mapping" in done.stdout
    assert f"  {'host_loop':<18}{'yes':<11}yes" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "serves less: 2 capabilities lost"


def test_a_kept_run_is_as_good_as_a_kernel(folder: Path) -> None:
    small = ",".join(f"{name}={size}" for name, size in SMALL.items())
    options = ["--dims", small, "--examples", "2", "--out", "kept"]
    assert CliRunner().invoke(main, ["check", "paged_decode_layer", "mine.py:paged", *options]).exit_code == 0
    done = judged_diff("kept", "mine.py:wrong_where_small")
    assert done.exit_code == 1, done.output
    assert re.search(
        r"^NEW wrong_where_small \(paged_decode_layer\): FAILED \d+ of \d+ runs \(element", done.stdout, re.MULTILINE
    )
    assert "lost: " not in done.stdout
    assert done.stdout.splitlines()[-1] == "nothing is lost, but the new kernel has findings"


def test_of_a_kept_run_only_the_kernel_of_that_name_counts(folder: Path) -> None:
    kernels = [reference_kernel("paged_decode_layer", ["paged_kv"], name=name) for name in ("paged", "other")]
    good = [run(), shown("paged_kv")]
    keep(folder / "kept", dict.fromkeys(kernels, good))
    done = judged_diff("kept", "mine.py:paged")
    assert done.exit_code == 0, done.output
    assert (done.stdout.count("OLD "), done.stdout.count("LOST")) == (1, 0)
    for arguments in (("kept", "mine.py:fixed"), ("mine.py:fixed", "kept")):
        done = diff(*arguments)
        assert done.exit_code == 2, done.output
        assert done.stderr == "conformance: no kernel 'fixed' in the run kept; found paged, other\n"
        assert not done.stdout


def test_a_claim_that_cannot_be_shown_is_no_gain(folder: Path) -> None:
    done = judged_diff("mine.py:claims", "mine.py:claims")
    assert done.exit_code == 1, done.output
    assert "not held: fused_lm_head: paged_decode_layer has no arguments that fused_lm_head (ends in final norm" in done.stdout
    assert "gained" not in done.stdout


def test_two_kept_runs_are_compared_without_running_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.running.check.check", None)
    kernels = [reference_kernel("paged_decode_layer", ["paged_kv"], name=name) for name in ("a", "b")]
    good = [run(), shown("paged_kv")]
    before = keep(tmp_path / "before", dict.fromkeys(kernels, good))
    after = keep(tmp_path / "after", {kernels[0]: good, kernels[1]: [run(), refuted("paged_kv")]})
    done = diff(str(before), str(after))
    assert done.exit_code == SERVES_LESS
    assert f"lost: paged_kv ({capability_meanings()['paged_kv']}): {REASON}" in done.stdout
    assert done.stdout.splitlines()[-1] == "serves less: 1 capability lost"
    assert diff(str(after), str(before)).exit_code == 0
    assert diff(str(before), str(before)).stdout.splitlines()[-1] == "nothing is lost"


def test_a_kernel_that_the_new_run_does_not_judge_is_counted_as_lost(tmp_path: Path) -> None:
    kernels = [reference_kernel("paged_decode_layer", ["paged_kv", "host_loop"], name=name) for name in ("a", "b")]
    good = [run(), shown("paged_kv"), shown("host_loop")]
    before = keep(tmp_path / "before", dict.fromkeys(kernels, good))
    after = keep(tmp_path / "after", {kernels[0]: good, reference_kernel("rms_norm", name="c"): [run()]})
    done = diff(str(before), str(after))
    assert done.exit_code == SERVES_LESS
    assert "NEW could not run: b is not judged any more" in done.stdout
    assert done.stdout.splitlines()[-1] == "serves less: 2 capabilities lost"


def test_what_no_run_put_to_the_test_is_left_open(tmp_path: Path) -> None:
    kernel = reference_kernel("paged_decode_layer", ["paged_kv"], name="a")
    before = keep(tmp_path / "before", {kernel: [run(), shown("paged_kv")]})
    after = keep(tmp_path / "after", {kernel: [run()]})
    done = diff(str(before), str(after))
    assert done.exit_code == 3
    last = ["not shown: paged_kv: no run put it to the test", "1 capability was not put to the test"]
    assert done.stdout.splitlines()[-2:] == last
    both = reference_kernel("paged_decode_layer", ["paged_kv", "host_loop"], name="a")
    wrong = keep(tmp_path / "wrong", {both: [run("example", WRONG)]})
    done = diff(str(before), str(wrong))
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1] == "the new kernel has findings, and 2 capabilities were not put to the test"
    # What could not be judged is no claim.
    nothing = keep(tmp_path / "nothing", {reference_kernel("rms_norm", name="a"): ()})
    done = diff(str(nothing), str(nothing))
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (3, "not everything could be judged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.py:paged", "mine.py:plain"], "mine.py:plain is a plain function: decorate it with @conformance.kernel("),
        (["mine.py:paged", "mine.py:nobody"], "has no kernel or function 'nobody'; its kernels: paged, fixed, wrong_where_small"),
        (["mine.py:paged", "nowhere.py:f"], "no such kernel file"),
        (["mine.py:paged", "runs/last"], "no kernel 'runs/last' in the bundled kernels (and there is no such folder)"),
        (["attention", "atention"], "no kernel 'atention' in the bundled kernels"),
        (["mine.py:paged", "empty"], "no run in empty: expected records-*.jsonl files"),
        (["mine.py:paged", "mine.py:fixed", "--lane", "compile_only"], "diff compares what kernels compute"),
        (["mine.py:paged", "mine.py:fixed", "--dims", "huge"], "unknown preset 'huge'"),
        (["mine.py:paged", "mine.py:fixed", "--dims", "B"], "unknown preset 'B'"),
        (["mine.py:paged", "mine.py:fixed", "--dims", "B=3"], "kernel fixed takes none of these cases: it takes B = 16 only"),
        (["mine.py:paged", "mine.py:fixed", "--dims", "B=²"], "overrides such as B=3,S=64, found 'B=²'"),
        (["mine.py:paged", "mine.py:fixed", "--examples", "0"], "examples must be a positive whole number, found 0"),
        (["mine.py:paged", "mine.py:fixed", "--lane", "interpret"], "a torch kernel has no lane 'interpret'"),
        (["mine.py:paged", "mine.py:fixed", "--timeout", "0"], "--timeout must be a positive number of seconds"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("conformance.running.check.worker_runner", None)
    (folder / "empty").mkdir()
    done = diff(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
