"""Runs made up for tests of the reports: folders of records as real processes leave them, and no kernel was judged for them.

Every maker writes into a folder, which it creates, and returns it. The same call writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from conformance.judge.verdict import Finding
from conformance.running.records import Record, RecordWriter

START = 1_760_000_000.0

LANES = ("eager", "compile_only", "interpret", "device")

#: Text that breaks reports which trust it: markup, a closing script, XML and JSON syntax, control characters, an escape
#: sequence, a line separator, a bidi override, a lone surrogate, Markdown syntax, and letters beyond ASCII.
HOSTILE = (
    '<script>window.hacked=1</script><img src=x onerror="window.hacked=2"> ]]> &amp; \'" </style> \x00\x07\x1b[31m\x0b\ufffe '
    "\u2028\u202e\ud800 | `code` [link](https://example.invalid) {{ 7*7 }} {% raw %} 中文 é\n# heading\n" + "long" * 5000
)


def planned(kernel: str, lane: str, preset: str = "tiny", stage: str | None = None) -> dict[str, str]:
    """One entry of a ``start`` record's plan; the stage is the kernel's name unless given."""
    return {"kernel": kernel, "stage": kernel if stage is None else stage, "lane": lane, "preset": preset}


def start(plan: Sequence[dict[str, str]] = (), machine: str = "builder", time: float = START, **details: Any) -> Record:
    """A ``start`` record with the facts that a process knows of itself."""
    facts: dict[str, Any] = {
        "versions": {"conformance": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "pypto": "0.2.0"},
        "machine": {"hostname": machine, "processor": "x86_64", "cores": 2, "memory_gb": 15.6, "npu": None},
        "options": {"profile": "nightly", "seed": 20251009, "presets": ["tiny", "awkward"]},
        "plan": list(plan),
    }
    return Record("start", time=time, details={**facts, **details})


def end(exit_code: int = 0, time: float = START + 750) -> Record:
    """An ``end`` record."""
    return Record("end", time=time, details={"exit_code": exit_code})


def case(
    kernel: str,
    lane: str = "interpret",
    preset: str = "tiny",
    *,
    findings: Sequence[Finding] = (),
    share: float | None = 0.4,
    seed: int = 0,
    stage: str | None = None,
    check: str = "example",
    time: float = START + 1,
    **fields: Any,
) -> Record:
    """A ``case`` record; it failed if it has findings."""
    name = kernel if stage is None else stage
    values: dict[str, Any] = {
        "toolchain": "torch" if lane == "eager" else "pypto",
        "source": f"kernels/qwen3/{name}.py",
        "case": f"{name}:{preset}:B=3:unit:{seed}",
        "status": "failed" if findings else "passed",
        "profile": "half_even" if share is not None else None,
        "seconds": 0.028,
        "peak_memory": 410_000_000,
    }
    return Record(
        "case",
        kernel=kernel,
        stage=name,
        lane=lane,
        preset=preset,
        check=check,
        findings=tuple(findings),
        share=share,
        time=time,
        **{**values, **fields},
    )


def element(share: float = 3.2, ulps: float = 17.0, index: tuple[int, ...] = (3, 130), count: int = 12) -> Finding:
    """An ``element`` finding on a ``[B, H]`` output."""
    return Finding(
        "element",
        f"out[{', '.join(map(str, index))}] is -0.4375, expected -0.40625 within 0.00977",
        argument="out",
        index=index,
        where={"row": index[0], "column": index[-1]},
        share=share,
        ulps=ulps,
        count=count,
        total=4096,
    )


def write(folder: Path, records: Iterable[Record], process: str = "main") -> Path:
    """Write the records as one process's file."""
    writer = RecordWriter(folder, process)
    for record in records:
        writer.write(record if record.time else dataclasses.replace(record, time=START + 3))
    writer.close()
    return folder


def empty_run(folder: Path) -> Path:
    """A run that started and ended, with nothing planned and nothing judged."""
    return write(folder, [start(), end(time=START + 2)])


def killed_run(folder: Path) -> Path:
    """A run whose process died in the middle of a line: one kernel judged, one planned and never reached."""
    write(
        folder,
        [
            start([planned("rms_norm", "interpret"), planned("rope", "interpret")]),
            *(case("rms_norm", seed=seed) for seed in range(5)),
        ],
    )
    with next(folder.glob("records-*.jsonl")).open("a", encoding="utf-8") as file:
        file.write('{"schema": 1, "event": "case", "kernel": "rope", "sta')
    return folder


def hostile_run(folder: Path) -> Path:
    """A run in which every text that comes from outside is ``HOSTILE``."""
    finding = Finding("raised", HOSTILE, argument=HOSTILE, where={HOSTILE: 1}, share=math.nan, ulps=math.inf)
    details: dict[str, Any] = {HOSTILE: HOSTILE}
    on_card = {"card": 1, "compiles": 1, "device_seconds": 1e9, "given_up": {"1": HOSTILE, HOSTILE: HOSTILE, "1" * 5000: ""}}
    source: dict[str, Any] = {"source": HOSTILE, "case": HOSTILE, "toolchain": HOSTILE, "profile": HOSTILE}
    records = [
        start([planned(HOSTILE + "planned", HOSTILE, HOSTILE)], machine=HOSTILE, **details),
        case(HOSTILE, HOSTILE, HOSTILE, findings=[finding], share=math.inf, check=HOSTILE, details=on_card, **source),
        case("passes", HOSTILE, HOSTILE, share=0.3, check=HOSTILE, **source),
        *(
            Record(event, kernel=HOSTILE, stage=HOSTILE, lane=HOSTILE, preset=preset, reason=HOSTILE, status=HOSTILE)
            for event in ("skip", "error", "expected")
            for preset in (HOSTILE, "other")
        ),
        Record("error", reason=HOSTILE),
        end(),
    ]
    return write(folder, records)


def large_run(folder: Path, cases: int = 10_000, kernels: int = 25) -> Path:
    """A run of many cases of ``kernels`` kernels on two lanes, one case in four with three findings."""
    names = [f"kernel_{number}" for number in range(kernels)]
    draw = random.Random(0)
    plan = [planned(name, lane, preset) for name in names for lane in LANES[:3:2] for preset in ("tiny", "awkward")]
    records = [start(plan)]
    for number in range(cases):
        failing = number // len(plan) % 4 == 0
        findings = [
            element(share=1 + draw.random() * 9, index=(draw.randrange(16), draw.randrange(256))),
            Finding("spread", f"row {number % 16}: mean square {draw.random():.3f}", argument="out", share=1.5),
            Finding("bias", f"row {number % 16} leans", argument="out", share=1.2),
        ]
        entry = plan[number % len(plan)]
        records.append(
            case(
                entry["kernel"],
                entry["lane"],
                entry["preset"],
                findings=findings if failing else (),
                share=findings[0].share if failing else draw.random() * 0.7,
                seed=number,
                time=START + number / 10,
            )
        )
    return write(folder, [*records, end(time=START + cases / 10)])


def rich_run(folder: Path) -> Path:
    """A nightly as it may look: two machines, every status, several faults, an expected failure and one that is fixed."""
    stages = (
        "rms_norm",
        "qkv_proj",
        "qk_norm",
        "rope",
        "kv_write",
        "paged_attention",
        "o_proj",
        "mlp",
        "lm_head",
        "paged_decode_layer",
    )
    presets = ("tiny", "awkward")
    plan = [planned(stage, lane, preset) for stage in stages for lane in LANES for preset in presets]
    plan += [planned(stage, "compile_only", "qwen3_14b") for stage in stages]
    plan += [planned("rms_norm_bf16_sum", "eager", preset, "rms_norm") for preset in presets]
    draw = random.Random(7)
    room = {stage: 0.25 + 0.06 * position for position, stage in enumerate(stages)}
    cpu: list[Record] = [start(plan)]

    def add(record: Record) -> None:
        cpu.append(record)

    def good(stage: str, lane: str, preset: str, count: int) -> None:
        for seed in range(count):
            used = None if lane == "compile_only" else min(draw.betavariate(6, 6) * 2 * room[stage], 0.97)
            check = "compile" if lane == "compile_only" else "example"
            took = 0.02 + draw.random() * (0.05 if lane == "interpret" else 0.01)
            add(case(stage, lane, preset, share=used, seed=seed, check=check, seconds=took, time=START + 5 + len(cpu)))

    for stage in stages:
        for preset in presets:
            good(stage, "eager", preset, 24)
            good(stage, "compile_only", preset, 1)
            if (stage, preset) not in {
                ("mlp", "awkward"),
                ("paged_attention", "tiny"),
                ("lm_head", "awkward"),
                ("rope", "awkward"),
            }:
                good(stage, "interpret", preset, 12)
        if stage != "lm_head":
            good(stage, "compile_only", "qwen3_14b", 1)

    # One fault in forty cases.
    for seed in range(40):
        share = 1.4 + draw.random() * 2.4
        findings = [element(share, ulps=4 * share, index=(draw.randrange(16), draw.randrange(256)), count=draw.randrange(1, 60))]
        if seed % 2:
            findings.append(Finding("spread", "row 3: errors 2.1 times what rounding explains", argument="out", share=2.1))
        add(case("rms_norm_bf16_sum", "eager", presets[seed % 2], stage="rms_norm", findings=findings, share=share, seed=seed))
    wrong_page = Finding(
        "not_finite",
        "out[5, 64] is NaN, expected 0.1123: the last page is read past the sequence's end",
        argument="out",
        index=(5, 64),
        where={"row": 5, "head": 1, "lane": 0},
        share=math.inf,
        count=64,
        total=4096,
    )
    for seed in range(12):
        add(
            case(
                "paged_attention",
                findings=[wrong_page] if seed % 3 == 0 else [],
                share=math.inf if seed % 3 == 0 else 0.5,
                seed=seed,
            )
        )
    tile = "FC4001: cube tile (16, 100) of mlp.py:31 is not aligned to 16"
    for seed in range(2):
        add(case("mlp", preset="awkward", findings=[Finding("raised", tile)], share=None, seed=seed, profile=None))
    timed_out = Finding("timed_out", "no answer after 120 s; the worker was killed")
    add(case("lm_head", "compile_only", "qwen3_14b", findings=[timed_out], share=None, check="compile", seconds=120.0))
    for seed in range(6):
        add(case("rope", preset="awkward", findings=[element(1.3, 2.0)], share=1.3, seed=seed))
    add(
        Record(
            "expected",
            kernel="rope",
            stage="rope",
            lane="interpret",
            status="failed as expected",
            reason="odd head count: issue 12",
        )
    )
    add(
        Record(
            "expected",
            kernel="kv_write",
            stage="kv_write",
            lane="interpret",
            status="fixed",
            reason="index_put threw before 0.2.0",
        )
    )
    add(
        Record(
            "skip",
            kernel="lm_head",
            stage="lm_head",
            lane="interpret",
            preset="awkward",
            reason="takes V divisible by 512, found 500",
        )
    )
    add(
        Record(
            "error", reason="kernels/mine/fused.py does not import: NameError: name 'pypto' is not defined, line 3 of fused.py"
        )
    )
    write(folder, [*cpu, end(1)], "builder-main")

    card = [start([entry for entry in plan if entry["lane"] == "device"], machine="a2a3-1", time=START + 100)]
    for position, stage in enumerate(stages[:4]):
        for preset in presets:
            for seed in range(4):
                took = (1 + position) * 1e-4 * (1 + draw.random() / 10)
                details = {"card": min(seed, 2), "compiles": int(not seed), "device_seconds": took}
                moment = START + 110 + seed
                card.append(case(stage, "device", preset, share=draw.random() * 0.6, seed=seed, time=moment, details=details))
    gone = {"card": 1, "compiles": 1, "given_up": {"2": "the card reported error 507054 (DEVICE_LOST): the card is gone"}}
    card.append(case(stages[3], "device", "narrow", share=0.2, seed=9, time=START + 120, details=gone))
    reason = "the driver did not answer within 60 s on card 3; reset it with npu-smi"
    card += [Record("error", kernel=stage, stage=stage, lane="device", reason=reason) for stage in stages[4:6]]
    card += [
        Record("skip", kernel=stage, stage=stage, lane="device", preset="awkward", reason="one preset a night on the card")
        for stage in stages[6:9]
    ]
    card += [case(stages[6], "device", "tiny", share=0.41, seed=seed, time=START + 130) for seed in range(2)]
    return write(folder, card, "a2a3-1-main")  # killed: no end
