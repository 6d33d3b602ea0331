"""PyPTO kernels with a known fault, each the bundled one with one thing done wrong; by topic."""

from kernels.qwen3.exam.pypto.faults import (
    attention as attention,
)
from kernels.qwen3.exam.pypto.faults import (
    cache as cache,
)
from kernels.qwen3.exam.pypto.faults import (
    layers as layers,
)
from kernels.qwen3.exam.pypto.faults import (
    logits as logits,
)
from kernels.qwen3.exam.pypto.faults import (
    lost_carry as lost_carry,
)
from kernels.qwen3.exam.pypto.faults import (
    norms as norms,
)
from kernels.qwen3.exam.pypto.faults import (
    products as products,
)
from kernels.qwen3.exam.pypto.faults import (
    rope as rope,
)
from kernels.qwen3.exam.pypto.faults import (
    unwritten_reads as unwritten_reads,
)
