"""Ways to lose the hidden states between the layers of a fused decode: the bundled kernel, each with one line changed.

A loop's carried tensor must be written in place (``hidden[:] = ...``), before the loop and in every trip. PyPTO compiles all of
these. It interprets all but ``carry_never_written`` without a word. These are texts of their own and not edits of fragments,
since what is wrong with most of them is how PyPTO's parser reads the body of a loop.
"""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel, kernel
from conformance.exam.known_kernels import Kind
from conformance.kernels.qwen3.exam.pypto.weaving import faulty

CAPABILITIES = ("stacked_weights", "fused_layers")


def _program(dims: Dims, fault: str) -> Any:
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, D, I, S, L = dims.B, dims.H, dims.D, dims.I, dims.S, dims.L  # noqa: E741  the contract's symbol
    NKV, Q, KV = dims.NKV, dims.NH * dims.D, dims.NKV * dims.D
    trips = max(L - 1, 1) if fault == "last_layer_dropped" else L

    # PyPTO parses the text below and decides the comparisons with `fault` while it traces: one branch is left of each.
    @pypto.frontend.jit()
    def decode_fwd_layers(
        hidden_states: pypto.Tensor([B, H], pypto.DT_BF16),
        input_rms_weight: pypto.Tensor([L, H], pypto.DT_FP32),
        wq: pypto.Tensor([L * H, Q], pypto.DT_BF16),
        wk: pypto.Tensor([L * H, KV], pypto.DT_BF16),
        wv: pypto.Tensor([L * H, KV], pypto.DT_BF16),
        q_norm_weight: pypto.Tensor([L, D], pypto.DT_FP32),
        k_norm_weight: pypto.Tensor([L, D], pypto.DT_FP32),
        wo: pypto.Tensor([L * Q, H], pypto.DT_BF16),
        w_gate: pypto.Tensor([L * H, I], pypto.DT_BF16),
        w_up: pypto.Tensor([L * H, I], pypto.DT_BF16),
        w_down: pypto.Tensor([L * I, H], pypto.DT_BF16),
        post_rms_weight: pypto.Tensor([L, H], pypto.DT_FP32),
        seq_lens: pypto.Tensor([B], pypto.DT_INT32),
        rope_cos: pypto.Tensor([S, D], pypto.DT_FP32),
        rope_sin: pypto.Tensor([S, D], pypto.DT_FP32),
        k_cache: pypto.Tensor([L * B * NKV * S, D], pypto.DT_BF16),
        v_cache: pypto.Tensor([L * B * NKV * S, D], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        weights = fragments.LayerWeights(
            input_rms_weight, wq, wk, wv, q_norm_weight, k_norm_weight, wo, w_gate, w_up, w_down, post_rms_weight
        )
        fragments.set_vector_tiles(B, H)
        hidden = pypto.tensor([B, H], pypto.DT_BF16, "hidden")
        if fault != "carry_never_written":
            hidden[:] = pypto.mul(hidden_states, 1.0)
        for layer in pypto.loop(trips, name="LAYER", idx_name="layer"):
            source = hidden
            if fault == "carry_reads_first_input":
                source = hidden_states
            result = fragments.decode_layer(source, weights, seq_lens, rope_cos, rope_sin, k_cache, v_cache, dims, layer)
            if fault == "carry_rebound":
                hidden = result
            elif fault == "carry_half_written":
                pypto.assemble(pypto.view(result, [B, H // 2], [0, 0]), [0, 0], hidden)
            else:
                hidden[:] = result
        fragments.set_vector_tiles(B, H)
        out[:] = pypto.mul(hidden, 1.0)

    return decode_fwd_layers


@kernel("qwen3/decode_fwd_layers", name="carry_rebound", toolchain="pypto", capabilities=CAPABILITIES)
def carry_rebound(dims: Dims) -> Any:
    """``hidden = ...`` in the loop names another tensor: every layer reads the first input; the last one's result is out."""
    return _program(dims, "carry_rebound")


@kernel("qwen3/decode_fwd_layers", name="carry_reads_first_input", toolchain="pypto", capabilities=CAPABILITIES)
def carry_reads_first_input(dims: Dims) -> Any:
    """The carry is written but never read: every layer takes ``hidden_states``."""
    return _program(dims, "carry_reads_first_input")


@kernel("qwen3/decode_fwd_layers", name="carry_half_written", toolchain="pypto", capabilities=CAPABILITIES)
def carry_half_written(dims: Dims) -> Any:
    """Only the first half of the columns is carried; the second half of ``hidden`` stays the first input."""
    return _program(dims, "carry_half_written")


@kernel("qwen3/decode_fwd_layers", name="carry_never_written", toolchain="pypto", capabilities=CAPABILITIES)
def carry_never_written(dims: Dims) -> Any:
    """Nothing is written to the carry before the first layer reads it: PyPTO compiles it, its interpreter refuses."""
    return _program(dims, "carry_never_written")


@kernel("qwen3/decode_fwd_layers", name="last_layer_dropped", toolchain="pypto")
def last_layer_dropped(dims: Dims) -> Any:
    """The loop ends one layer early."""
    return _program(dims, "last_layer_dropped")


#: Every one of them, with the name of the fault, and its kind where no torch kernel has it.
_PROGRAMS: tuple[tuple[Kernel, str, Kind | None], ...] = (
    (carry_rebound, "carry_rebound", "dependency"),
    (carry_reads_first_input, "carried_state_ignored", None),
    (carry_half_written, "carry_half_written", "dependency"),
    (carry_never_written, "carry_never_written", "dependency"),
    (last_layer_dropped, "last_layer_dropped", None),
)
for _kernel, _name, _kind in _PROGRAMS:
    faulty.add(
        _kernel,
        name=_name,
        hook="text",
        function=_kernel.function,
        kind=_kind,
        detectors=("raised",) if _name == "carry_never_written" else (),
    )
