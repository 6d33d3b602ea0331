"""Words and numbers as reports show them. Names and messages come from kernels under test, so nothing in them is trusted."""

from __future__ import annotations

import datetime
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from conformance.contract.registry import model_named, stages
from conformance.lanes import find_lane
from conformance.outside import one_line as one_line
from conformance.outside import plain as plain

#: Longest command that is shown; a longer one is no longer something a person copies.
LONGEST_COMMAND = 2000


def worth_naming(lane: str) -> bool:
    """Whether a lane is to be named beside a kernel of the exam: most of its kernels run in the process that judges."""
    known = find_lane(lane)
    return known is None or not known.in_process


def share(value: float | None) -> str:
    """A share of the allowance: ``43%`` up to what is allowed, ``3.2x`` beyond it, ``-`` where nothing was measured."""
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf"
    if value <= 1:
        # Rounded down: 99.96% must not read as all of the allowance.
        return f"{math.floor(value * 100)}%" if value <= 0.99 or value == 1 else f"{math.floor(value * 1000) / 10:.1f}%"
    if value < 1.05:
        # Never "1.0x", which would read as just allowed.
        return f"{max(value, 1.001):.3f}x"
    if value < 1000:
        return f"{value:.1f}x" if value < 100 else f"{value:.0f}x"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}x"


def share_used(value: float | None) -> str:
    """A share of the allowance in a table: ``43%``, or ``>100%`` for anything beyond it; a finding says how far beyond.

    A multiple of an allowance says little of an error: where nothing but the last rounding is inexact, an error of 1.5 ULP is
    some 100,000 times what is allowed besides it.
    """
    return ">100%" if value is not None and value > 1 else share(value)


def share_in_words(value: float | None) -> str:
    """A share of the allowance in a sentence, such as ``3.2x the allowance``."""
    if value is None:
        return "no allowance applies"
    if math.isnan(value):
        return "the error is not a number"
    if math.isinf(value):
        return "no error is allowed here"
    return f"{share(value)} {'of ' if value <= 1 else ''}the allowance"


def ulps(value: float | None) -> str:
    """Units in the last place, or an empty string where none were measured."""
    if value is None:
        return ""
    if math.isnan(value) or math.isinf(value):
        return f"{value} ULPs"
    number = f"{value:,.1f}".removesuffix(".0") if value < 1e6 else f"{value:.1e}"
    return f"{number} ULP" if number == "1" else f"{number} ULPs"


def number(count: int, singular: str, plural: str | None = None) -> str:
    """A count with its noun: ``1 case``, ``1,200 cases``."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def seconds(value: float) -> str:
    """A duration: ``0.42 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if not math.isfinite(value):
        return "unknown"
    if value <= 0:
        return "0 s"
    if value < 9.95:
        return f"{value:.2f} s" if value < 0.995 else f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def device_time(value: float | None) -> str:
    """Seconds by a card's clock: ``850 us``, ``8.31 ms``, ``1.20 s``; ``-`` where it did not tell."""
    if value is None or not math.isfinite(value):
        return "-"
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def memory(value: int | None) -> str:
    """Bytes in MB or GB (powers of ten), or an empty string where none were measured."""
    if value is None:
        return ""
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def moment(epoch_seconds: float | None) -> str:
    """A point in time in UTC, or ``unknown time``."""
    if not epoch_seconds or not 0 < epoch_seconds < 2**36:
        return "unknown time"
    return datetime.datetime.fromtimestamp(epoch_seconds, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def place(where: Mapping[str, int]) -> str:
    """The names of an element's coordinates: ``row 3, head 2, lane 2``."""
    return one_line(", ".join(f"{name.replace('_', ' ')} {coordinate}" for name, coordinate in where.items()))


def position(argument: str | None, index: Sequence[int] | None, where: Mapping[str, int]) -> str:
    """Where in an argument: ``out[3, 130] (row 3, head 2, lane 2)``; empty if the finding has no place."""
    shown = argument or ""
    if index:
        shown += f"[{', '.join(str(coordinate) for coordinate in index)}]"
    if where:
        names = place(where)
        shown += f" ({names})" if shown else names
    return shown


def _dims_of(case: str) -> str:
    """The model that a case key is of, as ``--dims`` takes it: without what a whole check varies by itself."""
    name, preset, varied = case.split(":")[:3]
    stage = stages().get(name)
    drawn = {"seq_lens", "chunk_lens", "rows"}
    if stage is not None:
        drawn |= {*stage.drawn, *(dims.symbol("tokens") for dims in model_named(stage.model).presets.values())}
    model = [item for item in varied.split(",") if item.split("=")[0] not in drawn]
    return ",".join([f"preset={preset}", *filter(None, model)])


def _without_model(kernel: str, stage: str) -> str:
    """A kernel's own name, of one that is called ``model/name`` beside another model's."""
    known = stages().get(stage)
    return kernel if known is None else kernel.removeprefix(f"{known.model}/")


def replay_command(
    stage: str,
    source: str,
    kernel: str,
    case: str,
    lane: str = "",
    detector: str = "",
    options: Mapping[str, Any] | None = None,
) -> str | None:
    """The command that runs one case again, quoted for a POSIX shell; ``None`` if the record does not say enough.
    ``None`` also for a text that cannot be shown as it is: a command that has to be altered to be shown replays something else.

    What only all cases show together takes the whole check again: with the ``dims``, ``examples`` and ``seed`` of ``options``,
    which are those of a run as it recorded them, or else with those that a check has by itself.
    """
    if not (stage and source and kernel):
        return None
    words = ["conformance", "check", stage, f"{source}:{_without_model(kernel, stage)}"]
    # The command runs a kernel where its toolchain executes it, unless told otherwise.
    known = find_lane(lane)
    elsewhere = known is not None and not known.default
    if elsewhere:
        words += ["--lane", lane]
    words += [f"--{name}={options[name]}" for name in ("rounds", "precision", "ties") if options and options.get(name)]
    if detector == "compiler_pass" or (detector == "unwritten_read" and not elsewhere):
        # The interpreter's lane looks at the compiled graph where it compares all passes.
        words += ["--all-passes"]
    if detector == "pooled_signature" and options and "dims" in options:
        words += [f"--{name}={options[name]}" for name in ("dims", "examples", "seed") if options.get(name, "") != ""]
    elif detector in ("capability", "pooled_signature"):
        words += ["--dims", _dims_of(case)] if case.count(":") >= 2 else []
    elif case:
        words += ["--case", case]
    command = " ".join(shlex.quote(word) for word in words)
    if len(command) > LONGEST_COMMAND or command != one_line(command) or "\ufffd" in command:
        return None
    return command
