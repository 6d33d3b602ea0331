"""The faults of the torch kernels, by topic; importing this declares all of them."""

from conformance.kernels.qwen3.exam.torch.faults import (
    arguments as arguments,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    attention as attention,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    cache as cache,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    casts as casts,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    layers as layers,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    logits as logits,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    memory as memory,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    mlp as mlp,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    norms as norms,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    positions as positions,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    products as products,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    results as results,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    robustness as robustness,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    rope as rope,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    sampling as sampling,
)
from conformance.kernels.qwen3.exam.torch.faults import (
    state as state,
)
from conformance.kernels.qwen3.exam.torch.hooks import FAULTS as FAULTS
