"""The report of an exam says what its data say: what is missed, wrongly rejected or unjudged is seen, and fails the exam."""

from __future__ import annotations

import collections
import dataclasses
import html
import html.parser
import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

import conformance
from conformance.contract.registry import stage_named
from conformance.exam.efforts import EFFORTS
from conformance.exam.known_kernels import KINDS
from conformance.exam.results import COMPOSITE_TARGET, OURS, Cost, Exam, KernelResult
from conformance.exam.rules import RULES
from conformance.reports import exam_page, exam_table
from conformance.reports.exam_figures import lines_of, percent, showing_in_outputs, verdict
from conformance.reports.exam_picture import picture as picture_of
from conformance.tests.synthetic_runs import HOSTILE

CLOSE = "assert_close"
COSINE = "cosine > 0.999"


def fault(
    name: str, stage: str = "rms_norm", kind: str = "value", trials: int = 4, lane: str = "eager", **more: Any
) -> KernelResult:
    """A fault that ours caught in every trial, unless told otherwise."""
    identity = f"{stage}/{name}" if lane == "eager" else f"{lane}:{stage}/{name}"
    fields: dict[str, Any] = {
        "rejected": {OURS: trials},
        "regimes": {"normal": [trials, trials]},
        "detectors": ["element"],
        "in_outputs": trials,
        "first": 1,
        **more,
    }
    return KernelResult(identity, stage, name, lane, kind, f"does {name} wrong", trials=trials, **fields)


def legal(name: str, stage: str = "rms_norm", trials: int = 10, **more: Any) -> KernelResult:
    """A legal variant that ours accepted, unless told otherwise."""
    return KernelResult(f"{stage}/{name}", stage, name, "eager", None, f"does {name}", trials=trials, share=0.4375, **more)


def small_exam(*more: KernelResult) -> Exam:
    """Three faults, of which ours catches all and the others two and one; two variants, of which assert_close rejects one."""
    standings = [
        legal("rounded_early", rejected={CLOSE: 5}),
        fault("wrong_eps", rejected={OURS: 3, CLOSE: 4}, regimes={"normal": [2, 1], "small": [2, 2]}),
        legal("as_it_is", "rope"),
        fault("off_by_one", "rope", "indexing", rejected={OURS: 4}),
        fault("wrong_scale", "decode_layer", rejected={OURS: 4, CLOSE: 1, COSINE: 2}),
        *more,
    ]
    costs = {OURS: Cost(0.08, 20), CLOSE: Cost(0.02, 20), COSINE: Cost()}
    return Exam(EFFORTS["quick"], 7, standings, costs, 83.0)


def large_exam(faults: int = 600, variants: int = 300) -> Exam:
    """As many faults as a whole catalogue has, each with its own power against every rule."""
    draw = random.Random(0)
    stages = list(conformance.stages())
    standings = []
    for number in range(faults):
        rejected = {rule.name: draw.choice((0, 22, draw.randrange(23))) for rule in RULES}
        standings.append(
            fault(
                f"engineer_{number}_made_a_mistake",
                stages[number % len(stages)],
                list(KINDS)[number % len(KINDS)],
                trials=22,
                rejected={OURS: draw.randint(3, 22), **rejected},
                regimes={name: [2, draw.randint(0, 2)] for name in "abcdefghij"} | {"k": [2, 2]},
            )
        )
    for number in range(variants):
        rejected = {rule.name: draw.choice((0, 0, 7)) for rule in RULES}
        standings.append(legal(f"freedom_{number}", stages[number % len(stages)], trials=22, rejected=rejected))
    costs = {rule.name: Cost(0.1 * draw.random(), 100) for rule in RULES} | {OURS: Cost(0.4, 100)}
    return Exam(EFFORTS["full"], 0, standings, costs, 1000.0)


MISSED = fault("unseen", "rope", rejected={CLOSE: 2})
MISSED_IN_LAYER = fault("unseen", "decode_layer", rejected={})
REJECTED = legal("reordered", rejected={OURS: 1}, rejections=["rms_norm:tiny::normal:3 (example): element: far off"])
UNJUDGED = dataclasses.replace(fault("lost"), trials=0, rejected={}, error="there is no interpreter here")
HIDDEN = fault("past_the_end", "rope", "memory", lane="interpret", rejected={}, hidden="it copies its arguments")


class Page(html.parser.HTMLParser):
    """The text of every table's cells by row, by the heading that the table stands under; fails on a tag left open."""

    VOID = frozenset({"meta", "br", "wbr"})
    INLINE = frozenset({"wbr", "b", "span", "code"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: collections.Counter[str] = collections.Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.heading = ""
        self.tables: dict[str, list[list[str]]] = collections.defaultdict(list)
        self.words: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.INLINE:
            self.words.append(" ")
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "h2":
            self.heading = dict(attrs).get("id") or ""
        elif tag == "tr":
            self.tables[self.heading].append([])
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
        elif tag == "br" and self.tables[self.heading]:
            self.tables[self.heading][-1][-1] += " "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.tables[self.heading][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def row(self, heading: str, start: str) -> list[str]:
        (found,) = (row for row in self.tables[heading] if row and row[0].startswith(start))
        return [" ".join(cell.split()) for cell in found]


def rule_row(table: str, rule: str) -> list[str]:
    (found,) = (line for line in table.splitlines() if line.startswith(rule + " "))
    return found.removeprefix(rule).split()


# Numbers


def test_terminal_tells_each_rule_by_its_numbers() -> None:
    table = exam_table.render(small_exam())
    assert rule_row(table, OURS) == ["3/3", "91.6%", "0/2", "0/20", "0%", "4.00", "ms", "4.0x"]
    assert rule_row(table, CLOSE) == ["2/3", "41.6%", "1/2", "5/20", "25.0%", "1.00", "ms", "1.0x"]
    assert rule_row(table, COSINE) == ["1/3", "16.6%", "0/2", "0/20", "0%", "-", "-"]
    assert table.startswith("The harness judged: 3 known faults and 2 legal kernels in 3 stages\n")
    assert "effort quick, seed 7, 32 trials in 1 min 23 s." in table
    words = " ".join(table.split())
    assert "Examples of a faulty kernel: 3 to 50 of single stages, 2 to 18 of layers and chains, 1 to 12 interpreted" in words
    assert "Of a legal one: 6 of single stages, 3 of layers and chains, 1 interpreted." in words
    assert table.splitlines()[-1] == "PASSED: 3 of 3 faulty kernels caught, 0 of 20 runs of legal kernels rejected"


def test_page_tells_each_rule_by_its_numbers() -> None:
    page = Page(exam_page.render(small_exam()))
    assert page.row("rules", OURS)[1:-1] == ["3/3 100%", "3/3 100%", "91.6%", "0/2", "0/20 0%", "4.00 ms 4.0x"]
    assert page.row("rules", CLOSE)[1:-1] == ["2/3 66.6%", "2/3 66.6%", "41.6%", "1/2", "5/20 25.0%", "1.00 ms 1.0x"]
    assert page.row("rules", COSINE)[1:-1] == ["1/3 33.3%", "1/3 33.3%", "16.6%", "0/2", "0/20 0%", "- -"]
    definition = next(rule.definition for rule in RULES if rule.name == CLOSE)
    assert definition in page.row("rules", CLOSE)[-1]
    assert page.row("kinds", "value")[1:] == ["2", "✓", "✓", "50"]
    assert page.row("kinds", "indexing")[1:] == ["1", "✓", "✗", "✗"]
    assert page.row("stages", "rope")[1:] == ["1", "✓", "✗", "✗"]
    assert page.row("faults", "wrong_eps")[1:] == ["4", "75", "✓", "✗"]
    assert page.row("narrow", "rms_norm wrong_eps")[2:5] == ["3/4 (75.0%)", "1", "normal 1/2, small 2/2"]
    assert page.row("variants", "rounded_early")[2:] == ["10", "43%", "✓ passed", f"1 of 2: {CLOSE}"]
    assert "None of the 2 rules in use elsewhere did as well on both counts." in page.text
    assert "conformance exam --lane eager --seed 7 --out exam" in page.text
    assert "Each fault was judged on too few cases to tell" in page.text


def test_an_exam_that_measures_power_states_how_many_examples_show_every_fault() -> None:
    measured = dataclasses.replace(small_exam(), effort=EFFORTS["full"])
    page = Page(exam_page.render(measured))
    needed = measured.examples_needed()
    for stage in ("rms_norm", "rope", "decode_layer"):
        expected = [str(needed[stage][0]), str(stage_named(stage).examples), needed[stage][1]]
        assert page.row("examples", stage) == [stage, *expected]
        assert [stage, *expected] in [line.split() for line in exam_table.render(measured).splitlines()]
    assert "At most so many examples" in exam_table.render(measured)
    assert "At most so many examples" not in exam_table.render(small_exam())


def test_a_fault_is_seen_only_in_one_kind_of_data_if_it_was_tried_in_all() -> None:
    all_kinds = {name: [1, int(name == "small")] for name in stage_named("rms_norm").regimes}
    some_kinds = dict(list(all_kinds.items())[:2])
    exam = small_exam(fault("eps_twice", regimes=all_kinds), fault("eps_missing", regimes=some_kinds))
    assert some_kinds["small"] == [1, 1]
    assert Page(exam_page.render(exam)).row("regimes", "small")[-1] == "1"


def test_rule_that_does_as_well_as_ours_is_named() -> None:
    exam = small_exam()
    for one in exam.faults:
        one.rejected[COSINE] = 1
    assert f"Of 2 rules in use elsewhere, {COSINE} did as well on both counts." in Page(exam_page.render(exam)).text


def test_rules_are_also_compared_without_the_faults_that_no_output_shows() -> None:
    exam = small_exam(fault("guard_overwritten", kind="memory", detectors=["out_of_bounds"], in_outputs=0))
    page = Page(exam_page.render(exam))
    assert page.row("rules", CLOSE)[1:3] == ["2/4 50.0%", "2/3 66.6%"]
    assert f"of the other 3, ours caught 3 and the best elsewhere ({CLOSE}) 2." in page.text
    assert "of the other 3, ours caught 3" in " ".join(exam_table.render(exam).split())
    seen_by_others = small_exam(
        fault("flips", kind="nondeterminism", detectors=["nondeterministic"], in_outputs=0, rejected={OURS: 4, CLOSE: 1})
    )
    assert len(showing_in_outputs(seen_by_others)) == 4
    missed = small_exam(dataclasses.replace(MISSED, rejected={}, detectors=[]))
    assert len(showing_in_outputs(missed)) == 4


def test_rule_that_an_old_exam_did_not_measure_is_not_said_to_miss_everything() -> None:
    exam = small_exam()
    table, page = exam_table.render(exam), Page(exam_page.render(exam))
    unmeasured = RULES[1].name
    assert f"Not measured in this exam: {unmeasured}" in " ".join(table.split())
    assert f"Not measured in this exam: {unmeasured}" in page.text
    assert not any(row and row[0].startswith(unmeasured) for row in page.tables["rules"])


@pytest.mark.parametrize(
    ("count", "whole", "shown"),
    [
        *((0, 7, "0%"), (7, 7, "100%"), (0, 0, "-"), (1, 3, "33.3%")),
        *((9999, 10_000, "99.9%"), (1, 10**6, "<0.01%"), (7, 1000, "0.70%")),
    ],
)
def test_share_says_none_and_all_only_of_none_and_all(count: int, whole: int, shown: str) -> None:
    assert percent(count, whole) == shown


def test_order_does_not_depend_on_which_process_ended_first() -> None:
    exam = small_exam(MISSED, MISSED_IN_LAYER, REJECTED, UNJUDGED, HIDDEN)
    turned = dataclasses.replace(exam, standings=exam.standings[::-1])
    assert exam_table.render(exam) == exam_table.render(turned)
    names = [row[0] for row in Page(exam_page.render(turned)).tables["stages"]]
    assert (
        names
        == [row[0] for row in Page(exam_page.render(exam)).tables["stages"]]
        == ["Stage", "rms_norm", "rope", "decode_layer"]
    )


# What is wrong is seen


@pytest.mark.parametrize(
    ("standing", "reason", "told"),
    [
        (MISSED, "1 fault of single stages missed", ["unseen", "does unseen wrong"]),
        (MISSED_IN_LAYER, "1 of 2 faults of layers and chains missed, more than 3%", ["decode_layer unseen"]),
        (REJECTED, "1 legal kernel rejected", ["reordered", "rms_norm:tiny::normal:3 (example): element: far off"]),
        (UNJUDGED, "1 kernel could not be judged", ["lost", "there is no interpreter here"]),
    ],
)
def test_whatever_is_wrong_is_told_and_fails_the_exam(standing: KernelResult, reason: str, told: list[str]) -> None:
    exam = small_exam(standing)
    table, page = exam_table.render(exam, width=200), Page(exam_page.render(exam))
    assert table.splitlines()[-1] == f"FAILED: {reason}"
    assert f"Failed because: {reason}." in page.text
    assert "Can the judge be trusted? ✗ failed" in page.text
    for words in told:
        assert words in table
        assert words in page.text


def test_passed_exam_lists_nothing_as_missed_or_rejected() -> None:
    table, page = exam_table.render(small_exam()), Page(exam_page.render(small_exam()))
    for words in ("missed", "Legal kernels that", "Could not be judged", "cannot show", "FAILED"):
        assert words not in table
    assert "Can the judge be trusted? ✓ passed" in page.text
    assert "Nothing: each of the 3 faults was rejected in at least one trial." in page.text
    assert "None, in 20 runs of 2 legal kernels." in page.text
    assert page.tables["missed"] == page.tables["rejected"] == []


def test_missed_fault_is_told_with_who_saw_it_and_where_it_is_caught() -> None:
    page = Page(exam_page.render(small_exam(MISSED, fault("unseen"))))
    row = page.row("missed", "rope unseen")
    assert row[4:] == [f"{CLOSE} (rejects 25.0% of the legal runs)", "rms_norm"]
    assert ["4", "✗", "50", "✗"] in [row[1:] for row in page.tables["faults"] if row[0].startswith("unseen")]


def test_few_missed_faults_of_layers_pass_and_are_told() -> None:
    exam = small_exam(MISSED_IN_LAYER, *(fault(f"seen_{number}", "decode_layer") for number in range(40)))
    table = exam_table.render(exam)
    assert table.splitlines()[-1].startswith("PASSED: 43 of 44")
    assert f"Faults that {OURS} missed: 1" in table
    assert Page(exam_page.render(exam)).row("missed", "decode_layer unseen")


def test_hidden_fault_is_listed_and_not_counted() -> None:
    table, page = exam_table.render(small_exam(HIDDEN), width=200), Page(exam_page.render(small_exam(HIDDEN)))
    assert rule_row(table, OURS)[0] == "3/3"
    assert table.splitlines()[-1].startswith("PASSED")
    assert "missed" not in table
    assert "rope past_the_end (interpret): it copies its arguments" in table
    assert page.row("hidden", "rope past_the_end (interpret)")[2:] == ["it copies its arguments", "0/4"]
    assert page.tables["missed"] == []
    assert [row[0] for row in page.tables["stages"]] == ["Stage", "rms_norm", "rope", "decode_layer"]


def test_interpreted_kernels_are_lines_of_their_own() -> None:
    page = Page(exam_page.render(small_exam(fault("off_by_one", "rope", "indexing", lane="interpret"))))
    assert page.row("stages", "rope lane interpret")[1:] == ["1", "✓", "✗", "✗"]


@pytest.mark.parametrize(
    "standings", [[], [fault("alone")], [legal("alone")], [UNJUDGED], [HIDDEN], [fault("alone", rejected={}), legal("fine")]]
)
def test_exam_without_faults_or_without_legal_kernels_fails_and_says_why(standings: list[KernelResult]) -> None:
    exam = Exam(EFFORTS["full"], 0, standings, {})
    last = exam_table.render(exam).splitlines()[-1]
    assert re.match(r"FAILED: \w", last)
    assert html.escape(last.removeprefix("FAILED: ")) in exam_page.render(exam)


def test_every_failure_has_a_reason_and_no_pass_has_one() -> None:
    draw = random.Random(0)
    for _ in range(200):
        extra = draw.sample([MISSED, MISSED_IN_LAYER, REJECTED, UNJUDGED, HIDDEN], draw.randrange(3))
        many = [fault(f"seen_{number}", "decode_layer") for number in range(draw.choice((0, round(1 / (1 - COMPOSITE_TARGET)))))]
        exam = small_exam(*extra, *many)
        outcome, reasons = verdict(exam)
        assert (outcome == "passed") == exam.passed == (not reasons)


def test_unmeasured_cost_is_a_dash_everywhere() -> None:
    exam = small_exam()
    exam.costs = {name: Cost() for name in exam.costs}
    assert math.isnan(exam.score(CLOSE).milliseconds)
    page = Page(exam_page.render(exam))
    for rule in exam.costs:
        assert rule_row(exam_table.render(exam), rule)[-2:] == ["-", "-"]
        assert page.row("rules", rule)[-2] == "- -"
    assert "nan" not in exam_table.render(exam).lower()


# Text that is out to break a report


def hostile_exam() -> Exam:
    texts: dict[str, Any] = {"name": HOSTILE, "summary": HOSTILE, "lane": HOSTILE}
    regimes = {HOSTILE: [4, 2], "normal": [4, 0]}
    bad = [
        dataclasses.replace(fault("x"), **texts, kind=HOSTILE, rejected={OURS: 2}, regimes=regimes, detectors=[HOSTILE]),
        dataclasses.replace(fault("x"), **texts, kind=HOSTILE, rejected={}, regimes={}),
        dataclasses.replace(fault("x"), **texts, hidden=HOSTILE, rejected={}),
        dataclasses.replace(fault("x"), **texts, error=HOSTILE, rejected={}),
        dataclasses.replace(legal("x"), **texts, rejected={OURS: 1, HOSTILE: 1}, rejections=[HOSTILE]),
        dataclasses.replace(fault(HOSTILE), rejected={OURS: 2}, regimes=regimes),
    ]
    exam = small_exam(*bad)
    return dataclasses.replace(exam, effort=dataclasses.replace(exam.effort, name=HOSTILE, measures=True))


UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff\ufffe\uffff]")


@pytest.mark.parametrize("make", [hostile_exam, small_exam, large_exam])
def test_page_is_well_formed_and_needs_nothing_else(make: Callable[[], Exam]) -> None:
    content = exam_page.render(make())
    page = Page(content)
    assert content.startswith("<!DOCTYPE html>")
    assert page.tags["style"] == 1
    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "style"), (tag, name)
        if name == "href":
            assert value.startswith("#")
        if name in ("href", "aria-labelledby", "aria-describedby"):
            assert value.removeprefix("#") in ids
    (policy,) = (value for tag, name, value in page.attributes if tag == "meta" and value.startswith("default-src"))
    assert re.fullmatch(r"default-src 'none'; style-src 'sha256-[A-Za-z0-9+/=]+'", policy)
    assert "url(" not in content
    assert "@import" not in content


def test_hostile_text_stays_text() -> None:
    content, table = exam_page.render(hostile_exam()), exam_table.render(hostile_exam())
    assert content.count("<script") == content.count("<img") == 0
    assert content.count("</style>") == 1
    assert "&lt;script&gt;window.hacked=1" in content
    for shown in (content, table):
        assert UNPRINTABLE.search(shown) is None
        assert len(shown) < 200_000
        shown.encode("utf-8")
    assert max(map(len, table.splitlines()[:-1])) <= 100
    coloured = exam_table.render(hostile_exam(), colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == table


# Size, and what is kept


def test_whole_catalogue_makes_a_page_that_is_not_heavy() -> None:
    exam = large_exam()
    content = exam_page.render(exam)
    assert len(content.encode()) < 1_500_000
    page = Page(content)
    assert sum(len(row) == len(exam.rules) + 2 for row in page.tables["faults"]) == 600 + len(conformance.stages())
    assert all(rule.definition in page.text for rule in RULES)
    assert max(map(len, exam_table.render(exam).splitlines())) <= 100
    assert page.tags["circle"] == len(RULES)


def test_every_rule_stands_in_the_picture_by_its_number_in_the_table() -> None:
    lines = lines_of(large_exam())
    picture = picture_of(lines)
    assert picture is not None
    for dot in picture.dots:
        assert lines[dot.number - 1] is dot.line
        assert picture.left <= dot.x <= picture.right
        assert picture.top <= dot.y <= picture.bottom
    numbers = [int(number) for label in picture.labels for number in label.text.split(", ")]
    assert sorted(numbers) == [dot.number for dot in picture.dots]
    for place, one in enumerate(picture.labels):
        assert not any(abs(one.x - other.x) < 8 and abs(one.y - other.y) < 8 for other in picture.labels[:place])


@pytest.mark.parametrize("make", [small_exam, large_exam, lambda: small_exam(MISSED, REJECTED, UNJUDGED, HIDDEN)])
def test_kept_exam_is_rendered_as_the_exam_itself(make: Callable[[], Exam]) -> None:
    exam = make()
    kept = Exam.from_json(json.loads(json.dumps(exam.to_json())))
    assert exam_table.render(kept) == exam_table.render(exam)
    assert exam_page.render(kept) == exam_page.render(exam)
