"""PyPTO kernels with a known fault, each the bundled one with one thing done wrong; by topic."""

from conformance.kernels.qwen3.exam.pypto.faults import (
    attention as attention,
)
from conformance.kernels.qwen3.exam.pypto.faults import (
    cache as cache,
)
from conformance.kernels.qwen3.exam.pypto.faults import (
    layers as layers,
)
from conformance.kernels.qwen3.exam.pypto.faults import (
    logits as logits,
)
from conformance.kernels.qwen3.exam.pypto.faults import (
    lost_carry as lost_carry,
)
from conformance.kernels.qwen3.exam.pypto.faults import (
    norms as norms,
)
from conformance.kernels.qwen3.exam.pypto.faults import (
    products as products,
)
from conformance.kernels.qwen3.exam.pypto.faults import (
    rope as rope,
)
from conformance.kernels.qwen3.exam.pypto.faults import (
    unwritten_reads as unwritten_reads,
)
