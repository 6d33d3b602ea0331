"""Final norm and vocabulary projection."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/lm_head", name="lm_head", toolchain="pypto", capabilities=("variable_batch",), profile="contract")
def lm_head(dims: Dims) -> Any:
    """``bf16(rn(hidden, final_norm_weight)) @ lm_head_weight.T``: logits of the whole vocabulary, in fp32.

    The norm is fp32 until its one cast to bf16; the product accumulates in fp32 and is not rounded. The batch is read on the
    device: the rows in use are a valid shape of a tile of ``dims.B`` rows, the capacity. The cube tile takes all rows and 256
    columns of the vocabulary. Any dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, H, V = dims.B, dims.H, dims.V

    @pypto.frontend.jit()
    def lm_head(
        hidden: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
        final_norm_weight: pypto.Tensor([1, H], pypto.DT_FP32),
        lm_head_weight: pypto.Tensor([V, H], pypto.DT_BF16),
        logits: pypto.Tensor([pypto.DYNAMIC, V], pypto.DT_FP32),
    ):
        used = pypto.view(hidden, [B, H], [0, 0], valid_shape=[hidden.shape[0], H])
        pypto.assemble(fragments.lm_head(used, final_norm_weight, lm_head_weight, dims), [0, 0], logits)

    return lm_head
