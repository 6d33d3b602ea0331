"""What the harness adds to an interpreted case: ``python benchmarks/interpret_overhead.py [--rounds N] [STAGE ...]``.

Each single-operation stage is run side by side, alternating case by case in one go:

- *bare*: one process that calls the jit object with the last compiler pass verified, and nothing else. Its output folder lies
  on the disk, and once more in memory.
- *harness*: ``KernelProcess.run(case, passes="last")``: tensors to another process and back, the tensors that the comparison
  needs saved, every result compared, files deleted. Dumps that nobody reads are not written (``conformance.toolchains.dumps``),
  those that the bare call writes neither.

Printed are medians in milliseconds and the ratio of harness to bare, by the clock and in processor time of all processes that
take part; and how many cases a second two processes run together.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.contract.kernel import Kernel
from conformance.contract.loading import kernels_in, load_module
from conformance.lanes.process import KernelProcess

STAGES = ("rms_norm", "qkv_proj", "qk_norm", "rope", "kv_write", "attention", "o_proj", "mlp")
BATCH = 4


def case_of(kernel: Kernel) -> Case:
    """A case of the tiny preset with ``BATCH`` sequences."""
    stage = kernel.stage
    lengths = tuple(17 + 31 * row for row in range(BATCH)) if stage.has_lengths else ()
    overrides = [("B", BATCH)] + ([("NB", 40)] if "NB" in stage.drawn else [])
    return make_case(CaseKey(stage.name, "tiny", stage.regimes[0], 1, tuple(overrides), lengths))


def kernel_of(stage: str) -> Kernel:
    """The stage's PyPTO kernel."""
    return next(kernel for kernel in kernels_in(load_module(f"conformance.kernels.qwen3.{stage}")) if kernel.toolchain == "pypto")


class Bare:
    """The bare call, in a process that answers each line with the seconds one call took, by the clock and of processor time."""

    def __init__(self, stage: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--bare", stage, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self) -> tuple[float, float]:
        """Seconds of one call, by the clock and of processor time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        wall, processor = map(float, self._process.stdout.readline().split())
        return wall, processor

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve_bare(stage: str, folder: Path) -> None:
    """The bare side: call, say how long it took, delete the output, wait."""
    # Imported as it is: the harness would load a library before that keeps it from writing dumps.
    os.environ.update(ASCEND_PROCESS_LOG_PATH=str(folder / "plog"), TILE_FWK_OUTPUT_DIR=str(folder / "output"))
    import pypto

    from conformance.lanes.pypto.runtime import Runtime
    from conformance.toolchains import calculator

    torch.set_num_threads(1)
    kernel = kernel_of(stage)
    case = case_of(kernel)
    Runtime(folder, folder, calculator())
    jit: Any = kernel.build(case.dims)
    arguments = [
        torch.full(argument.size(case.dims), -1, dtype=argument.dtype) if argument.access == "out" else case.inputs[argument.name]
        for argument in kernel.stage.arguments
    ]
    golden = [
        tensor if argument.access != "in" else None for argument, tensor in zip(kernel.stage.arguments, arguments, strict=True)
    ]
    jit._runtime_options = {"run_mode": pypto.RunMode.SIM.value}
    jit._host_options = {"compile_stage": pypto.CompStage.EXECUTE_GRAPH}
    jit._verify_options = {"enable_pass_verify": True, "pass_verify_pass_filter": ["CodegenPreproc"]}
    for _ in sys.stdin:
        pypto.set_verify_golden_data(goldens=golden)
        began, used = time.perf_counter(), time.process_time()
        jit(*arguments)
        print(time.perf_counter() - began, time.process_time() - used, flush=True)
        for path in folder.glob("output_*"):
            shutil.rmtree(path)


def measure(stage: str, rounds: int) -> None:
    """Print one stage's line."""
    kernel = kernel_of(stage)
    case = case_of(kernel)
    with (
        tempfile.TemporaryDirectory() as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
        KernelProcess(kernel, "interpret") as process,
    ):
        bare = [Bare(stage, Path(disk)), Bare(stage, Path(memory))]
        times: list[list[tuple[float, float]]] = [[], [], []]
        process.run(case)
        for number in range(rounds + 2):
            seconds = [side.run() for side in bare]
            began, used = time.perf_counter(), processor_time(process)
            outcome = process.run(case)
            seconds.append((time.perf_counter() - began, processor_time(process) - used))
            if outcome.status != "ok" or not outcome.passes_compared or outcome.pass_differences:
                raise SystemExit(f"{stage}: {outcome}")
            if number >= 2:
                for kept, value in zip(times, seconds, strict=True):
                    kept.append(value)
        for side in bare:
            side.close()
    cells = [f"{stage:10}"]
    for kind in (0, 1):
        on_disk, in_memory, harness = (statistics.median(value[kind] for value in kept) * 1e3 for kept in times)
        cells.append(f"{on_disk:9.1f} {in_memory:9.1f} {harness:9.1f} {harness / on_disk:7.2f} {harness / in_memory:6.2f}")
    print(" |".join(cells), f"| {outcome.passes_compared} compared", flush=True)


def processor_time(process: KernelProcess) -> float:
    """Seconds of processor time that a worker and this process have used so far."""
    assert process.pid is not None
    # The clock of another process, by its number: clock_getcpuclockid(3), which Python does not have.
    return time.process_time() + time.clock_gettime((~process.pid << 3) | 2)


def throughput(stage: str, rounds: int) -> None:
    """Print how many cases a second two processes run at once."""
    kernel = kernel_of(stage)
    case = case_of(kernel)
    with KernelProcess(kernel, "interpret") as first, KernelProcess(kernel, "interpret") as second:
        for process in (first, second):
            process.run(case)

        def work(process: KernelProcess) -> None:
            for _ in range(rounds):
                process.run(case)

        threads = [threading.Thread(target=work, args=(process,)) for process in (first, second)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"{stage:10} {2 * rounds / (time.perf_counter() - began):6.1f} cases a second by two processes", flush=True)


def main() -> None:
    """Measure the stages named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", default=STAGES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        serve_bare(options.stages[0], Path(options.stages[1]))
        return
    print(
        "stage      | bare disk    memory   harness   ratio to each (ms by the clock, medians) | the same, ms of processor time"
    )
    for stage in options.stages:
        measure(stage, options.rounds)
    for stage in options.stages:
        throughput(stage, options.rounds)


if __name__ == "__main__":
    main()
