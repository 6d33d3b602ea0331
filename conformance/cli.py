"""The ``conformance`` command.

Exit codes: 0 everything that had to run ran and passed; 1 findings; 2 usage; 3 something that had to run could not; 4 (of
``diff``) a replacement serves less than what it replaces; 130 interrupted, 143 asked to end.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from conformance.command import COULD_NOT_RUN, FINDINGS, PASSED, USAGE, FilePath, Group, card_options, say, shown_path
from conformance.errors import UnavailableError, UsageError
from conformance.lanes import LANES, find_lane, lane_named
from conformance.lanes.cards import CardChoice, choice_of
from conformance.lanes.device import NPU
from conformance.outside import require_path
from conformance.running.interrupts import interrupted_once
from conformance.toolchains.npu import AUTOLOAD_VARIABLE

if TYPE_CHECKING:
    from conformance.cases.key import CaseKey
    from conformance.cases.space import Space
    from conformance.contract.kernel import Declaration
    from conformance.exam.results import Exam
    from conformance.running.check import Report
    from conformance.running.diff import KernelSummary
    from conformance.running.plans import RunPlan
    from conformance.running.runs import Judged
    from conformance.running.session import RunLog, Subject


def _any_of(names: Iterable[str]) -> str:
    """``one, two or three``, for help texts."""
    *before, last = names
    return f"{', '.join(before)} or {last}"


#: Processes of an exam for each core: more only take memory.
MOST_PROCESSES = 8

_DIMS_HELP = "a preset, or overrides of tiny (preset=NAME among them); several presets in turn if not given"


@click.group("conformance", cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pypto-kernel-conformance")
def main() -> None:
    """Judge kernels against their contracts: is it right, and if not, where and why."""
    # Who judges needs no card, and a torch_npu that does not import must not keep the other lanes from running. The device lane
    # imports it by itself.
    os.environ.setdefault(AUTOLOAD_VARIABLE, "0")


@main.command()
def doctor() -> None:
    """Say what can run on this machine, and what to do about what cannot."""
    from conformance.reports import inventory
    from conformance.toolchains.doctor import doctor as examine

    say(inventory.doctor(examine()))


@main.command("list")
@click.option(
    "--kernels", "locations", multiple=True, type=FilePath(), metavar="FILE.py", help="also list the kernels of this file"
)
def list_command(locations: tuple[Path, ...]) -> None:
    """List stages with their arguments, and kernels with their lanes and capabilities."""
    from conformance.contract.registry import stages
    from conformance.lanes import lanes_of
    from conformance.lanes.listing import bundled_kernels, kernels_of
    from conformance.reports import inventory

    kernels = bundled_kernels()
    for location in locations:
        kernels += kernels_of(str(location))
    for name, stage in stages().items():
        arguments = [argument.describe() for argument in stage.arguments]
        of_stage = {
            kernel.name: (kernel.toolchain, tuple(lane.name for lane in lanes_of(kernel.toolchain)), kernel.capabilities)
            for kernel in kernels
            if kernel.stage.id == stage.id
        }
        declarable = [*stage.declarable, *(f"precision={policy}" for policy in stage.policies if stage.policies[policy])]
        declarable += ["ties=any"] if stage.ties is not None else []
        say(inventory.stage_entry(name, stage.summary, arguments, of_stage, declarable))


@main.command()
@click.argument("stage")
@click.argument("target", metavar="[FILE.py:FUNC]", required=False)
@click.option("--dims", default=None, metavar="PRESET|B=3,S=64", help=_DIMS_HELP)
@click.option("--examples", type=int, default=None, help="how many cases; the stage's own number if not given")
@click.option("--seed", default=0, show_default=True, help="another seed draws other cases")
@click.option("--case", "case_key", default=None, metavar="KEY", help="run this one case again")
@click.option("--all-passes", is_flag=True, help="with --case: compare every compiler pass, not only the last")
@click.option("--lane", default="auto", show_default=True, help=_any_of(lane.name for lane in LANES))
@click.option("--timeout", type=float, default=None, metavar="SECONDS", help="time limit of one run")
@card_options
@click.option("--out", type=FilePath(), default=None, metavar="DIR", help="keep records and reports here")
@click.option("--expected-failures", type=FilePath(), metavar="FILE", help="lines KERNEL[@LANE] REASON")
@click.option("--rounds", default="", metavar="NAME,NAME", help="roundings that the kernel declares: see conformance list")
@click.option("--precision", default="contract", show_default=True, metavar="POLICY", help="a named set of such roundings")
@click.option("--ties", default="lowest", show_default=True, help="which of several equals the kernel takes: lowest or any")
def check(
    stage: str,
    target: str | None,
    dims: str | None,
    examples: int | None,
    seed: int,
    case_key: str | None,
    all_passes: bool,
    lane: str,
    timeout: float | None,
    device: str,
    device_wait: float | None,
    out: Path | None,
    expected_failures: Path | None,
    rounds: str,
    precision: str,
    ties: str,
) -> None:
    """Judge one kernel: FUNC of FILE.py, or the bundled one of STAGE. It runs in a process of its own."""
    from conformance import reports
    from conformance.cases.space import Space
    from conformance.contract.registry import short_name
    from conformance.running.check import Report, chosen_keys, require_seconds, resolve_lane, taken_spaces
    from conformance.running.plans import RunPlan
    from conformance.running.session import ClaimedFolder, ExpectedFailures, RunLog, Subject, new_run_folder

    if all_passes and not case_key:
        raise UsageError("--all-passes goes with --case KEY: without it all passes are compared once anyway, on a small case")
    require_seconds("--timeout", timeout)
    require_path(target or "")
    declared = [name.strip() for name in rounds.split(",") if name.strip()]
    kernel = _kernel(stage, target).declaring(declared, precision, ties)
    spaces, refused = taken_spaces(kernel, Space.those_of(kernel.stage, _dims(dims)))
    subject = Subject(kernel, "", resolve_lane(kernel, lane))  # at every preset
    cards = choice_of(device, device_wait, unused=_without_card([subject.lane]))
    expected = ExpectedFailures.read(expected_failures) if expected_failures else ExpectedFailures()
    expected.require_known([kernel])
    keys = chosen_keys(kernel, spaces, subject.lane, examples, seed, case_key)
    repeats = lane_named(subject.lane).repeats[0]
    plan = RunPlan(repeats, passes="all" if all_passes else "last") if case_key else None

    folder = out if out is not None else new_run_folder(Path.cwd() / "runs")
    options = {"examples": len(keys), "seed": seed, "dims": dims or "", "case": case_key or ""}
    said = {"rounds": ",".join(declared), "precision": precision, "ties": ties}
    options |= {name: value for name, value in said.items() if value not in ("", "contract", "lowest")}
    refused = {} if case_key else refused
    planned = dict.fromkeys([*(key.preset for key in keys), *refused])
    runs: list[Judged] = []
    stopped: BaseException | None = None
    with ClaimedFolder(folder), interrupted_once() as interrupts:
        log = RunLog(folder)
        log.start([dataclasses.replace(subject, preset=preset) for preset in planned], options)
        for preset, reason in refused.items():
            log.skipped(dataclasses.replace(subject, preset=preset), reason)
        try:
            _judge(subject, log, keys, plan, spaces[0], timeout, cards, runs)
            interrupts.raise_pending()
        except (KeyboardInterrupt, Exception) as error:
            stopped = error
        interrupts.ignore()  # what was judged is kept and told, whatever comes now
        found = Report(short_name(kernel.stage), subject.name, subject.lane, tuple(runs), planned=len(keys), refused=refused)
        code, told = _told(found, subject, options, log, expected.reason(subject), stopped, interrupts.exit_code)
        lost = log.end(code)
        if (runs or isinstance(stopped, KeyboardInterrupt)) and not log.taken:
            try:
                built = reports.build(folder, ("html", "markdown", "junit"), unwritten=lost)
                kept = [path.name for path in built.values() if isinstance(path, Path)]
                told += [f"kept in {shown_path(folder)}: {', '.join(kept)}"] if kept else []
            except UsageError as error:  # there are no records
                lost.append(str(error))
    say("\n".join(told)) if told else None
    for line in lost:
        say(f"conformance: {line}", err=True)
    if isinstance(stopped, Exception):
        raise stopped
    sys.exit(COULD_NOT_RUN if lost and code in (PASSED, FINDINGS) else code)


def _told(
    found: Report,
    subject: Subject,
    options: dict[str, Any],
    log: RunLog,
    expected_reason: str | None,
    stopped: BaseException | None,
    interrupted_code: int,
) -> tuple[int, list[str]]:
    """The exit code of a check and what is printed, which the last records say as well."""
    from conformance.reports import check_report
    from conformance.running.session import relative_source

    told = []
    if stopped is not None:
        interrupted = isinstance(stopped, KeyboardInterrupt)
        cases = f"{found.examples} of {found.planned} cases were judged"
        log.could_not_run(subject, f"interrupted: {cases}" if interrupted else str(stopped) or repr(stopped))
        if found.runs or interrupted:
            told.append(f"{'interrupted' if interrupted else 'not judged to the end'}: {cases}")
    if found.runs and not (found.ok and stopped):
        told.append(str(found))
    again = check_report.replay_line(found, relative_source(subject.kernel), options)
    if again:
        told.append(again)
    if stopped is not None:
        if isinstance(stopped, KeyboardInterrupt):
            return interrupted_code, told
        usage = isinstance(stopped, UsageError) and not isinstance(stopped, UnavailableError)
        return (USAGE if usage else COULD_NOT_RUN), told
    if expected_reason is not None:
        log.expected(subject, expected_reason, fixed=found.ok)
        state = "FIXED, take it off the list" if found.ok else "failed as expected"
        return PASSED, [*told, f"{state}: {expected_reason}"]
    return (PASSED if found.ok else FINDINGS), told


def _judge(
    subject: Subject,
    log: RunLog,
    keys: list[CaseKey],
    plan: RunPlan | None,
    space: Space,
    timeout: float | None,
    cards: CardChoice,
    runs: list[Judged],
) -> None:
    """Judge the cases, each recorded and added to ``runs`` as it ends."""
    from conformance.running.check import runs_of, told_to
    from conformance.running.evidence import runner_with_evidence

    told = told_to(True, f"{subject.kernel.name} {subject.lane}", len(keys))
    runner = runner_with_evidence(log.folder, subject, timeout, cards)
    with interrupted_once() as interrupts, told as tell, runner as (run, keep):
        for judged in runs_of(subject.kernel, keys, space, run, subject.lane, plan, keep):
            runs.append(judged)
            log.judged(subject, judged)
            tell(runs)
            interrupts.raise_pending()


def _kernel(stage: str, target: str | None) -> Declaration:
    """The kernel that ``FILE.py:FUNC`` names, or the bundled one of a stage."""
    from conformance.contract.loading import find_kernel
    from conformance.contract.registry import stage_named
    from conformance.lanes.listing import bundled_kernels

    contract = stage_named(stage)
    if target is None:
        return find_kernel(
            [one for one in bundled_kernels() if one.stage.id == contract.id], contract.name, "the bundled kernels"
        )
    return _named(target, stage)


def _named(target: str, stage: str | None = None) -> Declaration:
    """The kernel that ``FILE.py:FUNC`` names, or the plain function, if there is a stage that it is to be one of."""
    from conformance.lanes.listing import kernel_named

    location, separator, name = target.rpartition(":")
    if not separator:
        raise UsageError(f"expected FILE.py:FUNC, found {target!r}")
    return kernel_named(location, name, stage)


def read_dims(text: str, example: str = "B=3,S=64") -> str | dict[str, Any]:
    """What ``--dims`` says: a preset's name, or overrides such as ``example``; raises ``UsageError`` for anything else."""
    if "=" not in text:
        return text
    overrides: dict[str, Any] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(?:(preset)\s*=\s*([\w./-]+)|(\w+)\s*=\s*([0-9]{1,30}))\s*", item)
        if match is None:
            raise UsageError(f"--dims takes a preset or overrides such as {example}, found {item.strip()[:60]!r}")
        overrides |= {match[1]: match[2]} if match[1] else {match[3]: int(match[4])}
    return overrides


def _dims(text: str | None) -> str | dict[str, Any] | None:
    return None if text is None else read_dims(text)


@main.command()
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@click.option("--dims", default=None, metavar="PRESET|B=3,S=64", help=_DIMS_HELP)
@click.option("--examples", default=12, show_default=True, help="how many cases for each kernel")
@click.option("--seed", default=0, show_default=True, help="another seed draws other cases")
@click.option("--lane", default="auto", show_default=True, help=_any_of(lane.name for lane in LANES if lane.executes))
@click.option("--timeout", type=float, default=None, metavar="SECONDS", help="time limit of one run")
@card_options
def diff(
    old: str,
    new: str,
    dims: str | None,
    examples: int,
    seed: int,
    lane: str,
    timeout: float | None,
    device: str,
    device_wait: float | None,
) -> None:
    """Compare two kernels, NEW in the place of OLD: what is served less, what changed.

    Each is a bundled kernel's name, FILE.py:FUNC, or the folder of a kept run. Exit code 4: a capability is lost.
    """
    from conformance.cases.space import Space
    from conformance.reports import diff_report
    from conformance.running import diff as comparison
    from conformance.running.check import InterruptedCheck, chosen_keys, require_seconds, resolve_lane, taken_spaces

    require_seconds("--timeout", timeout)
    named = find_lane(lane)
    if named is not None and not named.executes:
        raise UsageError(f"diff compares what kernels compute: {lane} executes nothing")
    # Both are looked up, and asked whether they take what is asked, before either is judged, which takes its time.
    before, after = _subject_of_diff(old), _subject_of_diff(new)
    lanes = []
    for subject in (before, after):
        if not isinstance(subject, dict):
            lanes.append(resolve_lane(subject, lane))
            spaces, _ = taken_spaces(subject, Space.those_of(subject.stage, _dims(dims)))
            chosen_keys(subject, spaces, lanes[-1], examples, seed, None)
    cards = choice_of(device, device_wait, unused=_without_card(lanes))
    if isinstance(before, dict) and not isinstance(after, dict):
        before = comparison.for_kernel(after, before, old)
    elif isinstance(after, dict) and not isinstance(before, dict):
        after = comparison.for_kernel(before, after, new)
    asked: dict[str, Any] = {"dims": _dims(dims), "examples": examples, "seed": seed, "lane": lane, "timeout": timeout}
    summaries: list[dict[str, KernelSummary]] = []
    try:
        for subject in (before, after):
            summaries.append(subject if isinstance(subject, dict) else _summary_of(subject, asked, cards))
    except KeyboardInterrupt as error:
        for side, judged in zip(("OLD", "NEW"), summaries, strict=False):
            for known in judged.values():
                say(f"{side} {known.kernel} ({known.stage}): {diff_report.verdict(known)}")
        if isinstance(error, InterruptedCheck):
            say(f"interrupted: {error.report.examples} of {error.report.planned} cases were judged")
            say(error.report) if not error.report.ok and error.report.runs else None
        raise
    found = comparison.compare_runs(*summaries)
    for one in found:
        say(diff_report.render(one, colour=sys.stdout.isatty()), coloured=True)
    say(diff_report.conclusion(found))
    sys.exit(comparison.exit_code(found))


def _subject_of_diff(text: str) -> dict[str, KernelSummary] | Declaration:
    """What is known of the kernels of a kept run, or a kernel that is to be judged: of a file or a bundled one."""
    from conformance.contract.loading import find_kernel
    from conformance.lanes.listing import bundled_kernels
    from conformance.running import diff as comparison

    require_path(text)
    folder = Path(text)
    if folder.is_dir():
        return comparison.of_run(folder)
    if ":" not in text:
        return find_kernel(bundled_kernels(), text, "the bundled kernels (and there is no such folder)")
    return _named(text)


def _summary_of(kernel: Declaration, asked: dict[str, Any], cards: CardChoice) -> dict[str, KernelSummary]:
    """What is known of a kernel that is judged now."""
    from conformance.running import diff as comparison
    from conformance.running.check import check as judge_kernel

    report = judge_kernel(kernel.stage_name, kernel, **asked, isolated=True, cards=cards)
    return {kernel.name: comparison.of_report(kernel, report)}


def _without_card(lanes: Iterable[str]) -> str:
    """What is run, if it is nothing on a card; empty if something is."""
    if any(lane_named(lane).takes_card(NPU) for lane in lanes):
        return ""
    return " and ".join(f"the {lane} lane" for lane in dict.fromkeys(lanes)) or "a kept run"


@main.command()
@click.option("--full", is_flag=True, help="many examples, and 10,000 random legal runs a single stage: hours; keeps a page")
@click.option("--stage", default=None, help="only the kernels of this stage")
@click.option("--lane", default=None, metavar="LANE", help="only kernels that this lane shows")
@click.option("--seed", default=0, show_default=True, help="another seed draws other cases")
@click.option("--precision", default="contract", show_default=True, metavar="POLICY", help="what every kernel declares")
@click.option("--processes", type=int, default=None, metavar="N", help="as many as there are cores by default")
@click.option("--out", type=FilePath(), default=None, metavar="DIR", help="write exam.json and exam.html here")
def exam(
    full: bool, stage: str | None, lane: str | None, seed: int, precision: str, processes: int | None, out: Path | None
) -> None:
    """Ask how good a judge the harness is: known faults and legal variants, by our rule and by those in use elsewhere.

    Exit code 1 if our rule rejected a legal kernel, missed a fault of a single stage, or more than 3% of those of layers; with
    --full also if a single stage's own number of examples shows a fault with less than 99%.
    """
    from conformance.exam.efforts import EFFORTS
    from conformance.exam.pool import take
    from conformance.exam.results import write_json
    from conformance.outside import write_whole
    from conformance.reports import exam_page, exam_table
    from conformance.reports.progress import LiveProgress
    from conformance.reports.text import number
    from conformance.running.check import require_count

    require_count(1, seed)
    most = MOST_PROCESSES * (os.cpu_count() or 1)
    if processes is not None and not 1 <= processes <= most:
        raise UsageError(f"--processes takes a positive number, here at most {most}, found {str(processes)[:20]}")
    if out is None and full:
        out = Path("runs") / f"exam-{time.strftime('%Y%m%d-%H%M%S')}"
    if out is not None:
        if (out / "exam.json").exists():
            raise UsageError(f"{out} already holds an exam: name another folder, or remove it")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {out}: {error.strerror or error}") from error

    def keep(result: Exam) -> None:
        if out is not None:
            write_json(result, out / "exam.json")
            write_whole(out / "exam.html", exam_page.render(result))

    def keep_meanwhile(result: Exam) -> None:
        try:
            keep(result)
        except OSError as error:  # there may be room by the end
            say(f"cannot keep the exam in {out} so far: {error.strerror or error}", err=True)

    lost: OSError | None = None
    live = LiveProgress("exam", 0, "parts")

    def show(done: int, planned: int, wrong: int) -> None:
        live.update(done, f"{number(wrong, 'kernel')} judged wrongly", planned)

    with interrupted_once() as interrupts:
        try:
            with live:
                result = take(
                    EFFORTS["full" if full else "quick"],
                    seed=seed,
                    stage=stage,
                    lane=lane,
                    precision=precision,
                    processes=processes,
                    progress=show,
                    keep=keep_meanwhile,
                )
            interrupts.ignore()
        except KeyboardInterrupt:
            say("interrupted before anything was judged", err=True)
            sys.exit(interrupts.exit_code)
        try:
            keep(result)  # before anything is shown: it may have taken hours
        except OSError as error:
            lost = error
    say(exam_table.render(result, min(100, shutil.get_terminal_size().columns), colour=sys.stdout.isatty()), coloured=True)
    if lost is not None:
        say(f"cannot keep the exam in {out}: {lost.strerror or lost}; the table above is all that is left of it", err=True)
        sys.exit(COULD_NOT_RUN)
    if out is not None:
        say(f"kept in {out}: exam.json, exam.html")
    if interrupts.number:
        sys.exit(interrupts.exit_code)
    sys.exit(FINDINGS if result.failed else PASSED if result.passed else COULD_NOT_RUN)


@main.command()
@click.argument("folder", type=FilePath(), metavar="RUN_DIR")
def report(folder: Path) -> None:
    """Build the reports of a run again from its records, and print the summary."""
    from conformance import reports

    lost: list[str] = []
    built = reports.build(folder, colour=sys.stdout.isatty(), unwritten=lost)
    say(built["terminal"], coloured=True)
    for name, path in built.items():
        if isinstance(path, Path):
            say(f"{name}: {shown_path(path)}")
    for line in lost:
        say(f"conformance: {line}", err=True)
    sys.exit(COULD_NOT_RUN if lost else PASSED)


if __name__ == "__main__":
    main()
