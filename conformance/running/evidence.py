"""What a run's folder keeps of a failure on a card: enough to look into it on another day, on another machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from conformance.contract.registry import short_name
from conformance.lanes import lane_named
from conformance.lanes.card_files import BUILDS, CARD_FILE, build_folder
from conformance.lanes.cards import CardChoice
from conformance.lanes.device import NPU
from conformance.reports.text import replay_command
from conformance.running.runners import worker_runner
from conformance.running.runs import Judged, Keep, Runner
from conformance.running.session import Subject, machine_details, relative_source, versions

FOLDER = "evidence"
#: So many failures of a subject are kept, and tensors of so many bytes of each.
MOST_FAILURES, MOST_BYTES = 3, 1 << 30
#: What a worker leaves in its folder: what it printed, where it was when it was killed, CANN's logs and dumps.
LOGS = ("stdout.log", "stderr.log", "stack.log", "plog", "ascend", "probe")
#: Where CANN's driver says of which version it is.
DRIVER = Path("/usr/local/Ascend/driver/version.info")


def keep_evidence(folder: Path, subject: Subject, run: Judged, tensors: Mapping[str, torch.Tensor], worker: Path) -> Path | None:
    """Keep what is known of a failed run below a run's ``folder``, and return where.

    ``tensors`` are outputs, ``worker`` is the folder of the worker's logs. ``None`` where enough of the subject is kept already,
    or the disk does not take it.
    """
    subject = dataclasses.replace(subject, preset=run.case.preset)
    name = re.sub(r"[^\w.=-]", "_", f"{subject.id}-{subject.lane}")
    kept = next(
        (
            folder / FOLDER / f"{name}-{number}"
            for number in range(1, MOST_FAILURES + 1)
            if not (folder / FOLDER / f"{name}-{number}").exists()
        ),
        None,
    )
    if kept is None:
        return None
    try:
        kept.mkdir(parents=True)
        _write(kept, subject, run, tensors, worker)
    except OSError:
        return None
    return kept


@contextlib.contextmanager
def runner_with_evidence(
    folder: Path, subject: Subject, timeout: float | None, cards: CardChoice
) -> Iterator[tuple[Runner, Keep | None]]:
    """Runs cases of a subject in a worker, and what keeps its failures on a card below a run's ``folder``."""
    if not lane_named(subject.lane).takes_card(NPU):
        with worker_runner(subject.kernel, subject.lane, timeout, cards) as run:
            yield run, None
        return
    with tempfile.TemporaryDirectory(prefix="conformance-") as temporary:
        worker = Path(temporary)

        def keep(run: Judged, tensors: Mapping[str, torch.Tensor]) -> None:
            keep_evidence(folder, subject, run, tensors, worker)

        with worker_runner(subject.kernel, subject.lane, timeout, cards, worker) as run:
            yield run, keep


def _write(kept: Path, subject: Subject, run: Judged, tensors: Mapping[str, torch.Tensor], worker: Path) -> None:
    kernel = subject.kernel
    if tensors and sum(tensor.nbytes for tensor in tensors.values()) <= MOST_BYTES:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, kept / "outputs.safetensors")
    detector = run.verdict.findings[0].detector if run.verdict.findings else ""
    command = replay_command(
        short_name(kernel.stage), relative_source(kernel), subject.name, str(run.case), subject.lane, detector
    )
    findings = [finding.to_json() for finding in run.verdict.findings]
    (kept / "findings.json").write_text(json.dumps({"check": run.check, "case": str(run.case), "findings": findings}, indent=1))
    remark = "# the case that the steps start from; the test at real size runs them\n" if run.check == "step" else ""
    (kept / "command.txt").write_text(f"{remark}{command or 'the case cannot be given to a command'}\n")
    (kept / "environment.json").write_text(json.dumps(environment(run, worker), indent=1))
    for log in LOGS:
        _copy(worker / log, kept / "logs" / log)
    _copy(build_folder(worker, kernel.built_for(run.case.dims)), kept / BUILDS)


def environment(run: Judged, worker: Path) -> dict[str, Any]:
    """Versions, the machine, the card, and the variables that CANN and PyPTO read."""
    found: dict[str, Any] = {"versions": versions(), "machine": machine_details(), "card": run.outcome.card}
    with contextlib.suppress(OSError, ValueError, TypeError):
        found.update(json.loads((worker / CARD_FILE).read_text()))
    with contextlib.suppress(OSError):
        found["driver"] = DRIVER.read_text(errors="replace")[:4000]
    read = ("ASCEND", "TILE_FWK", "TASK_", "LD_LIBRARY_PATH", "PTO_")
    found["variables"] = {name: value for name, value in os.environ.items() if name.startswith(read)}
    return found


def _copy(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
