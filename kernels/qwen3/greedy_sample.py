"""Greedy sampling: the index of the largest logit."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


@kernel("qwen3/greedy_sample", name="greedy_sample", toolchain="pypto", capabilities=("variable_batch",))
def greedy_sample(dims: Dims) -> Any:
    """The index of every row's largest logit, the lowest one on a tie, chosen on the device.

    Nothing is rounded: fp32 logits are compared as they are, and column numbers are exact in fp32 (so ``V`` is below 2**24).
    A vector tile holds up to 8192 columns; a row's largest value and then its lowest column are reduced across them. The batch
    is read on the device: the rows in use are a valid shape of ``dims.B`` rows, the capacity. Any other dimensions.
    """
    import pypto

    from conformance.kernels.qwen3 import fragments

    B, V = dims.B, dims.V

    @pypto.frontend.jit()
    def greedy_sample(
        logits: pypto.Tensor([pypto.DYNAMIC, V], pypto.DT_FP32),
        token_ids: pypto.Tensor([pypto.DYNAMIC], pypto.DT_INT32),
    ):
        batch = logits.shape[0]
        chosen = fragments.first_largest(pypto.view(logits, [B, V], [0, 0], valid_shape=[batch, V]))
        pypto.assemble(pypto.reshape(chosen, [B], valid_shape=[batch]), [0], token_ids)

    return greedy_sample
