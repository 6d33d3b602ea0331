"""PyPTO kernels with a fault of a norm."""

from __future__ import annotations

from typing import Any

from conformance.contract.dims import Dims
from conformance.kernels.qwen3.exam.pypto.weaving import faulty

Tensor = Any


@faulty.edits("rms_norm", "lm_head", "decode_layer")
def missing_gamma(fragments: Any) -> None:
    """The norm is right but for its weight, which is left out."""
    pypto, right = fragments.pypto, fragments.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, pypto.add(pypto.mul(weight, 0.0), 1.0), eps)

    fragments.rms_norm = rms_norm


@faulty.edits("rms_norm", "qk_norm", "lm_head", name="eps_1e-5")
def eps_1e_5(fragments: Any) -> None:
    """eps is 1e-5, another model's."""
    right = fragments.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return right(x, weight, 1e-5)

    fragments.rms_norm = rms_norm


@faulty.edits("rms_norm")
def gain(fragments: Any) -> None:
    """Everything is half a percent too large."""
    pypto, right = fragments.pypto, fragments.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return pypto.mul(right(x, weight, eps), 1.005)

    fragments.rms_norm = rms_norm


@faulty.edits("rms_norm")
def echo(fragments: Any) -> None:
    """The input is copied to the output."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x

    fragments.rms_norm = rms_norm


@faulty.edits("rms_norm")
def squares_in_bf16(fragments: Any) -> None:
    """The squares are rounded to bf16 before they are added up."""
    pypto = fragments.pypto

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        narrow = pypto.cast(pypto.cast(pypto.mul(x, x), pypto.DT_BF16), pypto.DT_FP32)
        mean_square = pypto.sum(pypto.mul(narrow, 1.0 / x.shape[-1]), -1, True)
        return pypto.mul(pypto.div(x, pypto.sqrt(pypto.add(mean_square, eps))), weight)

    fragments.rms_norm = rms_norm


@faulty.edits("rms_norm", kind="precision")
def norm_in_bf16(fragments: Any) -> None:
    """The cast to fp32 is forgotten: the whole norm is computed in bf16."""
    pypto, right = fragments.pypto, fragments.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        narrow = right(pypto.cast(x, pypto.DT_BF16), pypto.cast(weight, pypto.DT_BF16), eps)
        return pypto.cast(narrow, pypto.DT_FP32)

    fragments.rms_norm = rms_norm


@faulty.computes("rms_norm", kind="precision")
def cast_to_whole_numbers(fragments: Any, x: Tensor, weight: Tensor, out: Tensor, dims: Dims) -> None:
    """The last cast has mode CAST_TRUNC, which takes the fraction away."""
    pypto = fragments.pypto
    fragments.set_vector_tiles(dims.B, dims.H)
    normalised = fragments.rms_norm(pypto.cast(x, pypto.DT_FP32), weight, dims.eps)
    out[:] = pypto.cast(normalised, pypto.DT_BF16, pypto.CastMode.CAST_TRUNC)


@faulty.edits("rms_norm", "lm_head")
def row0_scale(fragments: Any) -> None:
    """Every row is divided by the first row's root mean square."""
    pypto = fragments.pypto

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = pypto.sum(pypto.mul(pypto.mul(x, x), 1.0 / x.shape[-1]), -1, True)
        root = pypto.sqrt(pypto.add(pypto.view(mean_square, [1, 1], [0, 0]), eps))
        return pypto.mul(pypto.div(x, pypto.expand_clone(root, [x.shape[0], 1])), weight)

    fragments.rms_norm = rms_norm


@faulty.edits("qk_norm")
def normalised_by_row(fragments: Any) -> None:
    """The mean is taken over all heads of a row instead of over each."""
    pypto, right = fragments.pypto, fragments.rms_norm

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        heads = x.shape[1] // dims.D
        fragments.set_vector_tiles(dims.B, heads * dims.D)
        return right(x, pypto.concat([weight] * heads, -1), dims.eps)

    fragments.norm_heads = norm_heads


@faulty.edits("qk_norm")
def q_weight_for_k(fragments: Any) -> None:
    """Keys are normalised with the queries' weight."""
    right, of_queries = fragments.norm_heads, [None]

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        if x.shape[1] == dims.NH * dims.D:
            of_queries[0] = weight
        return right(x, of_queries[0], dims)

    fragments.norm_heads = norm_heads


@faulty.edits("decode_layer", "paged_decode_layer")
def q_norm_missing(fragments: Any) -> None:
    """The queries' heads are not normalised."""
    right = fragments.norm_heads

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        return x if x.shape[1] == dims.NH * dims.D else right(x, weight, dims)

    fragments.norm_heads = norm_heads


@faulty.edits("decode_layer")
def k_norm_missing(fragments: Any) -> None:
    """The keys' heads are not normalised."""
    right = fragments.norm_heads

    def norm_heads(x: Tensor, weight: Tensor, dims: Dims) -> Tensor:
        return right(x, weight, dims) if x.shape[1] == dims.NH * dims.D else x

    fragments.norm_heads = norm_heads
