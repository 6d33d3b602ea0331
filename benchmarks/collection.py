"""What collecting the suites costs beside importing torch and pytest: ``python -m benchmarks.collection``."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 5
BARE = [sys.executable, "-c", "import torch, pytest"]
COLLECT = [sys.executable, "-m", "pytest", "--pyargs", "conformance.suites", "--collect-only", "-q", "-p", "no:cacheprovider"]


def seconds(command: list[str]) -> float:
    """How long a command takes."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Print both, measured in turn, and their ratio."""
    seconds(BARE), seconds(COLLECT)
    pairs = [(seconds(BARE), seconds(COLLECT)) for _ in range(ROUNDS)]
    bare, collect = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"import torch, pytest   {bare:.2f} s")
    print(f"pytest --collect-only  {collect:.2f} s   ratio {collect / bare:.2f}")


if __name__ == "__main__":
    main()
