"""What judging a layer or a chain costs beside interpreting it: ``python -m benchmarks.judging_layers [--cases N] [STAGE ...]``.

For each stage of layers the first N stratified cases of ``tiny``. Each case is run once through the interpreter, without
comparing compiler passes, and its outputs are judged once, oracle included, in turn; it is searched for signatures of mistakes if
a check would. A check searches its first cases, so fewer than it has by default cost more each. Both sides are CPU seconds (user
and system) of the process that does the work, so what else the machine does hardly matters. Compilation counts as interpreting: a
check compiles for each batch size and number of layers too.

The part aimed at is ``MOST``; the script exits with 1 where that is not reached. ``benchmarks/README.md`` has what was measured.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path

from conformance.cases.case import make_case
from conformance.cases.key import smallest
from conformance.cases.space import Space, stratified_keys
from conformance.contract.loading import kernels_in, load_module
from conformance.judge.judgement import judge
from conformance.lanes.process import KernelProcess
from conformance.running.plans import Plans

STAGES = (
    "decode_layer",
    "paged_decode_layer",
    "prefill_layer",
    "decode_fwd_layers",
    "decode_fwd",
    "paged_decode_fwd",
    "prefill_fwd",
)
#: The most that judging may take of the time of interpreting, over all cases of a stage.
MOST = 0.3


def cpu_seconds_of(process: KernelProcess) -> float:
    """User and system seconds of a kernel's worker, which must be running, and of the processes that ended below it (Linux)."""
    # The name, which may hold spaces, stands in parentheses before the numbers.
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measure(stage: str, cases: int) -> bool:
    """Print one stage's line; whether judging is within its part."""
    module = load_module(f"conformance.kernels.qwen3.{stage}")
    kernel = next(kernel for kernel in kernels_in(module) if kernel.toolchain == "pypto")
    interpreting, judging, searched = [], [], 0
    plans = Plans("interpret", kernel.stage)
    with KernelProcess(kernel, "interpret") as process:
        keys = list(itertools.islice(stratified_keys(Space.of(kernel.stage, "tiny"), 0), cases))
        # What is set up on first use, on both sides, is no case's part.
        first = make_case(smallest(keys[0]))
        judge(first, process.run(first, passes="none"))
        for key in keys:
            case, plan = make_case(key), plans.following(key)
            searched += plan.signatures
            began = cpu_seconds_of(process)
            outcome = process.run(case, passes="none")
            interpreting.append(cpu_seconds_of(process) - began)
            if outcome.status != "ok":
                raise SystemExit(f"{key}: {outcome.status}: {outcome.message}")
            began = time.process_time()
            verdict = judge(case, outcome, signatures=plan.signatures)
            judging.append(time.process_time() - began)
            if not verdict.ok:
                raise SystemExit(f"{key}: {verdict.findings}")
    part = sum(judging) / sum(interpreting)
    worst = max(ours / theirs for ours, theirs in zip(judging, interpreting, strict=True))
    print(
        f"{stage:20} {sum(interpreting) / cases:12.2f} {sum(judging) / cases:9.2f} {part:7.2f} {worst:7.2f}"
        f" {searched:9}   at most {MOST:g}: {'yes' if part <= MOST else 'NO'}",
        flush=True,
    )
    return part <= MOST


def main() -> None:
    """Measure the stages named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=STAGES, metavar="STAGE", help=f"of {', '.join(STAGES)}; all unless given")
    parser.add_argument("--cases", type=int, default=60, help="how many cases of each stage: as many as a check has")
    options = parser.parse_args()
    print(f"CPU s a case         interpreting   judging    part   worst  searched, of {options.cases} cases")
    within = [measure(stage, options.cases) for stage in options.stages]
    if not all(within):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
