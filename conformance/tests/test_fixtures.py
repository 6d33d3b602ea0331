"""The golden tensors: they are right, today's code still gives them, and neither damage nor a changed formula passes unseen."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import conformance
from conformance import fixtures
from conformance.cases.case import make_case
from conformance.cases.source import Source
from conformance.contract.stage import layer_of
from conformance.errors import UsageError
from conformance.fixtures import Fixture, compare, load
from conformance.fixtures import build as builder
from conformance.judge.judgement import judge
from conformance.judge.verdict import Verdict
from conformance.kernels.qwen3 import config, layout, reference
from conformance.lanes.base import Outcome
from conformance.numerics.arithmetic import CONTRACT, Arithmetic

NAMES = fixtures.names()
PACKAGE = Path(fixtures.__file__).parent


# ------------------------------------------------------------------------------------------------ today's code gives them


def test_every_stage_of_the_contract_has_a_fixture() -> None:
    assert {load(name).key.stage for name in NAMES} == set(conformance.stages())


@pytest.mark.parametrize("name", NAMES)
def test_todays_inputs_and_reference_are_as_stored(name: str) -> None:
    assert compare(load(name)) == []


def test_files_are_small() -> None:
    sizes = [path.stat().st_size for path in PACKAGE.glob("*.*")]
    assert max(sizes) < 200_000
    assert sum(sizes) < 1_000_000


# ------------------------------------------------------------------------------- they are right: numpy, from the formulas

Array = np.ndarray[Any, np.dtype[np.float64]]
Cast = Callable[[Array], Array]


def to_bf16(value: Array) -> Array:
    mantissa, exponent = np.frexp(value)
    return np.asarray(np.ldexp(np.rint(mantissa * 256), exponent - 8))


def unrounded(value: Array) -> Array:
    return value


#: The two goldens of a fixture, and what stands at a bf16 rounding point of each.
GOLDENS: dict[str, Cast] = {"exact": unrounded, "contract": to_bf16}


def wide(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.double().numpy())


def rms_norm_by_hand(x: Array, weight: Array) -> Array:
    return np.asarray(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight)


def heads_normed_by_hand(x: Array, weight: Array) -> Array:
    size = weight.shape[-1]
    parts = [rms_norm_by_hand(x[:, start : start + size], weight) for start in range(0, x.shape[1], size)]
    return np.concatenate(parts, axis=1)


def rope_by_hand(x: Array, lengths: list[int], cosine: Array, sine: Array) -> Array:
    """Lane ``i`` and lane ``i + D/2`` of a head are one complex number that turns by the position's angle."""
    size = cosine.shape[1]
    half = size // 2
    result = np.empty_like(x)
    for row, length in enumerate(lengths):
        turn = cosine[length - 1, :half] + 1j * sine[length - 1, :half]
        for start in range(0, x.shape[1], size):
            turned = (x[row, start : start + half] + 1j * x[row, start + half : start + size]) * turn
            result[row, start : start + size] = np.concatenate([turned.real, turned.imag])
    return result


#: Row of a cache for a sequence, a KV head and a position.
Place = Callable[[int, int, int], int]


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a dispatch: its row in the hidden states, its sequence and its position."""

    row: int
    sequence: int
    position: int


def tokens_by_hand(inputs: Mapping[str, torch.Tensor]) -> list[Token]:
    """In the order of the rows."""
    lengths = inputs["seq_lens"].tolist()
    if "chunk_lens" not in inputs:
        return [Token(row, row, length - 1) for row, length in enumerate(lengths)]
    chunks = zip(inputs["chunk_offsets"].tolist(), inputs["chunk_lens"].tolist(), lengths, strict=True)
    found = [
        Token(first + index, sequence, length - count + index)
        for sequence, (first, count, length) in enumerate(chunks)
        for index in range(count)
    ]
    return sorted(found, key=lambda token: token.row)


def places_by_hand(fixture: Fixture, layer: int = 0) -> Place:
    """The contract's row formulas."""
    d, inputs = fixture.dims, fixture.inputs
    if "block_table" not in inputs:
        return lambda sequence, head, position: ((layer * d.B + sequence) * d.NKV + head) * d.S + position
    table = inputs["block_table"].tolist()

    def paged(sequence: int, head: int, position: int) -> int:
        page = table[sequence * d.MB + position // d.BS]
        assert page >= 0
        return int(((layer * d.NB + page) * d.NKV + head) * d.BS + position % d.BS)

    return paged


def attention_by_hand(q: Array, tokens: list[Token], k_cache: Array, v_cache: Array, place: Place, group: int) -> Array:
    """``group`` query heads share a KV head."""
    size = k_cache.shape[1]
    result = np.empty_like(q)
    for token in tokens:
        for head in range(q.shape[1] // size):
            rows = [place(token.sequence, head // group, position) for position in range(token.position + 1)]
            lanes = slice(head * size, (head + 1) * size)
            score = np.array([np.dot(q[token.row, lanes], k_cache[row]) for row in rows]) / np.sqrt(size)
            probability = np.exp(score - score.max())
            probability /= probability.sum()
            result[token.row, lanes] = sum(part * v_cache[row] for part, row in zip(probability, rows, strict=True))
    return result


def mlp_by_hand(x: Array, w_gate: Array, w_up: Array, w_down: Array, cast: Cast) -> Array:
    gate = np.einsum("bh,hi->bi", x, w_gate)
    up = np.einsum("bh,hi->bi", x, w_up)
    return np.asarray(np.einsum("bi,ih->bh", cast(gate / (1 + np.exp(-gate)) * up), w_down))


def lm_head_by_hand(hidden: Array, gamma: Array, weight: Array, cast: Cast) -> Array:
    return np.asarray(np.einsum("bh,vh->bv", cast(rms_norm_by_hand(hidden, gamma)), weight))


def layers_by_hand(fixture: Fixture, cast: Cast) -> dict[str, Array]:
    """The chain of layers: what the contract's section on one layer says, seven steps a layer; then the LM head, if there is."""
    d = fixture.dims
    tensors = {name: wide(tensor) for name, tensor in fixture.inputs.items()}
    tokens = tokens_by_hand(fixture.inputs)
    positions = [token.position + 1 for token in tokens]
    k_cache, v_cache, hidden = tensors["k_cache"].copy(), tensors["v_cache"].copy(), tensors["hidden_states"]
    size = d.NH * d.D
    for layer in range(d.L):

        def weight(name: str, rows: int = size, layer: int = layer) -> Array:
            return tensors[name][layer * rows : (layer + 1) * rows]

        x = cast(rms_norm_by_hand(hidden, weight("input_rms_weight", 1)))
        q, k, v = (x @ weight(name) for name in ("wq", "wk", "wv"))
        tables = positions, tensors["rope_cos"], tensors["rope_sin"]
        q = cast(rope_by_hand(heads_normed_by_hand(q, weight("q_norm_weight", 1)), *tables))
        k = cast(rope_by_hand(heads_normed_by_hand(k, weight("k_norm_weight", 1)), *tables))
        place = places_by_hand(fixture, layer)
        for token in tokens:
            for head in range(d.NKV):
                row = place(token.sequence, head, token.position)
                k_cache[row] = k[token.row, head * d.D : (head + 1) * d.D]
                v_cache[row] = cast(v[token.row, head * d.D : (head + 1) * d.D])
        attended = cast(attention_by_hand(q, tokens, k_cache, v_cache, place, d.G))
        residual = attended @ weight("wo") + hidden
        y = cast(rms_norm_by_hand(residual, weight("post_rms_weight", 1)))
        branch = mlp_by_hand(y, weight("w_gate"), weight("w_up"), weight("w_down", d.I), cast)
        hidden = cast(branch + residual)
    results = {"k_cache": k_cache, "v_cache": v_cache}
    if "lm_head_weight" not in tensors:
        return {**results, "out": hidden}
    last = {token.sequence: token.row for token in sorted(tokens, key=lambda token: token.position)}
    states = hidden[[last[sequence] for sequence in range(d.B)]]
    return {**results, "logits": lm_head_by_hand(states, tensors["final_norm_weight"], tensors["lm_head_weight"], cast)}


def assert_agrees(found: Array, golden: torch.Tensor) -> None:
    """float64 to 1e-12 of the row's largest, fp32 to its own rounding, bf16 exactly; pages of nobody hold NaN on both sides."""
    expected = wide(golden)
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    slack = 1e-12 * largest + (2.0**-23 * np.abs(expected) if golden.dtype == torch.float32 else 0)
    if golden.dtype == torch.bfloat16:
        np.testing.assert_array_equal(to_bf16(found), expected)
    else:
        agrees = (np.abs(found - expected) <= slack) | (np.isnan(found) & np.isnan(expected))
        assert agrees.all(), np.abs(found - expected)[~agrees].max()


@pytest.mark.parametrize("part", GOLDENS)
@pytest.mark.parametrize("name", ["rms_norm-normal", "rms_norm-small"])
def test_rms_norm_is_right(name: str, part: str) -> None:
    fixture = load(name)
    found = rms_norm_by_hand(wide(fixture.inputs["x"]), wide(fixture.inputs["weight"]))
    assert_agrees(found, getattr(fixture, part)["out"])


@pytest.mark.parametrize("part", GOLDENS)
@pytest.mark.parametrize("name", ["rope-normal", "rope-long"])
def test_rope_is_right(name: str, part: str) -> None:
    fixture = load(name)
    lengths, cosine, sine = (
        fixture.inputs["seq_lens"].tolist(),
        wide(fixture.inputs["rope_cos"]),
        wide(fixture.inputs["rope_sin"]),
    )
    half = fixture.dims.D // 2
    angle = np.arange(fixture.dims.S)[:, None] * 1e6 ** (-np.arange(half) / half)
    for table, function in ((cosine, np.cos), (sine, np.sin)):
        np.testing.assert_allclose(table, np.tile(function(angle), 2), rtol=0, atol=2.0**-24)
    for argument in ("q", "k"):
        found = rope_by_hand(wide(fixture.inputs[argument]), lengths, cosine, sine)
        assert_agrees(found, getattr(fixture, part)[f"{argument}_out"])


@pytest.mark.parametrize("part", GOLDENS)
@pytest.mark.parametrize("name", ["attention-normal", "attention-needle", "paged_attention-normal", "paged_attention-needle"])
def test_attention_is_right(name: str, part: str) -> None:
    fixture = load(name)
    q, k_cache, v_cache = (wide(fixture.inputs[argument]) for argument in ("q", "k_cache", "v_cache"))
    found = attention_by_hand(q, tokens_by_hand(fixture.inputs), k_cache, v_cache, places_by_hand(fixture), group=2)
    assert_agrees(found, getattr(fixture, part)["out"])


@pytest.mark.parametrize("part", GOLDENS)
@pytest.mark.parametrize("name", ["mlp-normal", "mlp-outlier"])
def test_mlp_is_right(name: str, part: str) -> None:
    fixture = load(name)
    x, w_gate, w_up, w_down = (wide(fixture.inputs[argument]) for argument in ("x", "w_gate", "w_up", "w_down"))
    found = mlp_by_hand(x, w_gate, w_up, w_down, GOLDENS[part])
    assert_agrees(found, getattr(fixture, part)["out"])


@pytest.mark.parametrize("part", GOLDENS)
@pytest.mark.parametrize("name", ["lm_head-normal", "lm_head-small"])
def test_lm_head_is_right(name: str, part: str) -> None:
    fixture = load(name)
    hidden, gamma, weight = (wide(fixture.inputs[argument]) for argument in ("hidden", "final_norm_weight", "lm_head_weight"))
    found = lm_head_by_hand(hidden, gamma, weight, GOLDENS[part])
    assert_agrees(found, getattr(fixture, part)["logits"])


@pytest.mark.parametrize("part", GOLDENS)
@pytest.mark.parametrize("name", ["greedy_sample-ties", "greedy_sample-near_ties"])
def test_greedy_sample_is_right(name: str, part: str) -> None:
    fixture = load(name)
    expected = [row.index(max(row)) for row in fixture.inputs["logits"].tolist()]  # the first of equals
    assert getattr(fixture, part)["token_ids"].tolist() == expected


@pytest.mark.parametrize("part", GOLDENS)
@pytest.mark.parametrize("name", [name for name in NAMES if conformance.stages()[name.rsplit("-", 1)[0]].composite])
def test_layers_are_right(name: str, part: str) -> None:
    fixture = load(name)
    for argument, found in layers_by_hand(fixture, GOLDENS[part]).items():
        assert_agrees(found, getattr(fixture, part)[argument])


def test_what_a_perfect_kernel_returns_is_rounded_once() -> None:
    tie = 1 + 2.0**-8
    beside = torch.tensor([tie - 2.0**-40, tie, tie + 2.0**-40], dtype=torch.float64)
    # Through fp32 all three would be the tie, and so go to the even neighbour.
    assert CONTRACT.round(beside).tolist() == [1.0, 1.0, 1 + 2.0**-7]


# ------------------------------------------------------------------------------------------------- and the judge says so


def judged(fixture: Fixture, outputs: dict[str, torch.Tensor]) -> Verdict:
    return judge(make_case(fixture.key), Outcome("ok", outputs={**fixture.contract, **outputs}))


@pytest.mark.parametrize("name", NAMES)
def test_the_judge_passes_what_a_perfect_kernel_returns(name: str) -> None:
    assert judged(load(name), {}).findings == ()


def one_ulp_off(tensor: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """The tensor with the last bit of a tenth of its elements in ``rows`` turned over."""
    chosen = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    result = tensor.clone()
    changed = result.view(torch.int16)
    changed[rows][chosen[rows]] ^= 1
    assert not torch.equal(result, tensor)
    return result


@pytest.mark.parametrize(
    ("name", "argument", "passes"),
    [
        ("rms_norm-normal", "out", False),
        ("rope-normal", "k_out", False),
        ("attention-needle", "out", False),
        # Optional roundings inside a layer move a correct kernel's result by as much.
        ("decode_layer-normal", "out", True),
    ],
)
def test_the_judge_on_a_tenth_of_the_elements_one_ulp_off(name: str, argument: str, passes: bool) -> None:
    fixture = load(name)
    assert judged(fixture, {argument: one_ulp_off(fixture.contract[argument])}).ok is passes


# --------------------------------------------------------------------------------------- a changed reference shows


def mutate(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], old: str, new: str) -> None:
    """Replace a piece of a function's text, wherever the function is already referred to."""
    source = textwrap.dedent(inspect.getsource(function)).removeprefix("@classmethod\n")
    assert source.count(old) == 1, f"{function.__name__} has {source.count(old)} times {old!r}: adapt this test to its new text"
    namespace = dict(function.__globals__)
    exec(compile(source.replace(old, new), "<changed>", "exec"), namespace)
    monkeypatch.setattr(function, "__code__", namespace[function.__name__].__code__)


def stages_that_differ() -> set[str]:
    fixtures_now = [load(name) for name in NAMES]
    return {fixture.key.stage for fixture in fixtures_now if compare(fixture)}


PREFILL = {"prefill_layer", "prefill_fwd"}
PAGED_LAYERS = {"paged_decode_layer", "paged_decode_fwd", *PREFILL}
LAYERS = {"decode_layer", "decode_fwd_layers", "decode_fwd", *PAGED_LAYERS}
#: Those that end in logits, and those of several layers.
HEADED = {"decode_fwd", "paged_decode_fwd", "prefill_fwd"}
CHAINS = {"decode_fwd_layers", *HEADED}
ATTENTION = {"attention", "paged_attention", *LAYERS}


@pytest.mark.parametrize(
    ("function", "old", "new", "seen_in"),
    [
        pytest.param(
            reference.normalise,
            "keepdim=True) + eps",
            "keepdim=True) + 10 * eps",
            {"rms_norm", "qk_norm", "lm_head", *LAYERS},
            id="eps 1e-5",
        ),
        pytest.param(
            reference.normalise,
            '* a.unrounded(a.wide(weight), f"weight of the {name}")',
            "",
            {"rms_norm", "qk_norm", "lm_head", *LAYERS},
            id="no gamma",
        ),
        pytest.param(reference.rms_norm, "a.round(", "a.unrounded(", {"lm_head", *LAYERS}, id="normalised not rounded"),
        pytest.param(reference.qkv_proj, "a.matmul(x, wk)", "a.matmul(x, wv)", {"qkv_proj", *LAYERS}, id="k from wv"),
        pytest.param(
            reference.qk_norm, '"before_rope")', '"before_rope").bfloat16().to(a.dtype)', {"qk_norm", *LAYERS}, id="bf16"
        ),
        pytest.param(
            reference.rope,
            "torch.cat([first - second, third + fourth], -1)",
            "torch.stack([first - second, third + fourth], -1)",
            {"rope", *LAYERS},
            id="rope interleaved",
        ),
        pytest.param(reference.rope, "seq_lens.long() - 1", "seq_lens.long() % dims.S", {"rope", *LAYERS}, id="next position"),
        pytest.param(layout.paged_rows, "* dims.NKV + head", "+ head", {"kv_write", *PAGED_LAYERS}, id="wrong row"),
        pytest.param(reference.attend, "* dims.scale", "", ATTENTION, id="scores not scaled"),
        pytest.param(
            reference.attend,
            "reshape(-1, dims.NKV, dims.G, dims.D)",
            "reshape(-1, dims.G, dims.NKV, dims.D).transpose(1, 2)",
            ATTENTION,
            id="heads shared in turn",
        ),
        pytest.param(
            reference.attend,
            'exponentials / denominator, "probabilities"',
            '(exponentials / denominator).bfloat16().to(a.dtype), "probabilities"',
            ATTENTION,
            id="probabilities in bf16",
        ),
        pytest.param(reference.o_proj, "+ a.wide(residual)", "", {"o_proj", *LAYERS}, id="no residual"),
        pytest.param(reference.mlp, "a.round(", "a.unrounded(", {"mlp", *LAYERS}, id="activation not rounded"),
        pytest.param(reference.mlp, "torch.sigmoid(gate)", "torch.sigmoid(1.702 * gate)", {"mlp", *LAYERS}, id="gelu"),
        pytest.param(reference.layer, 'a.round(v, "v")', "v", LAYERS, id="v not rounded in a layer"),
        pytest.param(
            reference.layer,
            'residual = a.optional(residual, "residual")',
            "residual = a.round(residual)",
            LAYERS,
            id="residual rounded",
        ),
        pytest.param(
            layer_of,
            "stacked[layer * rows : (layer + count) * rows]",
            "stacked[:rows]",
            CHAINS,
            id="layer 0",
        ),
        pytest.param(reference.lm_head, "matmul(normalised", "matmul(a.wide(hidden)", {"lm_head", *HEADED}, id="no final norm"),
        pytest.param(
            reference.greedy_sample,
            "torch.where(largest, index, logits.shape[-1]).amin(-1)",
            "torch.where(largest, index, -1).amax(-1)",
            {"greedy_sample"},
            id="highest index",
        ),
        pytest.param(reference.whole_step, "[Layout.of(inputs, dims).last]", "[: dims.B]", {"prefill_fwd"}, id="first tokens"),
        pytest.param(
            layout.Layout.of.__func__,  # type: ignore[attr-defined]
            "seq_lens[b] - count + 1 + torch.arange(count)",
            "1 + torch.arange(count)",
            PREFILL,
            id="a chunk at the start",
        ),
        pytest.param(
            layout.Layout.of.__func__,  # type: ignore[attr-defined]
            "+ 1 + torch.arange(count)",
            "+ count",
            PREFILL,
            id="not causal",
        ),
        pytest.param(
            layout.Layout.history,
            ".clamp_min(0)",
            ".clamp_min(0).sort().values",
            {"paged_attention", *PAGED_LAYERS},
            id="pages in order",
        ),
        pytest.param(
            reference.attend,
            "layout.length[block.tokens].unsqueeze(-1)",
            "(layout.length[block.tokens].unsqueeze(-1) - 1).clamp_min(1)",
            ATTENTION,
            id="newest row not seen",
        ),
    ],
)
def test_a_changed_formula_shows(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], old: str, new: str, seen_in: set[str]
) -> None:
    mutate(monkeypatch, function, old, new)
    assert stages_that_differ() == seen_in


def test_a_rounding_in_another_mode_shows_in_what_a_perfect_kernel_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(self: Arithmetic, tensor: torch.Tensor, name: str = "") -> torch.Tensor:
        return (tensor.float().view(torch.int32) & -65536).view(torch.float32).double() if self.rounds else tensor

    monkeypatch.setattr(Arithmetic, "round", truncated)
    assert {difference.tensor for difference in compare(load("mlp-normal"))} == {"contract.out"}


def test_a_changed_generator_is_told_from_a_changed_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = Source.normal
    monkeypatch.setattr(Source, "normal", lambda self, name, shape: normal(self, name, shape) * (1 + 2.0**-8))
    # The weight is made in float32 around 1; both move, and the goldens of the stored inputs do not.
    assert [difference.tensor for difference in compare(load("rms_norm-normal"))] == ["inputs.x", "inputs.weight"]


def test_a_changed_preset_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.PRESETS, "tiny", config.TINY.replace(eps=1e-5, theta=1e4))
    assert {difference.tensor for difference in compare(load("rms_norm-small"))} == {"exact.out", "contract.out"}
    assert {difference.tensor for difference in compare(load("rope-normal"))} == {"inputs.rope_cos", "inputs.rope_sin"}


def test_a_difference_says_how_much_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = load("o_proj-normal")
    stored = fixture.exact["out"].clone()
    stored[2, 19] += 0.5
    (difference,) = compare(dataclasses.replace(fixture, exact={"out": stored}))
    assert "\n" not in str(difference)
    assert str(difference).startswith("exact.out: 1 of 192 f64 values differ, most at [2, 19] (row 2, column 19): stored ")


# ------------------------------------------------------------------------------- what is forgiven, and not more than that


def differing(fixture: Fixture, **changed: Any) -> set[str]:
    return {difference.tensor for difference in compare(dataclasses.replace(fixture, **changed))}


@pytest.mark.parametrize(("relative", "seen"), [(1e-13, False), (1e-11, True)])
def test_float64_goldens_are_compared_relative_to_the_row(relative: float, seen: bool) -> None:
    fixture = load("decode_layer-normal")
    row_maximum = fixture.exact["out"].abs().amax(-1, keepdim=True)
    exact = {**fixture.exact, "out": fixture.exact["out"] + relative * row_maximum}
    assert differing(fixture, exact=exact) == ({"exact.out"} if seen else set())


@pytest.mark.parametrize(("ulps", "seen"), [(1, False), (2, True)])
def test_fp32_goldens_are_compared_to_one_ulp(ulps: int, seen: bool) -> None:
    fixture = load("qkv_proj-normal")
    off = (fixture.contract["q"].view(torch.int32) + ulps).view(torch.float32)
    assert differing(fixture, contract={**fixture.contract, "q": off}) == ({"contract.q"} if seen else set())


@pytest.mark.parametrize(("ulps_from_tie", "seen"), [(1e-11, False), (1e-3, True)])
def test_bf16_goldens_may_differ_only_at_a_tie(ulps_from_tie: float, seen: bool) -> None:
    fixture = load("rms_norm-normal")
    nearest = fixture.contract["out"].clone()
    other = nearest.clone()
    other.view(torch.int16)[0, 0] ^= 1
    low, high = sorted((float(nearest[0, 0]), float(other[0, 0])))
    exact = fixture.exact["out"].clone()
    exact[0, 0] = (low + high) / 2 + ulps_from_tie * (high - low)
    told = differing(fixture, exact={"out": exact}, contract={"out": other})
    assert ("contract.out" in told) is seen


# ------------------------------------------------------------------------------------------------------ damage is told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of two fixtures and the whole manifest, to be damaged."""
    for file in ("rms_norm-normal.safetensors", "kv_write-normal.safetensors", fixtures.MANIFEST):
        (tmp_path / file).write_bytes((PACKAGE / file).read_bytes())
    return tmp_path


def refusal(folder: Path, name: str = "rms_norm-normal") -> str:
    with pytest.raises(UsageError) as raised:
        load(name, folder=folder)
    message = str(raised.value)
    assert "\n" not in message
    return message


FILE = "rms_norm-normal.safetensors"


@pytest.mark.parametrize("offset", [0, 9, 700, -1])
def test_a_changed_byte_is_told(folder: Path, offset: int) -> None:
    content = bytearray((folder / FILE).read_bytes())
    content[offset] ^= 1
    (folder / FILE).write_bytes(content)
    assert f"{FILE} was changed: sha256 must be" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 2000])
def test_a_file_cut_short_is_told(folder: Path, kept: int) -> None:
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:kept])
    assert f"{FILE} must have {len(whole)} bytes, found {kept}" in refusal(folder)


def test_a_missing_file_is_told(folder: Path) -> None:
    (folder / FILE).unlink()
    assert f"{FILE} is missing" in refusal(folder)
    load("kv_write-normal", folder=folder)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown fixture 'rms_norm'; known are rms_norm-normal, rms_norm-small, "):
        load("rms_norm")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / fixtures.MANIFEST).read_text())
    change(manifest)
    (folder / fixtures.MANIFEST).write_text(json.dumps(manifest))


def test_a_missing_manifest_is_told(folder: Path) -> None:
    (folder / fixtures.MANIFEST).unlink()
    assert "manifest.json is missing" in refusal(folder)
    with pytest.raises(UsageError, match=r"manifest\.json is missing"):
        fixtures.names(folder=folder)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not JSON"),
        (b'{"format": 1,', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[]", "has format None, this version reads 1"),
        (b'{"format": 2}', "has format 2, this version reads 1"),
        (b'{"format": 1}', "is incomplete: KeyError: 'fixtures'"),
        (b'{"format": 1, "versions": {}, "fixtures": []}', "is incomplete"),
        (b'{"format": 1, "versions": {}, "fixtures": {"rms_norm-normal": {"case": "x"}}}', "is incomplete: KeyError: 'size'"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_told(folder: Path, content: bytes, told: str) -> None:
    (folder / fixtures.MANIFEST).write_bytes(content)
    assert f"manifest.json {told}" in refusal(folder)


def test_a_manifest_with_a_case_that_is_none_is_told(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["fixtures"]["rms_norm-normal"].update(case="rms_norm:tiny"))
    assert "cannot read case key 'rms_norm:tiny'" in refusal(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of the file, and give the manifest the new file's hash."""
    tensors = safetensors.torch.load((folder / FILE).read_bytes())
    change(tensors)
    replace_content(folder, safetensors.torch.save(tensors))


def replace_content(folder: Path, content: bytes) -> None:
    (folder / FILE).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["fixtures"]["rms_norm-normal"].update(entry))


def test_a_file_that_is_no_safetensors_is_told_even_if_the_manifest_agrees(folder: Path) -> None:
    replace_content(folder, (folder / FILE).read_bytes()[:1000])
    assert f"{FILE} is not a safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t.update({"exact.result": t.pop("exact.out")}),
            f"{FILE} has no tensor exact.out; it has contract.out, exact.r",
        ),
        (lambda t: t.pop("inputs.weight"), f"{FILE} has no tensor inputs.weight"),
        (lambda t: t.update({"exact.extra": torch.zeros(1)}), f"{FILE} has tensors that stage rms_norm has not: exact.extra"),
        (
            lambda t: t.update({"contract.out": t["contract.out"].float()}),
            "must be torch.bfloat16 [3, 64], found torch.float32 [3, 64]",
        ),
        (lambda t: t.update({"exact.out": t["exact.out"].float()}), "must be torch.float64 [3, 64], found torch.float32 [3, 64]"),
        (
            lambda t: t.update({"inputs.x": t["inputs.x"].reshape(64, 3)}),
            "must be torch.bfloat16 [3, 64], found torch.bfloat16 [64, 3]",
        ),
        (lambda t: t["inputs.x"].neg_(), f"inputs.x of fixture file {FILE} is not the manifest's: sha256 must be"),
    ],
    ids=["renamed", "missing", "extra", "contract dtype", "exact dtype", "shape", "input's hash"],
)
def test_tensors_that_are_not_the_contracts_are_told(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], told: str
) -> None:
    rewrite(folder, change)
    assert told in refusal(folder)


# ------------------------------------------------------------------------------------------------------------- the builder


def test_building_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    builder.build(tmp_path)
    # Another hash seed: nothing may depend on the order of a set or of a hash map.
    code = "import sys, pathlib, conformance.fixtures.build as b; b.build(pathlib.Path(sys.argv[1]))"
    run_python(code, str(tmp_path / "again"), path=PACKAGE.parent, cwd=tmp_path)
    for path in tmp_path.glob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == sorted(f"{name}.safetensors" for name in NAMES)


def test_check_passes_what_was_just_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert builder.main(["--folder", str(tmp_path)]) == 0
    assert builder.main(["--check", "--folder", str(tmp_path)]) == 0
    count = len(NAMES)
    assert capsys.readouterr().out.endswith(f"{count} fixtures: as today's; {count} of {count} files the same byte for byte\n")


def test_check_tells_every_problem_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder.build(tmp_path)
    (tmp_path / FILE).write_bytes(b"")
    (tmp_path / "rope-long.safetensors").unlink()
    (tmp_path / "stray.safetensors").write_bytes(b"")
    edit_manifest(tmp_path, lambda manifest: manifest["fixtures"].pop("mlp-normal"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert builder.main(["--check", "--folder", str(tmp_path)]) == 1
    *problems, verdict = capsys.readouterr().out.splitlines()
    told = [
        "mlp-normal.safetensors is not in the",
        "stray.safetensors is not in the",
        f"{FILE} must have",
        "rope-long",
        "mlp-normal",
    ]
    assert len(problems) == len(told)
    for problem, part in zip(problems, told, strict=True):
        assert part in problem
    assert verdict == f"{len(NAMES)} fixtures: 5 problems; {len(NAMES) - 2} of {len(NAMES)} files the same byte for byte"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_check_without_a_manifest_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert builder.main(["--check", "--folder", str(tmp_path)]) == 1
    assert "manifest.json is missing" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ where they lie


def run_python(code: str, *arguments: str, path: Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONHASHSEED": "7"}
    completed = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_fixtures_load_where_the_package_is_no_folder(tmp_path: Path) -> None:
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in PACKAGE.glob("*.*"):
            packed.write(path, f"fixtures/{path.name}")
    code = (
        "import sys, conformance; conformance.__path__.insert(0, sys.argv[1]); "
        "from conformance import fixtures; print(fixtures.__file__); "
        "print([fixtures.load(n).name for n in fixtures.names()] and 'loaded')"
    )
    where, loaded = run_python(code, str(archive), path=Path(__file__).parents[2], cwd=tmp_path).splitlines()
    assert where.startswith(str(archive))
    assert loaded == "loaded"


def test_loading_twice_shares_no_tensor() -> None:
    first, second = load("rms_norm-normal"), load("rms_norm-normal")
    first.inputs["x"].zero_()
    assert compare(second) == []
