"""Which kernels of known verdict an exam judges, and on how many cases."""

from __future__ import annotations

import collections
import dataclasses
import math
import pkgutil
import zlib
from collections.abc import Callable

from conformance.contract.loading import load_module
from conformance.contract.precision import CONTRACT
from conformance.contract.registry import model_named, models, short_name, stage_named
from conformance.contract.stage import Stage
from conformance.errors import UsageError
from conformance.exam.known_kernels import KnownKernel
from conformance.lanes import lane_named

#: How many interpreted kernels, or compiled ones, there are to each one of a sample: every one needs a process of its own, which
#: takes seconds.
INTERPRETED_SAMPLE = 16


@dataclasses.dataclass(frozen=True)
class Cases:
    """How many cases a faulty kernel is judged on at least, a legal one, and any at most."""

    faulty: int
    legal: int
    most: int


@dataclasses.dataclass(frozen=True)
class Effort:
    """How many cases a kernel is judged on, by kind of stage and lane, and how many random combinations of legal choices.

    A faulty kernel is judged on more than its least number until our rule has found and named it, which the other rules see as
    well. Where ``measures`` is set, a faulty torch kernel is judged until it has had as many cases as its power so far asks for
    (``trials_for``): the one whose power is poor is measured longest.
    The catalogue has a fault or a variant in every stage to which it means something; a ``sample`` has it once among the single
    stages and once among the composite ones, and one in ``INTERPRETED_SAMPLE`` of the others, faulty and legal ones of each lane.
    Up to ``together`` torch kernels are judged by one task, which makes their cases and oracles once; what a task has judged is
    kept when it ends.
    """

    name: str
    sample: bool
    measures: bool
    single: Cases
    composite: Cases
    interpreted: Cases
    random_single: int
    random_composite: int
    together: int

    def cases(self, subject: KnownKernel) -> Cases:
        """The numbers that hold for one subject."""
        if not lane_named(subject.lane).in_process:
            return self.interpreted
        return self.composite if stage_named(subject.stage).composite else self.single

    def random(self, stage: Stage) -> int:
        """Random legal combinations of a stage, each on a case of its own."""
        return self.random_composite if stage.composite else self.random_single


EFFORTS: dict[str, Effort] = {
    # A few cases each: the random combinations of a single stage see all its regimes, the legal kernels of all layers and chains
    # between them. What is faulty and not found has up to 50, as many as a check has by default; of a layer 18, which are dear.
    "quick": Effort(
        "quick",
        sample=True,
        measures=False,
        single=Cases(3, 6, 50),
        composite=Cases(2, 3, 18),
        interpreted=Cases(1, 1, 12),
        random_single=20,
        random_composite=2,
        together=128,
    ),
    # Of each single stage 10,000 random combinations; of all layers and chains as many legal runs, named variants included, which
    # have as many cases as a check, because that judges all of them together as well.
    # Power of layers is told by 60 cases at most, which is what a check takes: what they show seldom they may miss anyway.
    "full": Effort(
        "full",
        sample=False,
        measures=True,
        single=Cases(22, 22, 330),
        composite=Cases(18, 60, 60),
        interpreted=Cases(4, 4, 36),
        random_single=10_000,
        random_composite=100,
        together=32,
    ),
}


def catalogue() -> list[KnownKernel]:
    """Every kernel of the exam, as the models bring them; its stage by ``model/name`` where several models have the name."""
    found = []
    for model in models():
        called = {name: short_name(stage) for stage in model.stages for name in (stage.name, stage.id)}
        for name in model.exam_modules:
            for one in load_module(name).KNOWN_KERNELS:
                if one.stage not in called:
                    raise UsageError(
                        f"{name}: known kernel {one.name} is of stage {one.stage!r}, which model {model.name} has not"
                    )
                found.append(dataclasses.replace(one, stage=called[one.stage]))
    return found


def random_variants(stage: str) -> Callable[[str, int, int], KnownKernel] | None:
    """What makes the random legal kernels of a stage, if its model has some (``Model.random_variants``)."""
    name = model_named(stage_named(stage).model).random_variants
    return pkgutil.resolve_name(name) if name else None


def random_variant(stage: str, index: int, seed: int) -> KnownKernel:
    """The random legal kernel ``index`` of a stage; raises ``UsageError`` if the stage's model has none."""
    make = random_variants(stage)
    if make is None:
        raise UsageError(f"the model of stage {stage} has no random legal kernels (Model.random_variants)")
    return dataclasses.replace(make(stage_named(stage).name, index, seed), stage=stage)


def chosen_subjects(
    effort: Effort, stage: str | None = None, lane: str | None = None, precision: str = CONTRACT
) -> list[KnownKernel]:
    """The kernels that an exam judges, of one stage or one lane only; raises ``UsageError`` if there are none.

    Under a policy of ``precision`` they are those of the stages that know it.

    Where a fault is sampled, its stage follows from its name, so that all stages come up.
    """
    wanted = None if stage is None else short_name(stage_named(stage))
    found = [one for one in catalogue() if wanted in (None, one.stage) and lane in (None, one.lane)]
    found = [one.under(precision) for one in found if precision in (CONTRACT, *stage_named(one.stage).policies)]
    if not found:
        under = "" if precision == CONTRACT else f" under precision {precision}"
        raise UsageError(f"the exam has no kernel of stage {stage or 'any'} in lane {lane or 'any'}{under}")
    if not effort.sample or stage is not None:
        return found
    alike: dict[tuple[str, str, bool], list[KnownKernel]] = collections.defaultdict(list)
    others: dict[tuple[str, bool], list[KnownKernel]] = collections.defaultdict(list)
    for one in found:
        if lane_named(one.lane).in_process:
            stage_of = stage_named(one.stage)
            alike[stage_of.model, one.name, stage_of.composite].append(one)
        else:
            others[one.lane, one.legal].append(one)
    sample = [group[number_of(name) % len(group)] for (_, name, _), group in alike.items()]
    for group in others.values():
        sample += sorted(group, key=lambda one: number_of(one.id))[: math.ceil(len(group) / INTERPRETED_SAMPLE)]
    return sample


def number_of(name: str) -> int:
    """A number that follows from a name, the same everywhere."""
    return zlib.crc32(name.encode())
