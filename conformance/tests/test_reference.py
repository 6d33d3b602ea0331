"""The reference's operations against torch's own rms_norm, attention and linear in float64, and its stages against one another.

Whole layers are held against two independent ones elsewhere: ``transformers`` and, in ``test_fixtures.py``, numpy.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name torch's documentation uses

import conformance
from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.numerics.arithmetic import CONTRACT, EXACT, SINGLE, RoundingSites
from conformance.numerics.ulp import distance

Tensor = torch.Tensor


def case_of(text: str) -> Case:
    return make_case(CaseKey.parse(text))


def exact(case: Case) -> dict[str, Tensor]:
    return case.stage.reference(case.inputs, case.dims, EXACT)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12)


def rotated(x: Tensor, positions: Tensor, dims: conformance.Dims) -> Tensor:
    """RoPE of ``x [B, heads, D]`` as a product of complex numbers, angles by their formula."""
    half = dims.D // 2
    angle = positions.double().view(-1, 1, 1) * dims.theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("preset", ["tiny", "narrow"])
@pytest.mark.parametrize("regime", ["normal", "small", "outlier"])
def test_rms_norm(preset: str, regime: str) -> None:
    case = case_of(f"rms_norm:{preset}:B=5:{regime}:1")
    x, weight = case.inputs["x"].double(), case.inputs["weight"][0].double()
    assert_same(exact(case)["out"], F.rms_norm(x, (case.dims.H,), weight, case.dims.eps))


def test_qkv_proj_and_o_proj_and_mlp() -> None:
    case = case_of("qkv_proj:narrow:B=3:normal:1")
    for name in ("q", "k", "v"):
        assert_same(exact(case)[name], F.linear(case.inputs["x"].double(), case.inputs["w" + name].double().T))
    case = case_of("o_proj:narrow:B=3:normal:1")
    attn, wo, residual = (case.inputs[name].double() for name in ("attn", "wo", "residual"))
    assert_same(exact(case)["out"], F.linear(attn, wo.T) + residual)
    case = case_of("mlp:narrow:B=3:normal:1")
    x, gate, up, down = (case.inputs[name].double() for name in ("x", "w_gate", "w_up", "w_down"))
    assert_same(exact(case)["out"], F.linear(F.silu(x @ gate) * (x @ up), down.T))


def test_qk_norm() -> None:
    case = case_of("qk_norm:narrow:B=3:heavy_tail:1")
    for name in ("q", "k"):
        heads = case.inputs[name].double().reshape(case.dims.B, -1, case.dims.D)
        expected = F.rms_norm(heads, (case.dims.D,), case.inputs[f"{name}_norm_weight"][0].double(), case.dims.eps)
        assert_same(exact(case)[f"{name}_out"], expected.flatten(1))


@pytest.mark.parametrize("preset", ["tiny", "narrow"])
def test_rope(preset: str) -> None:
    case = case_of(f"rope:{preset}:B=4,seq_lens=1+2+17+76:normal:1")
    for name in ("q", "k"):
        heads = case.inputs[name].double().reshape(case.dims.B, -1, case.dims.D)
        expected = rotated(heads, case.inputs["seq_lens"] - 1, case.dims).flatten(1)
        # The tables are fp32: the formula agrees to fp32's precision.
        assert torch.allclose(exact(case)[f"{name}_out"], expected, rtol=0, atol=1e-6)


def test_kv_write_writes_the_slots_and_nothing_else() -> None:
    case = case_of("kv_write:narrow:B=3,NB=14,seq_lens=8+9+76:normal:1")
    dims = case.dims
    results = case.stage.reference(case.inputs, dims, CONTRACT)
    for name in ("k", "v"):
        expected = case.inputs[f"{name}_cache"].view(dims.NB, dims.NKV, dims.BS, dims.D).clone()
        for b, slot in enumerate(case.inputs["slot_mapping"].tolist()):
            expected[slot // dims.BS, :, slot % dims.BS] = case.inputs[name][b].view(dims.NKV, dims.D).bfloat16()
        found = results[f"{name}_cache"].bfloat16()
        assert torch.allclose(found, expected.view(-1, dims.D), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("regime", ["normal", "needle", "big", "length_one"])
def test_attention(regime: str) -> None:
    lengths = "1+1+1" if regime == "length_one" else "1+17+76"
    case = case_of(f"attention:narrow:B=3,seq_lens={lengths}:{regime}:1")
    assert_same(exact(case)["out"], attention(case))


def attention(case: Case) -> Tensor:
    dims = case.dims
    keys, values = (case.inputs[f"{name}_cache"].double().view(dims.B, dims.NKV, dims.S, dims.D) for name in ("k", "v"))
    query = case.inputs["q"].double().view(dims.B, dims.NH, 1, dims.D)
    seen = torch.arange(dims.S) < case.inputs["seq_lens"].view(-1, 1, 1, 1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True).reshape(dims.B, dims.NH * dims.D)


# -- pages, chunks and heads ----------------------------------------------------------------------------------------------------


def gathered(case: Case, name: str, layer: int = 0) -> Tensor:
    """One layer of a paged cache as ``[B, NKV, MB * BS, D]`` in float64, page by page; zeros where the table has no page."""
    dims = case.dims
    pages = case.inputs[name].double().view(dims.L, dims.NB, dims.NKV, dims.BS, dims.D)[layer]
    table = case.inputs["block_table"].view(dims.B, dims.MB)
    rows = torch.zeros(dims.B, dims.NKV, dims.MB * dims.BS, dims.D, dtype=torch.float64)
    for b in range(dims.B):
        for index, page in enumerate(table[b].tolist()):
            if page >= 0:
                rows[b, :, index * dims.BS : (index + 1) * dims.BS] = pages[page]
    return rows


@pytest.mark.parametrize("regime", ["normal", "needle", "big"])
@pytest.mark.parametrize("preset", ["tiny", "narrow"])
def test_paged_attention(preset: str, regime: str) -> None:
    case = case_of(f"paged_attention:{preset}:B=4,NB=30,seq_lens=1+16+17+76:{regime}:1")
    dims = case.dims
    query = case.inputs["q"].double().view(dims.B, dims.NH, 1, dims.D)
    seen = torch.arange(dims.MB * dims.BS) < case.inputs["seq_lens"].view(-1, 1, 1, 1)
    keys, values = gathered(case, "k_cache"), gathered(case, "v_cache")
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)
    assert_same(exact(case)["out"], expected.reshape(dims.B, dims.NH * dims.D))


@pytest.mark.parametrize("regime", ["normal", "small"])
@pytest.mark.parametrize("preset", ["tiny", "narrow"])
def test_lm_head(preset: str, regime: str) -> None:
    case = case_of(f"lm_head:{preset}:B=3:{regime}:1")
    assert_same(exact(case)["logits"], head_of(case, case.inputs["hidden"].double()))


def head_of(case: Case, hidden: Tensor) -> Tensor:
    normalised = F.rms_norm(hidden, (case.dims.H,), case.inputs["final_norm_weight"][0].double(), case.dims.eps)
    return F.linear(normalised, case.inputs["lm_head_weight"].double())


@pytest.mark.parametrize("regime", ["normal", "ties", "near_ties", "edges", "negative", "big", "constant"])
def test_greedy_sample(regime: str) -> None:
    case = case_of(f"greedy_sample:narrow:B=6:{regime}:1")
    logits = case.inputs["logits"]
    lowest = [row.index(max(row)) for row in logits.tolist()]  # the first of equals
    assert exact(case)["token_ids"].tolist() == lowest == logits.numpy().argmax(-1).tolist()
    several = bool(((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).any())
    assert several is (regime in ("ties", "constant"))


def with_other_inputs(case: Case, stage: str, inputs: dict[str, Tensor], **dims: int) -> Case:
    other = conformance.stages()[stage]
    return Case(case.key, other, case.dims.replace(**dims), {argument.name: inputs[argument.name] for argument in other.inputs})


def as_contiguous(case: Case) -> dict[str, Tensor]:
    """A paged case's inputs with contiguous caches of the same histories."""
    dims = case.dims
    caches = {
        name: torch.stack([gathered(case, name, layer)[:, :, : dims.S] for layer in range(dims.L)]).reshape(-1, dims.D)
        for name in ("k_cache", "v_cache")
    }
    return {**case.inputs, **caches}


@pytest.mark.parametrize(
    ("text", "contiguous"),
    [
        ("paged_decode_layer:tiny:B=3,NB=12,seq_lens=1+17+128:normal:2", "decode_layer"),
        ("paged_decode_layer:narrow:B=3,NB=20,seq_lens=8+76+9:needle:1", "decode_layer"),
        ("paged_decode_fwd:tiny:B=3,L=2,NB=12,seq_lens=1+17+128:normal:2", "decode_fwd"),
        ("paged_decode_fwd:narrow:B=2,L=3,NB=20,seq_lens=16+76:small:1", "decode_fwd"),
    ],
)
def test_a_step_over_pages_is_the_step_over_contiguous_histories(text: str, contiguous: str) -> None:
    """The one over contiguous caches is held against ``transformers``, and against numpy in ``test_fixtures.py``."""
    case = case_of(text)
    dims = case.dims
    flat = with_other_inputs(case, contiguous, as_contiguous(case))
    paged, expected = exact(case), exact(flat)
    result = case.stage.outputs[-1].name
    assert_same(paged[result], expected[result])
    for name in ("k_cache", "v_cache"):
        after = Case(case.key, case.stage, dims, {**case.inputs, name: paged[name]})
        rows = expected[name].view(dims.L, dims.B, dims.NKV, dims.S, dims.D)
        for layer in range(dims.L):
            for b, length in enumerate(case.key.seq_lens):
                assert_same(gathered(after, name, layer)[b, :, :length], rows[layer, b, :, :length])
        slots = case.inputs["slot_mapping"].tolist()
        written = {slot // dims.BS: slot % dims.BS for slot in slots}
        before = case.inputs[name].double().view(dims.L, dims.NB, dims.NKV, dims.BS, dims.D)
        kept = paged[name].view_as(before).clone()
        for page, offset in written.items():
            kept[:, page, :, offset] = before[:, page, :, offset]
        assert torch.equal(kept.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(
    "text", ["decode_fwd:tiny:B=3,L=2,seq_lens=1+17+128:normal:1", "decode_fwd:narrow:B=2,L=3,seq_lens=9+76:small:1"]
)
def test_a_whole_step_is_its_layers_and_the_head(text: str) -> None:
    case = case_of(text)
    layers = exact(with_other_inputs(case, "decode_fwd_layers", case.inputs))
    assert_same(exact(case)["logits"], head_of(case, layers["out"]))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(exact(case)[name], layers[name])


PREFILLS = (
    "prefill_layer:tiny:B=3,NB=13,seq_lens=5+33+128,chunk_lens=5+18+1:normal:1",
    "prefill_layer:narrow:B=4,NB=20,seq_lens=8+76+9+17,chunk_lens=1+13+9+10:mixed_rows:2",
    "prefill_layer:narrow:B=2,NB=20,seq_lens=40+24,chunk_lens=16+8:needle:3",
)


@pytest.mark.parametrize("text", PREFILLS)
def test_a_chunk_is_its_tokens_one_after_another(text: str) -> None:
    """Each a decode step of one sequence alone: what the step before wrote is in the cache, what comes later is not."""
    case = case_of(text)
    dims, found = case.dims, exact(case)
    caches = {name: case.inputs[name].double() for name in ("k_cache", "v_cache")}
    table = case.inputs["block_table"].view(dims.B, dims.MB)
    starts = case.inputs["chunk_offsets"].tolist()
    seen = 0
    for b, (length, count, start) in enumerate(zip(case.key.seq_lens, case.key.chunk_lens, starts, strict=True)):
        for index in range(count):
            token = start + index
            inputs = {
                **case.inputs,
                **caches,
                "hidden_states": case.inputs["hidden_states"][token : token + 1],
                "seq_lens": torch.tensor([length - count + index + 1], dtype=torch.int32),
                "block_table": table[b],
                "slot_mapping": case.inputs["slot_mapping"][token : token + 1],
            }
            step = exact(with_other_inputs(case, "paged_decode_layer", inputs, B=1, T=1))
            assert_same(found["out"][token], step["out"][0])
            caches = {name: step[name] for name in caches}
            seen += 1
    assert seen == dims.T
    for name, cache in caches.items():
        assert torch.allclose(found[name], cache, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_a_prefill_of_one_token_a_sequence_is_a_decode_step() -> None:
    case = case_of("prefill_fwd:narrow:B=3,L=2,NB=20,seq_lens=1+17+76,chunk_lens=1+1+1:normal:1")
    order = case.inputs["chunk_offsets"].long()
    assert order.tolist() != [0, 1, 2]
    packed = {name: case.inputs[name][order] for name in ("hidden_states", "slot_mapping")}
    step = exact(with_other_inputs(case, "paged_decode_fwd", {**case.inputs, **packed}, T=1))
    found = exact(case)
    for name in ("k_cache", "v_cache", "logits"):
        assert torch.allclose(found[name], step[name], rtol=1e-11, atol=1e-12, equal_nan=True)


def test_a_prefill_in_two_chunks_is_one_prefill() -> None:
    """The second chunk starts from the caches that the first one left, in every layer."""
    case = case_of("prefill_fwd:tiny:B=2,L=2,NB=9,seq_lens=21+40,chunk_lens=21+17:normal:1")
    lengths, chunks = torch.tensor(case.key.seq_lens), torch.tensor(case.key.chunk_lens)
    starts = case.inputs["chunk_offsets"].long()
    first_part = torch.tensor([7, 16])
    caches: dict[str, Tensor] = {}
    for done, new in ((0 * first_part, first_part), (first_part, chunks - first_part)):
        tokens = torch.cat(
            [torch.arange(int(count)) + start + before for count, start, before in zip(new, starts, done, strict=True)]
        )
        inputs = {
            **case.inputs,
            **caches,
            "hidden_states": case.inputs["hidden_states"][tokens],
            "slot_mapping": case.inputs["slot_mapping"][tokens],
            "seq_lens": (lengths - chunks + done + new).int(),
            "chunk_lens": new.int(),
            "chunk_offsets": torch.tensor([0, int(new[0])], dtype=torch.int32),
        }
        part = exact(with_other_inputs(case, "prefill_fwd", inputs, T=len(tokens)))
        caches = {name: part[name] for name in ("k_cache", "v_cache")}
    found = exact(case)
    assert_same(found["logits"], part["logits"])
    for name, cache in caches.items():
        assert torch.allclose(found[name], cache, rtol=1e-11, atol=1e-12, equal_nan=True)


# -- roundings ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", list(conformance.stages()))
def test_fp32_and_float64_agree_up_to_rounding(stage: str) -> None:
    from conformance.cases.space import Space, stratified_keys

    case = make_case(next(stratified_keys(Space.of(conformance.stages()[stage], "narrow"), 1)))
    single, double = (case.stage.reference(case.inputs, case.dims, arithmetic) for arithmetic in (SINGLE, CONTRACT))
    for name in (argument.name for argument in case.stage.outputs):
        assert single[name].dtype == torch.float32
        error = (single[name].double() - double[name]).nan_to_num().norm() / double[name].nan_to_num().norm()
        assert float(error) < 2e-2


def test_the_contracts_roundings_are_on_the_bf16_grid() -> None:
    case = case_of("decode_layer:tiny:B=2,seq_lens=5+9:normal:1")
    results = case.stage.reference(case.inputs, case.dims, CONTRACT)
    for name in ("k_cache", "v_cache", "out"):
        assert torch.equal(results[name], results[name].bfloat16().double())
    unrounded = exact(case)["out"]
    assert 0 < float(distance(results["out"], unrounded, torch.bfloat16).median()) < 8


def test_rounding_sites_leave_the_value_alone_and_have_gradients() -> None:
    case = case_of("decode_layer:tiny:B=2,seq_lens=5+9:normal:1")
    arithmetic = RoundingSites(case.stage.profiles[0].roundings)
    results = case.stage.reference(case.inputs, case.dims, arithmetic)
    assert torch.allclose(results["out"].double(), exact(case)["out"], rtol=1e-3, atol=1e-3)
    gradients = torch.autograd.grad(results["out"].sum(), [zero for zero, _, _ in arithmetic.sites], allow_unused=True)
    reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert len(reached) > 10
    assert sum(reached) >= len(reached) - 4  # the new key's and value's own casts reach out through attention only
