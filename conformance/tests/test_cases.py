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
from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey, take_rows
from conformance.cases.space import Space, stratified_keys
from conformance.cases.strategies import keys
from conformance.contract.arguments import Argument
from conformance.contract.registry import models, preset_named, stage_named
from conformance.contract.stage import layer_of
from conformance.errors import UsageError
from conformance.kernels.qwen3.layout import Layout, contiguous
from conformance.lanes.buffers import same_bits

STAGES = list(conformance.stages())
WITH_LENGTHS = [name for name, stage in conformance.stages().items() if stage.has_lengths]
WITH_CHUNKS = [name for name, stage in conformance.stages().items() if stage.has_chunks]
#: Stages that read a paged cache; ``kv_write`` only writes one.
PAGED = [name for name, stage in conformance.stages().items() if any(one.name == "block_table" for one in stage.arguments)]
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
        is_cache = argument.name in ("k_cache", "v_cache")  # a paged one holds NaN in pages that nobody owns
        if not is_cache and tensor.is_floating_point():
            assert bool(torch.isfinite(tensor).all()), f"{case.key}: {argument.name} is not finite"
    if case.stage.has_lengths and "seq_lens" in case.inputs:
        assert bool(((case.inputs["seq_lens"] >= 1) & (case.inputs["seq_lens"] <= dims.S)).all())
    if "slot_mapping" in case.inputs:
        slots = case.inputs["slot_mapping"].tolist()
        assert all(0 <= slot < (dims.NB - 1) * dims.BS for slot in slots), "the last page belongs to nobody"
        assert len(set(slots)) == len(slots), "two tokens share a slot"
        if not case.stage.has_chunks:
            assert len({slot // dims.BS for slot in slots}) == len(slots), "two sequences share a page"
    if "block_table" in case.inputs:
        require_valid_pages(case)


def chunk_lens_of(case: Case) -> list[int]:
    """How many tokens each sequence brings; 0 where nothing is written."""
    if case.stage.has_chunks:
        return case.inputs["chunk_lens"].tolist()
    return [int("slot_mapping" in case.inputs)] * case.dims.B


def require_valid_pages(case: Case) -> None:
    """What the contract says of a block table, of slots and of packed chunks."""
    dims, inputs = case.dims, case.inputs
    table = inputs["block_table"].view(dims.B, dims.MB).tolist()
    lengths, chunks = inputs["seq_lens"].tolist(), chunk_lens_of(case)
    for b, pages in enumerate(table):
        count = -(-lengths[b] // dims.BS)
        assert all(0 <= page < dims.NB - 1 for page in pages[:count]), "the last page belongs to nobody"
        assert len(set(pages[:count])) == count, "a sequence has a page twice"
        assert pages[count:] == [-1] * (dims.MB - count)
    for (a, one), (b, other) in itertools.combinations(enumerate(table), 2):
        common = (set(one) & set(other)) - {-1}
        # Shared are whole pages that start both histories, below whatever this step writes.
        assert one[: len(common)] == other[: len(common)]
        assert set(one[: len(common)]) == common
        for sequence in (a, b):
            assert len(common) * dims.BS <= lengths[sequence] - chunks[sequence]
    if "chunk_offsets" in inputs:
        starts = inputs["chunk_offsets"].tolist()
        rows = [row for start, count in zip(starts, chunks, strict=True) for row in range(start, start + count)]
        assert sorted(rows) == list(range(dims.T)), "chunks leave a gap or overlap"
    else:
        starts = list(range(dims.B))
    if "slot_mapping" in inputs:
        for b, (start, count) in enumerate(zip(starts, chunks, strict=True)):
            positions = range(lengths[b] - count, lengths[b])
            expected = [table[b][position // dims.BS] * dims.BS + position % dims.BS for position in positions]
            assert inputs["slot_mapping"][start : start + count].tolist() == expected


def test_a_dimension_that_stands_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="B stands twice"):
        CaseKey.parse("rms_norm:tiny:B=2,B=3:normal:1")


# -- keys as text ---------------------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
counts = st.integers(0, 10**9)


# A busy machine may take a second to draw the first names.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    stage=names,
    preset=names,
    regime=names,
    seed=st.integers(0, 10**18 - 1),
    overrides=st.lists(st.tuples(st.sampled_from(["B", "L", "NB", "S"]), counts), max_size=3, unique_by=lambda item: item[0]).map(
        tuple
    ),
    seq_lens=st.lists(counts, max_size=5).map(tuple),
    rows=st.lists(counts, max_size=5).map(tuple),
    chunk_lens=st.lists(counts, max_size=5).map(tuple),
)
def test_a_key_survives_its_text(
    stage: str,
    preset: str,
    regime: str,
    seed: int,
    overrides: tuple[tuple[str, int], ...],
    seq_lens: tuple[int, ...],
    rows: tuple[int, ...],
    chunk_lens: tuple[int, ...],
) -> None:
    key = CaseKey(stage, preset, regime, seed, overrides, seq_lens, rows, chunk_lens)
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
        ("paged_attention:tiny:B=2,NB=2,seq_lens=16+1:normal:0", "3 pages are needed (one more than are in use), found NB=2"),
        ("prefill_layer:tiny:B=2,seq_lens=5+9:normal:0", "takes 2 chunk lengths, found 0"),
        ("prefill_layer:tiny:B=2,seq_lens=5+9,chunk_lens=5:normal:0", "takes 2 chunk lengths, found 1"),
        ("prefill_fwd:tiny:B=2,seq_lens=5+9,chunk_lens=1+10:normal:0", "chunk length 10 is outside 1..9, the length of its"),
        ("prefill_fwd:tiny:B=2,seq_lens=5+9,chunk_lens=0+9:normal:0", "chunk length 0 is outside 1..5, the length of its"),
        ("prefill_fwd:tiny:B=1,seq_lens=5,chunk_lens=0:normal:0", "chunk length 0 is outside 1..5, the length of its"),
        ("decode_layer:tiny:B=1,seq_lens=5,chunk_lens=1:normal:0", "takes no chunk lengths, found 1"),
        ("prefill_layer:tiny:B=1,chunk_lens=1:normal:0", "takes 1 sequence lengths, found 0"),
    ],
)
def test_a_key_that_does_not_fit_says_why(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        make_case(CaseKey.parse(text))
    assert "\n" not in str(error.value)


# -- presets --------------------------------------------------------------------------------------------------------------------


def test_any_two_sizes_differ_in_a_preset_of_the_suites() -> None:
    """Where two are equal, as ``NKV`` and ``G`` in ``tiny``, a kernel that takes one for the other is right."""
    for model in models():
        presets = [model.presets[name] for name in model.suite_presets]
        symbols = {*presets[0].axes(), *presets[0].derived, "NH*D"}
        for one, other in itertools.combinations(sorted(symbols), 2):
            pair = Argument("pair", f"{one} {other}", torch.float32, "in")
            assert any(left != right for left, right in map(pair.size, presets)), f"{model.name}: {one} is always {other}"


# -- the tensors of a key -------------------------------------------------------------------------------------------------------

#: The first 16 digits of the SHA-256 of a case's tensors: equal on every machine, with every version of torch and numpy. A change
#: here makes every key in every report mean another case; it must be on purpose.
PINNED = {
    "rms_norm:tiny:B=3:outlier:11": "1f88fe56183d8b13",
    "rms_norm:awkward:B=2:heavy_tail:1": "f5717f4f6c89bb01",
    "qkv_proj:tiny:B=2:cancel:12": "fcb16610dc120bc1",
    "qk_norm:awkward:B=3:mixed_rows:13": "c0e60137ad469acb",
    "rope:tiny:B=3,seq_lens=1+17+128:small:14": "8388c14482db39b2",
    "kv_write:tiny:B=2,NB=9,seq_lens=16+49:normal:15": "8822eb1442992fcd",
    "attention:awkward:B=3,seq_lens=8+76+1:needle:16": "8c63194b31b19a8b",
    "attention:tiny:B=2,seq_lens=9+128:cancel:17": "8d5d072db1dd7c87",
    "o_proj:tiny:B=2:cancel:18": "a2059279c85ac59e",
    "o_proj:narrow:B=2:cancel:32": "37eb0d94f4b63f2a",
    "mlp:awkward:B=2:big:19": "2e272c1ca8a40909",
    "decode_layer:tiny:B=2,seq_lens=16+100:needle:20": "5b9261d3ac516503",
    "decode_fwd_layers:awkward:B=2,L=3,seq_lens=7+76:small:21": "586394ba7edaf8e9",
    "decode_fwd_layers:awkward:B=4,L=2,seq_lens=7+76+8+9,rows=2+0:mixed_rows:22": "203a4d934ab91b1c",
    "paged_attention:awkward:B=3,NB=15,seq_lens=8+76+1:needle:23": "e57e5ac7238e3fce",
    "paged_attention:tiny:B=3,NB=19,seq_lens=40+128+97,rows=2+0:normal:0": "abbb7ad83e9c9328",
    "lm_head:awkward:B=3:outlier:24": "ebf83d94da520953",
    "greedy_sample:awkward:B=3:ties:25": "401fc1cb653fbe04",
    "greedy_sample:tiny:B=4:near_ties:26": "b8fe785ac1b53689",
    "paged_decode_layer:tiny:B=2,NB=9,seq_lens=16+100:small:27": "290731ad98174796",
    "decode_fwd:awkward:B=2,L=2,seq_lens=7+76:outlier:28": "55b479b3a00e138f",
    "paged_decode_fwd:awkward:B=3,L=2,NB=20,seq_lens=9+76+40,rows=1:needle:29": "6204456538260d38",
    "decode_layer:narrow:B=2,seq_lens=8+76:needle:33": "833c7fce871e5e1d",
    "prefill_layer:awkward:B=3,NB=14,seq_lens=8+76+9,chunk_lens=8+5+1:normal:30": "df758d86e1604b26",
    "prefill_fwd:tiny:B=3,L=2,NB=13,seq_lens=17+100+33,chunk_lens=2+40+17,rows=2+1:mixed_rows:31": "09b5ef4a14800eda",
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
    assert [digest(make_case(CaseKey.parse(f"{first}{more}"))) == original for more in ("", "1")] == [True, False]


# -- drawn keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "narrow"])
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
    assert layers == {1, 2, 3, 4, 8}


@pytest.mark.parametrize("stage", ["rms_norm", "decode_layer", "prefill_fwd"])
def test_every_batch_size_comes_up_in_the_examples_of_a_check(stage: str) -> None:
    """Some kernels fail at a single one."""
    missing = []
    for seed in range(12):
        keys = itertools.islice(stratified_keys(space_of(stage), seed), stage_named(stage).examples)
        missing.append(16 - len({key.dims.B for key in keys}))
    assert sum(missing) <= 1, missing


def test_deep_chains_come_up_with_few_sequences() -> None:
    keys = list(itertools.islice(stratified_keys(space_of("paged_decode_fwd"), 0), 50))
    assert {key.dims.B for key in keys if key.dims.L > 4} == {2}
    assert sum(key.dims.L == 8 for key in keys) == 5


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


# -- paged caches and chunks ----------------------------------------------------------------------------------------------------


#: For what depends on neither heads nor weights.
THIN = {"NH": 2, "NKV": 1, "D": 8, "I": 16, "V": 16, "S": 40, "BS": 8, "L": 2}


def paged_cases(stage: str, count: int = 18) -> list[Case]:
    return [make_case(key) for key in itertools.islice(stratified_keys(space_of(stage, THIN), 0), count)]


def by_page(case: Case, name: str) -> torch.Tensor:
    """A paged cache as ``[NB, L, NKV, BS, D]``, in float64."""
    dims = case.dims
    return case.inputs[name].double().view(dims.L, dims.NB, dims.NKV, dims.BS, dims.D).transpose(0, 1)


@pytest.mark.parametrize("stage", [*PAGED, "kv_write"])
def test_a_page_of_nobody_holds_nan_and_an_owned_one_does_not(stage: str) -> None:
    for case in paged_cases(stage, 6):
        if "block_table" in case.inputs:
            owned = {page for page in case.inputs["block_table"].tolist() if page >= 0}
        else:
            owned = {slot // case.dims.BS for slot in case.inputs["slot_mapping"].tolist()}
        for name in ("k_cache", "v_cache"):
            pages = by_page(case, name)
            nan = pages.isnan()
            assert bool(nan[-1].all())
            for page in range(case.dims.NB):
                if page in owned:
                    assert not bool(nan[page].any())
                elif "block_table" in case.inputs:
                    assert bool(nan[page].all())


@pytest.mark.parametrize("stage", PAGED)
@pytest.mark.parametrize("preset", ["tiny", "narrow"])
def test_rows_past_a_length_hold_garbage_and_the_rows_before_it_do_not(stage: str, preset: str) -> None:
    """At both ends of a page; at ``narrow`` the last page goes on past ``S``."""
    dims = preset_named(preset)
    lengths = (dims.BS + 1, dims.S - 1, dims.S)
    chunks = (2, 3, 1) if stage in WITH_CHUNKS else ()
    case = make_case(CaseKey(stage, preset, "normal", 0, (("B", 3), ("NB", 40)), lengths, chunk_lens=chunks))
    table = case.inputs["block_table"].view(3, -1)
    for name, honest, garbage in (("k_cache", 12, 30), ("v_cache", 6, 3000)):
        pages = by_page(case, name)
        for b, (length, new) in enumerate(zip(lengths, chunk_lens_of(case), strict=True)):
            mine = pages[table[b][table[b] >= 0].long()]  # [pages, L, NKV, BS, D]
            rows = mine.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [L, NKV, pages * BS, D]
            largest = rows.abs().amax(-1)
            assert bool((largest[:, :, : length - new] < honest).all())
            assert bool((largest[:, :, length - new :] > garbage).all())


@pytest.mark.parametrize("stage", PAGED)
def test_pages_are_in_random_order(stage: str) -> None:
    cases = [case for case in paged_cases(stage) if case.dims.NB > 8]
    tables = [case.inputs["block_table"].view(case.dims.B, -1).tolist() for case in cases]
    lists = [[page for page in pages if page >= 0] for table in tables for pages in table]
    several = [pages for pages in lists if len(pages) > 1]
    assert len(several) > 20
    ascending = sum(pages == sorted(pages) for pages in several)
    assert ascending < len(several) / 2
    assert not any(pages == list(range(len(pages))) for pages in several if len(pages) > 2)


@pytest.mark.parametrize("stage", PAGED)
def test_sequences_share_pages_in_some_cases(stage: str) -> None:
    shared = 0
    possible = 0
    for case in paged_cases(stage, 40):
        owned = [page for page in case.inputs["block_table"].tolist() if page >= 0]
        shared += len(set(owned)) < len(owned)
        before = [length - new for length, new in zip(case.key.seq_lens, chunk_lens_of(case), strict=True)]
        possible += sum(past >= case.dims.BS for past in before) > 1
    assert 0 < shared < possible


@pytest.mark.parametrize("stage", ["paged_attention", "paged_decode_fwd"])
def test_a_paged_history_is_the_contiguous_one_cut_into_pages(stage: str) -> None:
    """Drawn from the same source; a page that sequences share holds the rows of the first of them."""
    from conformance.cases.source import Source
    from conformance.kernels.qwen3 import inputs

    whole = {"paged_attention": inputs.attention, "paged_decode_fwd": inputs.decode_fwd}[stage]
    seen = set()
    for seed in range(6):
        lengths = (24, 25, 40)
        key = CaseKey(stage, "tiny", "normal", seed, (("B", 3), ("NB", 20), ("S", 40), ("BS", 8)), lengths)
        case = make_case(key)
        expected = whole(case.dims, lengths, "normal", Source(f"{stage}/normal/{seed}"))
        table = case.inputs["block_table"].view(3, -1)
        layout = Layout.of(case.inputs, case.dims)
        for name in ("k_cache", "v_cache"):
            for layer in range(case.dims.L):
                rows = contiguous(expected[name], case.dims)[layer]
                for b, length in enumerate(lengths):
                    common = int((table[b] == table[0]).int().cumprod(0).sum()) * case.dims.BS if b else 0
                    seen.add(common > 0)
                    history = layout.histories(layer_of(case.inputs[name], layer, case.dims.L))[b]
                    assert same_bits(history[:, :common].contiguous(), rows[0, :, :common].contiguous())
                    assert same_bits(history[:, common:].contiguous(), rows[b, :, common:length].contiguous())
    assert seen == {True, False}


@pytest.mark.parametrize("stage", WITH_CHUNKS)
def test_chunks_are_packed_in_other_orders_too(stage: str) -> None:
    orders = []
    for case in paged_cases(stage):
        starts = case.inputs["chunk_offsets"].tolist()
        orders.append(starts == sorted(starts))
    assert 2 <= sum(orders) < len(orders)  # a batch of one has but one order


@pytest.mark.parametrize("stage", WITH_CHUNKS)
def test_fifty_keys_hold_chunks_of_one_token_whole_prompts_and_page_edges(stage: str) -> None:
    kinds: set[str] = set()
    for key in itertools.islice(stratified_keys(space_of(stage), 0), 50):
        page = key.dims.BS
        assert key.dims.T == sum(key.chunk_lens) <= 64
        for length, chunk in zip(key.seq_lens, key.chunk_lens, strict=True):
            kinds.add("one" if chunk == 1 else "more")
            kinds.add("whole" if chunk == length > 1 else "part")
            if 1 < chunk < length:
                kinds.add("starts at an edge" if (length - chunk) % page == 0 else "starts inside a page")
                kinds.add("ends at an edge" if length % page == 0 else "ends inside a page")
                kinds.add("over an edge" if (length - 1) // page > (length - chunk) // page else "within a page")
    assert len(kinds) == 10, kinds


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_sequence_can_be_made_as_long_as_the_model_allows(stage: str) -> None:
    space = space_of(stage, THIN)
    for key in itertools.islice(stratified_keys(space, 4), 5):
        longest = space.with_longest(key)
        if stage not in WITH_LENGTHS:
            assert longest == key
            continue
        # The others stay within a page and a token.
        assert longest.seq_lens == (40, *(min(length, key.dims.BS + 1) for length in key.seq_lens[1:]))
        chunks = tuple(min(chunk, length) for chunk, length in zip(key.chunk_lens, longest.seq_lens, strict=False))
        assert (longest.dims.B, longest.dims.L, longest.chunk_lens) == (key.dims.B, key.dims.L, chunks)
        require_valid(make_case(longest))


@pytest.mark.parametrize("stage", STAGES)
def test_the_largest_case_is_a_full_one_of_full_sequences(stage: str) -> None:
    space = space_of(stage, THIN)
    largest = make_case(space.largest)
    require_valid(largest)
    assert largest.dims.B == 16
    assert set(largest.key.seq_lens) == ({40} if stage in WITH_LENGTHS else set())
    assert (64 if stage in WITH_CHUNKS else 1) == largest.dims.T


def test_a_pool_has_room_for_any_batch() -> None:
    with pytest.raises(UsageError, match="NB=10 is too few pages for B=2 sequences of S=128: at least 17 are needed") as error:
        Space.of(stage_named("paged_attention"), {"B": 2, "NB": 10})
    assert "\n" not in str(error.value)
    pinned = space_of("paged_attention", {"B": 2, "NB": 17})
    assert {key.dims.NB for key in itertools.islice(stratified_keys(pinned, 0), 5)} == {17}


def test_tokens_are_limited_by_t_and_only_a_prefill_has_them() -> None:
    limited = list(itertools.islice(stratified_keys(space_of("prefill_layer", {"B": 3, "T": 7}), 0), 20))
    assert max(key.dims.T for key in limited) == 7
    with pytest.raises(UsageError, match="stage decode_layer has no dimension T to set"):
        Space.of(stage_named("decode_layer"), {"T": 7})
    with pytest.raises(UsageError, match="T=2 is too few tokens for B=3 sequences: each brings one at least"):
        Space.of(stage_named("prefill_fwd"), {"B": 3, "T": 2})


def test_logits_have_their_regimes_in_them() -> None:
    def logits(regime: str, seed: int) -> torch.Tensor:
        return make_case(CaseKey("greedy_sample", "awkward", regime, seed, (("B", 8),))).inputs["logits"]

    for seed in range(3):
        ties = logits("ties", seed)
        assert bool(((ties == ties.amax(-1, keepdim=True)).sum(-1) > 1).all())
        near = logits("near_ties", seed).topk(2).values
        assert bool((near[:, 0] == torch.nextafter(near[:, 1], torch.tensor(torch.inf))).all())
        assert bool((logits("negative", seed) < 0).all())
    columns = torch.cat([logits("edges", seed).argmax(-1) for seed in range(3)]).tolist()
    assert {0, 499} < set(columns)


# -- rows of a case -------------------------------------------------------------------------------------------------------------

ROW_KEYS = {
    "rms_norm": "rms_norm:tiny:B=5:mixed_rows:3",
    "kv_write": "kv_write:tiny:B=5,NB=30,seq_lens=1+16+17+40+128:normal:3",
    "attention": "attention:tiny:B=5,S=40,seq_lens=1+16+17+40+3:needle:3",
    "decode_fwd_layers": "decode_fwd_layers:tiny:B=5,L=2,S=40,seq_lens=1+16+17+40+3:normal:3",
    "lm_head": "lm_head:tiny:B=5:outlier:3",
    "greedy_sample": "greedy_sample:tiny:B=5:ties:3",
}
#: To be completed by a seed: of the two, sequences share pages with the second only.
PAGED_ROW_KEYS = {
    "paged_attention": "paged_attention:tiny:B=5,NB=20,S=80,seq_lens=70+16+35+40+3:normal",
    "paged_decode_layer": "paged_decode_layer:tiny:B=5,NB=20,S=80,seq_lens=70+16+35+40+3:normal",
    "paged_decode_fwd": "paged_decode_fwd:tiny:B=5,L=2,NB=20,S=80,seq_lens=70+16+35+40+3:mixed_rows",
    "prefill_layer": "prefill_layer:tiny:B=5,NB=20,S=80,seq_lens=70+16+35+40+3,chunk_lens=4+16+1+20+3:normal",
    "prefill_fwd": "prefill_fwd:tiny:B=5,L=2,NB=20,S=80,seq_lens=70+16+35+40+3,chunk_lens=4+16+1+20+2:mixed_rows",
}
SEEDS = {
    "paged_attention": (0, 1),
    "paged_decode_layer": (0, 2),
    "paged_decode_fwd": (0, 1),
    "prefill_layer": (4, 0),
    "prefill_fwd": (2, 0),
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
    from conformance.numerics.arithmetic import EXACT

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


def of_sequence(case: Case, tensors: dict[str, torch.Tensor], sequence: int) -> dict[str, torch.Tensor]:
    """Everything that belongs to one sequence of a paged case, in the order of its positions, wherever it lies."""
    dims, layout = case.dims, Layout.of(case.inputs, case.dims)
    mine = torch.nonzero(layout.sequence == sequence).flatten()
    mine = mine[layout.length[mine].argsort()]
    parts = {"length": layout.length[mine]}
    for name, tensor in tensors.items():
        axis = case.stage.argument(name).shape.split()[0]
        if name in ("k_cache", "v_cache"):
            layers = [layout.histories(layer_of(tensor, layer, dims.L))[sequence] for layer in range(dims.L)]
            parts[name] = torch.stack(layers)
        elif name == "block_table":
            parts[name] = tensor.view(dims.B, -1)[sequence]
        elif axis == "T":
            parts[name] = tensor[mine]
        elif axis == "B" and name != "chunk_offsets":
            parts[name] = tensor[sequence]
    return {name: tensor.contiguous() for name, tensor in parts.items()}


@pytest.mark.parametrize("rows", [ORDER, (3,), (1,)], ids=["permuted", "lone", "lone with an edge"])
@pytest.mark.parametrize("stage", PAGED)
def test_rows_of_a_paged_case_are_the_same_sequences(stage: str, rows: tuple[int, ...]) -> None:
    """Their histories bit for bit, their tokens, and what the reference makes of them."""
    from conformance.numerics.arithmetic import EXACT

    for seed, shares in zip(SEEDS[stage], (False, True), strict=True):
        whole = make_case(CaseKey.parse(f"{PAGED_ROW_KEYS[stage]}:{seed}"))
        part = make_case(take_rows(whole.key, rows))
        require_valid(part)
        chunks = whole.key.chunk_lens
        tokens = sum(chunks[row] for row in rows) if chunks else 1
        assert part.dims == whole.dims.replace(B=len(rows), T=tokens)
        owned = [page for page in whole.inputs["block_table"].tolist() if page >= 0]
        assert (len(set(owned)) < len(owned)) is shares
        everything, some = (case.stage.reference(case.inputs, case.dims, EXACT) for case in (whole, part))
        for place, row in enumerate(rows):
            before, after = of_sequence(whole, whole.inputs, row), of_sequence(part, part.inputs, place)
            for name, tensor in before.items():
                assert same_bits(after[name], tensor), name
            before, after = of_sequence(whole, everything, row), of_sequence(part, some, place)
            for name, tensor in before.items():
                assert torch.allclose(after[name].double(), tensor.double(), rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_rows_that_kv_write_must_keep_survive_no_other_format(name: str) -> None:
    """Neither fp16 nor a format of eight bits, nor flushing of subnormals; in every page that is in use."""
    case = make_case(CaseKey.parse("kv_write:tiny:B=3,NB=14,seq_lens=8+9+76:normal:1"))
    dims, cache = case.dims, case.inputs[name]
    for page in cache.view(dims.L * dims.NB, -1):
        if bool(page.isnan().any()):
            assert bool(page.isnan().all())  # nobody's
            continue
        assert bool(page.isfinite().all())
        for dtype in (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
            assert int((page.to(dtype).to(page.dtype) != page).sum()) > len(page) // 2
        assert bool((page[page != 0].abs() < torch.finfo(page.dtype).tiny).any())
        assert bool((page < 0).any())
        assert bool((page > 0).any())
