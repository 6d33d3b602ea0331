"""Which roundings may explain a run: the legal ones of a stage, and those that a kernel declares (docs/rule.md, Profiles)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from conformance.contract.stage import Stage
from conformance.errors import UsageError
from conformance.numerics.bounds import Profile

#: The policy that declares nothing.
CONTRACT = "contract"
#: Which of several equals a kernel takes: the one that the contract names, or any.
TIES = ("lowest", "any")


def require_ties(stage: Stage, ties: str) -> None:
    """Raise ``UsageError`` unless a kernel of the stage may declare this of ties."""
    if ties not in TIES:
        raise UsageError(f"ties is one of {', '.join(TIES)}, found {ties!r}")
    if ties != TIES[0] and stage.ties is None:
        raise UsageError(f"stage {stage.name} has no ties to declare anything of")


def declared_names(stage: Stage, rounds: Iterable[str] = (), precision: str = CONTRACT) -> tuple[str, ...]:
    """The roundings that names and a policy declare together, in the stage's order.

    Raises ``UsageError`` for a name or a policy that the stage does not have.
    """
    if isinstance(rounds, str) or not isinstance(rounds, Sequence) or not all(isinstance(name, str) for name in rounds):
        raise UsageError(f"rounds is a list of names, found {rounds!r}")
    policies = {CONTRACT: (), **stage.policies}
    if precision not in policies:
        raise UsageError(f"stage {stage.name} has no precision {precision!r}; it has {', '.join(policies)}")
    for name in rounds:
        if name not in stage.declarable:
            known = ", ".join(stage.declarable) or "none"
            raise UsageError(f"stage {stage.name} has no rounding {name!r} to declare; it has {known}")
    wanted = {*rounds, *policies[precision]}
    return tuple(name for name in stage.declarable if name in wanted)


def allowed_profiles(stage: Stage, profile: str | None = None, rounds: Sequence[str] = ()) -> list[Profile]:
    """The profiles that may explain a run: the stage's, or the one named ``profile``, with any of the declared roundings.

    All that is declared comes first: that is what a kernel says that it does. But it may do less. Raises ``UsageError`` for a
    profile that the stage does not have.
    """
    known = [one for one in stage.profiles if profile in (None, one.name)]
    if not known:
        raise UsageError(f"stage {stage.name} has no profile {profile!r}; it has {', '.join(one.name for one in stage.profiles)}")
    arguments = {argument.name for argument in stage.inputs}
    inputs = [name for name in rounds if arguments.issuperset(stage.declarable[name])]
    places = [place for name in rounds if name not in inputs for place in stage.declarable[name]]
    # Where every rounding is modelled a kernel may make each of them or not; what it does to an input is made or not made.
    every_place = [tuple(places)] if all(one.modelled for one in known) else list(_subsets(places))
    found = []
    for rounded, made in itertools.product(_subsets(inputs), every_place):
        for one in known:
            declared = "".join(f",{name}" for name in (*rounded, *made))
            found.append(
                dataclasses.replace(
                    one,
                    name=f"{one.name}{declared}",
                    roundings=one.roundings.union(made),
                    declared=frozenset(made),
                    inputs=frozenset(argument for name in rounded for argument in stage.declarable[name]),
                )
            )
    return found


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every subset, the largest first."""
    for count in range(len(names), -1, -1):
        yield from itertools.combinations(names, count)
