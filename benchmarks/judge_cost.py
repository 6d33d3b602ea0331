"""What judging costs beside what it is compared with: ``python -m benchmarks.judge_cost [--interpret] [PART ...]``.

Each part runs in a process of its own, on one thread (the judge allows itself no more, whatever the caller's setting), and takes
the least of several rounds in which both sides take turns, since other work on a shared machine only ever adds time.

- *logits*: the oracle and bounds of the Qwen3-14B LM head for a batch of 16; then, with the bounds known, judging the
  16 x 151936 fp32 logits of an honest kernel beside ``torch.testing.assert_close`` of the same tensors: once with tolerances
  that it passes by, which is its shortest way, once with its defaults, by which it rejects these correct logits.
- *layer*: judging the outputs of one 14B layer (batch 16, 256 cache rows), bounds known, beside interpreting the layer: how long
  that takes is given by ``--interpreting``, or measured in the same run with ``--interpret`` (6 GB more).

Both say how much memory a judgement takes at its peak beside the outputs themselves, for the honest result and for wrong ones.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.judge.judgement import judge
from conformance.judge.oracle import Oracle
from conformance.judge.verdict import Verdict
from conformance.lanes.base import Outcome
from conformance.numerics.arithmetic import SINGLE

PARTS = ("logits", "layer")
ROUNDS = 15
LOGITS = CaseKey("lm_head", "qwen3_14b", "normal", 1, (("B", 16),))
LAYER = CaseKey("decode_layer", "qwen3_14b", "normal", 1, (("B", 16), ("S", 256)), tuple(range(16, 257, 16)))
#: What interpreting that layer takes at least, in seconds (README.md here).
INTERPRETING = 28.0

MOST_OF_ASSERT_CLOSE = 3.0
MOST_OF_INTERPRETING = 0.05
MOST_MEMORY = 2.0
MOST_ORACLE_SECONDS = 10.0

Outputs = dict[str, torch.Tensor]


def honest(case: Case) -> Outputs:
    """What a correct kernel leaves: the contract in fp32, in the outputs' dtypes."""
    results = case.stage.reference(case.inputs, case.dims, SINGLE)
    return {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def in_turn(*functions: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """The shortest time of each function, all of them called once a round."""
    times = [[seconds(function) for function in functions] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def extra_memory(function: Callable[[], object]) -> int:
    """How far the resident memory of this process rises at its peak while a function runs, in bytes (Linux, glibc).

    From here on each tensor of 64 KB or more is mapped by itself and unmapped when freed, and what earlier work left in the heap
    is given back first: else the function could fill holes that nobody sees. The median of three: where memory is short, pages
    that have nothing to do with it come and go meanwhile.
    """
    libc = ctypes.CDLL(None)
    mmap_threshold = -3
    libc.mallopt(mmap_threshold, 1 << 16)
    function()  # once for what is loaded or set up on first use
    peaks = []
    for _ in range(3):
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
        before = _status("VmRSS")
        function()
        peaks.append(_status("VmHWM") - before)
    return sorted(peaks)[1]


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def memory_ratio(case: Case, outputs: Outputs, oracle: Oracle) -> float:
    """Peak memory of a judgement with known bounds over the size of the outputs."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in outputs.values())
    return extra_memory(lambda: judged(case, outputs, oracle)) / size


def judged(case: Case, outputs: Outputs, oracle: Oracle) -> Verdict:
    """The verdict on a run that left these outputs."""
    return judge(case, Outcome("ok", outputs=outputs), oracle=oracle)


def damaged(outputs: Outputs, name: str) -> dict[str, Outputs]:
    """Wrong results by what is wrong with them: a tile of zeros in one row, and every second row of one output not a number."""
    tile, rows = ({**outputs, name: outputs[name].clone()} for _ in range(2))
    tile[name][3, 512:528] = 0
    rows[name][::2] = math.nan
    return {"a zeroed tile": tile, "half the rows NaN": rows}


def report(what: str, figure: str, most: str, within: bool) -> None:
    """Print one line."""
    print(f"{what:58} {figure:>28}   at most {most}: {'yes' if within else 'NO'}", flush=True)


def report_memory(case: Case, outputs: Outputs, oracle: Oracle, name: str) -> None:
    """Print what judging the honest and some wrong results takes."""
    for what, found in {"honest": outputs, **damaged(outputs, name)}.items():
        began = time.perf_counter()
        verdict = judged(case, found, oracle)
        took = time.perf_counter() - began
        if verdict.ok != (what == "honest"):
            raise SystemExit(f"{what}: {verdict}")
        if verdict.ok or case.stage.localise is None:
            ratio = memory_ratio(case, found, oracle)
            figure = f"{ratio:.2f} times their size"
            report(f"  memory beside the outputs ({what})", figure, f"{MOST_MEMORY:g}", ratio <= MOST_MEMORY)
        else:  # finding out why computes the layer once more
            print(f"  {what}: judged and explained in {took:.1f} s", flush=True)


def logits() -> None:
    """The part of that name."""
    case = make_case(LOGITS)
    outputs = honest(case)
    oracle = Oracle(case)
    profile = case.stage.profiles[0]
    took = seconds(lambda: oracle.bounds(profile))
    report("LM head, oracle and bounds", f"{took:.1f} s", f"{MOST_ORACLE_SECONDS:g} s", took <= MOST_ORACLE_SECONDS)
    found, expected = outputs["logits"], oracle.bounds(profile)["logits"].value.float()

    def passing() -> None:
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)

    def default() -> str:
        try:
            torch.testing.assert_close(found, expected)
        except AssertionError:
            return "rejects them"
        return "accepts them"

    if not judged(case, outputs, oracle).ok:
        raise SystemExit("the honest logits did not pass")
    own, other, rejecting = in_turn(lambda: judged(case, outputs, oracle), passing, default)
    print(f"assert_close of {list(found.shape)} fp32, passing        {other * 1e3:6.1f} ms")
    print(f"assert_close with its defaults, {default()}      {rejecting * 1e3:6.1f} ms")
    figure = f"{own * 1e3:.1f} ms, {own / other:.2f} times"
    report("logits judged, beside the passing one", figure, f"{MOST_OF_ASSERT_CLOSE:g}", own <= MOST_OF_ASSERT_CLOSE * other)
    report_memory(case, outputs, oracle, "logits")


def layer(interpreting: float | None) -> None:
    """The part of that name; ``None`` measures how long interpreting takes."""
    case = make_case(LAYER)
    source = "given"
    if interpreting is None:
        interpreting, source = interpreted(case), "measured"
    outputs = honest(case)
    oracle = Oracle(case)
    print(
        f"layer, oracle and bounds                   {seconds(lambda: oracle.bounds(case.stage.profiles[0])):.1f} s", flush=True
    )
    first = seconds(lambda: judged(case, outputs, oracle))
    if not judged(case, outputs, oracle).ok:
        raise SystemExit("the honest layer did not pass")
    # The first judgement also learns whatever else of the oracle it asks for.
    (later,) = in_turn(lambda: judged(case, outputs, oracle))
    share = first / interpreting
    figure = f"{first * 1e3:.0f} ms ({later * 1e3:.0f} ms again), {share:.2%}"
    report(f"layer judged, beside interpreting in {interpreting:.0f} s ({source})", figure, "5%", share <= MOST_OF_INTERPRETING)
    report_memory(case, outputs, oracle, "out")


def interpreted(case: Case) -> float:
    """Seconds that compiling and interpreting the stage's PyPTO kernel take."""
    from conformance.contract.loading import kernels_in, load_module
    from conformance.lanes.process import KernelProcess

    module = load_module(f"conformance.kernels.qwen3.{case.stage.name}")
    kernel = next(kernel for kernel in kernels_in(module) if kernel.toolchain == "pypto")
    with KernelProcess(kernel, "interpret") as process:
        outcome = process.run(case, passes="none")
    if outcome.status != "ok":
        raise SystemExit(f"{case.stage.name}: {outcome.status}: {outcome.message}")
    return outcome.seconds


def main() -> None:
    """Measure the parts named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--interpreting", type=float, default=INTERPRETING, metavar="SECONDS", help="what interpreting takes")
    parser.add_argument("--interpret", action="store_true", help="measure what interpreting takes")
    options = parser.parse_args()
    for unknown in set(options.parts) - set(PARTS):
        parser.error(f"no part {unknown!r}; there are {', '.join(PARTS)}")
    parts = options.parts or PARTS
    if len(parts) > 1:
        for part in parts:
            given = ["--interpret"] if options.interpret else ["--interpreting", str(options.interpreting)]
            subprocess.run([sys.executable, "-m", "benchmarks.judge_cost", part, *given], check=True)
        return
    torch.set_num_threads(1)
    if parts[0] == "logits":
        logits()
    else:
        layer(None if options.interpret else options.interpreting)


if __name__ == "__main__":
    with torch.inference_mode(False):
        main()
