"""What each constant of the rule is worth: ``python benchmarks/constants.py [--legal N] [--faults N]``.

The same runs, of random legal combinations and of kernels that round, accumulate or truncate where they must not, are judged
again and again, each time with one constant tighter or looser than it is. A constant is right where a tighter one rejects correct
kernels and a looser one lets faults pass; the reason for each stands beside it in ``judge/limits.py`` and ``bounds.py``. About
half an hour on one core; ``--stages rms_norm,mlp`` looks at some only.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch

from conformance.cases.case import Case, make_case
from conformance.cases.space import Space, stratified_keys
from conformance.contract.registry import stage_named, stages
from conformance.judge import limits
from conformance.judge.judgement import judge
from conformance.judge.oracle import Oracle
from conformance.kernels.qwen3.exam.torch.catalogue import random_variant, torch_kernels
from conformance.lanes.base import Outcome
from conformance.lanes.eager import run_eager
from conformance.numerics import attention, bounds

#: Integers and copies are right or wrong: no constant decides.
STAGES = [name for name, stage in stages().items() if not stage.composite and name not in ("kv_write", "greedy_sample")]
FP32 = frozenset({torch.bfloat16, torch.float32})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One constant at another value."""

    module: ModuleType
    name: str
    value: object

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Judge with this value meanwhile."""
        before = getattr(self.module, self.name)
        setattr(self.module, self.name, self.value)
        try:
            yield
        finally:
            setattr(self.module, self.name, before)


#: Tighter, then looser.
SETTINGS = [
    Setting(limits, "FALSE_ALARM", 1e-2),
    Setting(limits, "FALSE_ALARM", 1e-12),
    Setting(limits, "HALF_ULP_SLACK", 1.0),
    Setting(limits, "HALF_ULP_SLACK", 1.25),
    Setting(limits, "SPREAD_SIGMAS", 3.5),
    Setting(limits, "SPREAD_SIGMAS", 11.0),
    Setting(limits, "SPREAD_SLACK", 0.9),
    Setting(limits, "SPREAD_SLACK", 1.5),
    Setting(limits, "BIAS_SIGMAS", 4.0),
    Setting(limits, "BIAS_SIGMAS", 12.0),
    Setting(limits, "BIAS_SLACK", 0.0),
    Setting(limits, "BIAS_SLACK", 0.2),
    Setting(bounds, "NORM_ROUNDINGS", 2),
    Setting(bounds, "NORM_ROUNDINGS", 24),
    Setting(bounds, "SUM_OF_MAGNITUDES", 0.1),
    Setting(bounds, "SUM_OF_MAGNITUDES", 2.5),
    Setting(bounds, "SUM_OF_SQUARES", 0.06),
    Setting(bounds, "SUM_OF_SQUARES", 1.5),
    Setting(bounds, "SUM_OF_RESULT", 0.06),
    Setting(bounds, "SUM_OF_RESULT", 1.5),
    Setting(bounds, "SUM_ONTO", 0.1),
    Setting(bounds, "SUM_ONTO", 3.0),
    Setting(attention, "PROBABILITY_VARIANCE", 2.0**-16 / 20),
    Setting(attention, "PROBABILITY_VARIANCE", 2.0**-16),
    Setting(limits, "STATISTICAL", FP32),
]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run that is judged under every setting; ``fault`` is the kernel's, empty for a legal one."""

    case: Case
    outcome: Outcome
    fault: str = ""


def legal_runs(chosen: Sequence[str], count: int) -> list[Run]:
    """Random legal combinations, ``count`` of each stage."""
    runs = []
    for stage in chosen:
        for index in range(count):
            variant = random_variant(stage, index, seed=2)  # of one geometry or another
            keys = stratified_keys(Space.of(stage_named(stage), dict(variant.dims)), 2)
            case = make_case(next(itertools.islice(keys, index, None)))
            runs.append(Run(case, run_eager(variant.make(), case)))
    return runs


def faulty_runs(chosen_stages: Sequence[str], rounds: int) -> list[Run]:
    """Kernels with a fault of precision, ``rounds`` times in every kind of data."""
    runs = []
    for stage in chosen_stages:
        contract = stage_named(stage)
        chosen = [one for one in torch_kernels() if one.stage == stage and one.kind == "precision"]
        for dims in {str(dict(one.dims)): dict(one.dims) for one in chosen}.values():
            keys = itertools.islice(stratified_keys(Space.of(contract, dims), 3), rounds * len(contract.regimes))
            cases = [make_case(key) for key in keys]
            for one in chosen:
                if dict(one.dims) == dims:
                    kernel = one.make()
                    runs += [Run(case, run_eager(kernel, case), one.id) for case in cases]
    return runs


def accepted(runs: Sequence[Run]) -> list[bool]:
    """The verdicts under the constants as they are now; what a case's runs are held against is made once."""
    found: list[bool] = []
    oracles: dict[int, Oracle] = {}
    for run in runs:
        oracle = oracles.setdefault(id(run.case), Oracle(run.case))
        found.append(judge(run.case, run.outcome, oracle=oracle).ok)
    return found


def line(what: str, legal: Sequence[Run], faulty: Sequence[Run]) -> str:
    """A line of the table: of both kinds of runs what was rejected, and how many faults no run showed."""
    rejected = [run.case.key for run, ok in zip(legal, accepted(legal), strict=True) if not ok]
    shown = [run.fault for run, ok in zip(faulty, accepted(faulty), strict=True) if not ok]
    never = {run.fault for run in faulty} - set(shown)
    where = ", ".join(sorted({key.stage for key in rejected}))
    return (
        f"{what:38} {len(rejected):>6} of {len(legal)} {len(shown):>7} of {len(faulty)} {len(never):>4} of "
        f"{len({run.fault for run in faulty})}   {where}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--legal", type=int, default=100, metavar="N", help="legal runs of each stage")
    parser.add_argument("--stages", default=",".join(STAGES), metavar="NAMES", help="stages, parted by commas")
    parser.add_argument("--faults", type=int, default=1, metavar="N", help="runs of a fault in each kind of data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stages_asked = options.stages.split(",")
    for name in stages_asked:
        if name not in STAGES:
            parser.error(f"--stages: {name!r} is none of {', '.join(STAGES)}")
    legal, faulty = legal_runs(stages_asked, options.legal), faulty_runs(stages_asked, options.faults)
    print(f"{'constant':38} {'legal runs rejected':>13} {'faulty ones':>16} {'faults never shown':>12}")
    print(line("as they are", legal, faulty), flush=True)
    for setting in SETTINGS:
        now = getattr(setting.module, setting.name)
        with setting.applied():
            what = f"{setting.name} {_text(now)} -> {_text(setting.value)}"
            print(line(what, legal, faulty), flush=True)


def _text(value: object) -> str:
    if isinstance(value, frozenset):
        return "+".join(sorted(str(one).removeprefix("torch.") for one in value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
