"""Case keys: text and back, the same tensors always, valid whatever is drawn, and where rows are picked from a case."""

from __future__ import annotations

import hashlib
import itertools
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import conformance
from conformance.buffers import same_bits
from conformance.cases import Case, CaseKey, Space, keys, make_case, stratified_keys, take_rows
from conformance.contract import stage_named
from conformance.errors import UsageError
from kernels.qwen3.layout import contiguous

STAGES = list(conformance.stages())
WITH_LENGTHS = [name for name, stage in conformance.stages().items() if stage.has_lengths]
#: A few milliseconds a case: short sequences, one case small.
SMALL = {"S": 40, "BS": 8, "L": 2}


def space_of(stage: str, dims: str | dict[str, int] = "tiny") -> Space:
    if isinstance(dims, dict) and "L" not in stage_named(stage).drawn:
        dims = {name: size for name, size in dims.items() if name != "L"}
    return Space.of(stage_named(stage), dims)


def digest(case: Case) -> str:
    whole = hashlib.sha256()
    for name, tensor in case.inputs.items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def require_valid(case: Case) -> None:
    """What the contract says of the inputs of any stage."""
    dims = case.dims
    for argument in case.stage.inputs:
        tensor = case.inputs[argument.name]
        assert tuple(tensor.shape) == argument.size(dims)
        assert tensor.dtype == argument.dtype
        assert tensor.is_contiguous()
        if argument.access == "in" and tensor.is_floating_point():
            assert bool(torch.isfinite(tensor).all()), f"{case.key}: {argument.name} is not finite"
    if case.stage.has_lengths and "seq_lens" in case.inputs:
        assert bool(((case.inputs["seq_lens"] >= 1) & (case.inputs["seq_lens"] <= dims.S)).all())
    if "slot_mapping" in case.inputs:
        slots = case.inputs["slot_mapping"].tolist()
        assert len({slot // dims.BS for slot in slots}) == len(slots), "two sequences share a page"
        assert all(0 <= slot < (dims.NB - 1) * dims.BS for slot in slots), "the last page belongs to nobody"


def test_a_dimension_that_stands_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="B stands twice"):
        CaseKey.parse("rms_norm:tiny:B=2,B=3:normal:1")


# -- keys as text ---------------------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
counts = st.integers(0, 10**9)


@given(
    stage=names,
    preset=names,
    regime=names,
    seed=st.integers(0, 2**63),
    overrides=st.lists(st.tuples(st.sampled_from(["B", "L", "NB", "S"]), counts), max_size=3, unique_by=lambda item: item[0]).map(
        tuple
    ),
    seq_lens=st.lists(counts, max_size=5).map(tuple),
    rows=st.lists(counts, max_size=5).map(tuple),
)
def test_a_key_survives_its_text(
    stage: str,
    preset: str,
    regime: str,
    seed: int,
    overrides: tuple[tuple[str, int], ...],
    seq_lens: tuple[int, ...],
    rows: tuple[int, ...],
) -> None:
    key = CaseKey(stage, preset, regime, seed, overrides, seq_lens, rows)
    assert CaseKey.parse(str(key)) == key
    assert CaseKey.parse(f"  {key}\n") == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rms_norm",
        "rms_norm:tiny::normal",
        "rms_norm:tiny::normal:-1",
        "rms_norm:tiny:B=:normal:0",
        "rms_norm:tiny:B=1+2:normal:0",
    ],
)
def test_a_bad_key_is_refused_in_one_line_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="case key") as error:
        CaseKey.parse(text)
    assert "attention:tiny:B=3,seq_lens=1+16+17:needle:7" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rope:tiny:B=2,seq_lens=5:normal:0", "takes 2 sequence lengths, found 1"),
        ("rope:tiny:B=1,seq_lens=129:normal:0", "sequence length 129 is outside 1..128"),
        ("rope:tiny:B=1,seq_lens=0:normal:0", "sequence length 0 is outside 1..128"),
        ("rms_norm:tiny:B=1,seq_lens=4:normal:0", "takes no sequence lengths, found 1"),
        ("rms_norm:tiny:B=1:needle:0", "no regime 'needle'; it has normal, small"),
        ("rms_norm:huge:B=1:normal:0", "unknown preset 'huge'; known are tiny"),
        ("rms_nrom:tiny:B=1:normal:0", "unknown stage 'rms_nrom'; known are rms_norm"),
        ("rms_norm:tiny:Q=1:normal:0", "unknown dimension 'Q'; known are B"),
        ("rms_norm:tiny:B=0:normal:0", "dimension B must be a positive whole number, found 0"),
        ("rms_norm:tiny:B=2,rows=0+2:normal:0", "rows must be below B=2"),
        ("kv_write:tiny:B=2,NB=3,seq_lens=16+17:normal:0", "4 pages are needed (one more than are in use), found NB=3"),
    ],
)
def test_a_key_that_does_not_fit_says_why(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        make_case(CaseKey.parse(text))
    assert "\n" not in str(error.value)


# -- the tensors of a key -------------------------------------------------------------------------------------------------------

#: The first 16 digits of the SHA-256 of a case's tensors: equal on every machine, with every version of torch and numpy. A change
#: here makes every key in every report mean another case; it must be on purpose.
PINNED = {
    "rms_norm:tiny:B=3:outlier:11": "cfe8447ba781c8b4",
    "rms_norm:awkward:B=2:heavy_tail:1": "9124e631b90100d6",
    "qkv_proj:tiny:B=2:cancel:12": "fcb16610dc120bc1",
    "qk_norm:awkward:B=3:mixed_rows:13": "397d4cef403bd69f",
    "rope:tiny:B=3,seq_lens=1+17+128:small:14": "8388c14482db39b2",
    "kv_write:tiny:B=2,NB=9,seq_lens=16+49:normal:15": "9fff80d9a0face0c",
    "attention:awkward:B=3,seq_lens=8+76+1:needle:16": "94e424faa57a4919",
    "attention:tiny:B=2,seq_lens=9+128:cancel:17": "8d5d072db1dd7c87",
    "o_proj:tiny:B=2:cancel:18": "a2059279c85ac59e",
    "mlp:awkward:B=2:big:19": "c8d3314ef27f96af",
    "decode_layer:tiny:B=2,seq_lens=16+100:needle:20": "7c5b61d24d6838dc",
    "decode_fwd_layers:awkward:B=2,L=3,seq_lens=7+76:small:21": "9360210d55cddd3c",
    "decode_fwd_layers:awkward:B=4,L=2,seq_lens=7+76+8+9,rows=2+0:mixed_rows:22": "2dfbc7012023b91f",
}


@pytest.mark.parametrize("text", PINNED)
def test_a_key_gives_the_same_bytes_everywhere(text: str) -> None:
    assert digest(make_case(CaseKey.parse(text))) == PINNED[text]


def test_every_stage_is_pinned() -> None:
    assert {text.split(":")[0] for text in PINNED} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_key_names_changes_the_tensors(stage: str) -> None:
    first = next(stratified_keys(space_of(stage, SMALL), 0))
    original = digest(make_case(first))
    assert digest(make_case(CaseKey.parse(str(first)))) == original
    other_seed = CaseKey.parse(f"{first}1")
    assert digest(make_case(other_seed)) != original


# -- drawn keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "awkward"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stratified_key_makes_a_valid_case(stage: str, preset: str) -> None:
    for key in itertools.islice(stratified_keys(space_of(stage, preset), 3), 13):
        require_valid(make_case(key))


@pytest.mark.parametrize("stage", STAGES)
def test_every_hypothesis_key_makes_a_valid_case(stage: str) -> None:
    @settings(max_examples=15, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(keys(space_of(stage, SMALL)))
    def draw(key: CaseKey) -> None:
        assert CaseKey.parse(str(key)) == key
        require_valid(make_case(key))

    draw()


@pytest.mark.parametrize("stage", STAGES)
def test_stratified_keys_visit_every_regime_in_turn(stage: str) -> None:
    regimes = stage_named(stage).regimes
    found = [key.regime for key in itertools.islice(stratified_keys(space_of(stage), 0), 2 * len(regimes))]
    assert tuple(found) == regimes * 2


@pytest.mark.parametrize("stage", STAGES)
def test_fifty_keys_hold_a_batch_of_one_a_full_and_an_odd_one(stage: str) -> None:
    batches = {key.dims.B for key in itertools.islice(stratified_keys(space_of(stage), 0), 50)}
    assert {1, 16} < batches
    assert any(1 < batch < 16 and batch % 2 for batch in batches)


@pytest.mark.parametrize("stage", WITH_LENGTHS)
def test_fifty_keys_hold_every_boundary_length(stage: str) -> None:
    lengths = {length for key in itertools.islice(stratified_keys(space_of(stage), 0), 50) for length in key.seq_lens}
    assert {1, 15, 16, 17, 127, 128} <= lengths  # pages of 16, at most 128


@pytest.mark.parametrize("stage", WITH_LENGTHS)
def test_hypothesis_keys_hold_boundary_lengths(stage: str) -> None:
    lengths: set[int] = set()

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(keys(space_of(stage)))
    def draw(key: CaseKey) -> None:
        lengths.update(key.seq_lens)

    draw()
    assert {1, 15, 16, 17, 127, 128} <= lengths


def test_keys_follow_from_the_seed_alone() -> None:
    space = space_of("attention")
    first, again, other = (list(itertools.islice(stratified_keys(space, seed), 10)) for seed in (5, 5, 6))
    assert first == again
    assert all(one != another for one, another in zip(first, other, strict=True))


def test_a_pinned_dimension_is_not_drawn() -> None:
    found = list(itertools.islice(stratified_keys(space_of("decode_fwd_layers", {"B": 3, "L": 2, "S": 40}), 0), 12))
    assert {(key.dims.B, key.dims.L, key.dims.S) for key in found} == {(3, 2, 40)}


def test_a_chain_draws_one_layer_and_more() -> None:
    layers = {key.dims.L for key in itertools.islice(stratified_keys(space_of("decode_fwd_layers"), 0), 20)}
    assert layers == {1, 2, 3, 4}


def test_only_a_chain_has_layers() -> None:
    assert {key.dims.L for key in itertools.islice(stratified_keys(space_of("decode_layer"), 0), 10)} == {1}
    with pytest.raises(UsageError, match="stage attention has no dimension L to set"):
        Space.of(stage_named("attention"), {"L": 2})


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ("huge", "unknown preset 'huge'"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"Q": 1}, "unknown dimension 'Q'"),
        ({"B": 0}, "B must be a positive whole number, found 0"),
        ({"B": 2.5}, "B must be a positive whole number, found 2.5"),
        ({"NKV": 3}, "NH must be a multiple of NKV"),
        ({"D": 63}, "D must be even"),
        (3, "dims is a preset's name or a dict"),
    ],
)
def test_dims_that_make_no_sense_are_refused_in_one_line(dims: object, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        Space.of(stage_named("rms_norm"), dims)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


# -- rows of a case -------------------------------------------------------------------------------------------------------------

ROW_KEYS = {
    "rms_norm": "rms_norm:tiny:B=5:mixed_rows:3",
    "kv_write": "kv_write:tiny:B=5,NB=30,seq_lens=1+16+17+40+128:normal:3",
    "attention": "attention:tiny:B=5,S=40,seq_lens=1+16+17+40+3:needle:3",
    "decode_fwd_layers": "decode_fwd_layers:tiny:B=5,L=2,S=40,seq_lens=1+16+17+40+3:normal:3",
}
ORDER = (4, 0, 2)


@pytest.mark.parametrize("text", ROW_KEYS.values(), ids=ROW_KEYS)
def test_rows_of_a_case_are_rows_of_its_tensors(text: str) -> None:
    whole = make_case(CaseKey.parse(text))
    part = make_case(take_rows(whole.key, ORDER))
    require_valid(part)
    assert part.dims == whole.dims.replace(B=3)
    picked = list(ORDER)
    for argument in whole.stage.inputs:
        before, after = whole.inputs[argument.name], part.inputs[argument.name]
        if argument.shape == "L*B*NKV*S D":
            before = contiguous(before, whole.dims)[:, picked].reshape(-1, whole.dims.D)
        elif argument.shape.split()[0] == "B":
            before = before[picked]
        assert same_bits(after, before), argument.name


def test_rows_of_rows_are_rows_of_the_first_case() -> None:
    key = CaseKey.parse(ROW_KEYS["attention"])
    twice = take_rows(take_rows(key, ORDER), (2, 1))
    assert twice == take_rows(key, (2, 0))
    assert digest(make_case(twice)) == digest(make_case(take_rows(key, (2, 0))))
    assert CaseKey.parse(str(twice)) == twice


@pytest.mark.parametrize("text", ROW_KEYS.values(), ids=ROW_KEYS)
def test_results_of_rows_are_rows_of_results(text: str) -> None:
    from conformance.arithmetic import EXACT

    whole = make_case(CaseKey.parse(text))
    part = make_case(take_rows(whole.key, ORDER))
    everything, some = (case.stage.reference(case.inputs, case.dims, EXACT) for case in (whole, part))
    for argument in whole.stage.outputs:
        before, after = everything[argument.name], some[argument.name]
        if argument.shape == "L*B*NKV*S D":
            before = contiguous(before, whole.dims)[:, list(ORDER)].reshape(-1, whole.dims.D)
        elif argument.shape.startswith("B "):
            before = before[list(ORDER)]
        else:
            # A shared paged cache: the slots of the sequences that were left out keep their rows.
            continue
        assert torch.allclose(after, before, rtol=1e-9, atol=1e-9, equal_nan=True), argument.name
