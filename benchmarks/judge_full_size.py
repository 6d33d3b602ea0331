"""Time and memory of judging one real-size Qwen3-14B layer: ``python -m benchmarks.judge_full_size``.

Batch 16, 256 cache rows. Generates the case, stands an honest result in for the kernel's, and measures oracle, bounds and verdict
together, and how much the resident memory of the judging process peaks above what the case itself takes.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from conformance.cases.case import make_case
from conformance.cases.key import CaseKey
from conformance.judge.judgement import judge
from conformance.lanes.base import Outcome
from conformance.numerics.arithmetic import SINGLE

KEY = CaseKey("decode_layer", "qwen3_14b", "normal", 1, (("B", 16), ("S", 256)), tuple(range(16, 257, 16)))


def resident() -> int:
    """Resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


class Peak:
    """The highest resident memory while the block runs, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self.before = self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    """Print the figures."""
    began = time.perf_counter()
    case = make_case(KEY)
    print(f"case generated       {time.perf_counter() - began:6.1f} s")
    began = time.perf_counter()
    results = case.stage.reference(case.inputs, case.dims, SINGLE)
    outputs = {argument.name: results[argument.name].to(argument.dtype) for argument in case.stage.outputs}
    print(f"honest result (fp32) {time.perf_counter() - began:6.1f} s")
    began = time.perf_counter()
    with Peak() as peak:
        verdict = judge(case, Outcome("ok", outputs=outputs))
    seconds = time.perf_counter() - began
    found = "passed" if verdict.ok else "FAILED"
    print(f"judged               {seconds:6.1f} s, {(peak.peak - peak.before) / 1e9:.2f} GB more: {found}")
    damaged = {name: tensor.clone() for name, tensor in outputs.items()}
    damaged["out"][3, 512:528] = 0
    began = time.perf_counter()
    with Peak() as peak:
        verdict = judge(case, Outcome("ok", outputs=damaged))
    seconds = time.perf_counter() - began
    found = ", ".join(finding.detector for finding in verdict.findings) or "nothing"
    print(f"a zeroed tile judged {seconds:6.1f} s, {(peak.peak - peak.before) / 1e9:.2f} GB more: found {found}")


if __name__ == "__main__":
    with torch.inference_mode(False):
        main()
