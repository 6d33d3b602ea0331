"""The faults of the torch kernels, by topic; importing this declares all of them."""

from kernels.qwen3.exam.torch.faults import (
    arguments as arguments,
)
from kernels.qwen3.exam.torch.faults import (
    attention as attention,
)
from kernels.qwen3.exam.torch.faults import (
    cache as cache,
)
from kernels.qwen3.exam.torch.faults import (
    casts as casts,
)
from kernels.qwen3.exam.torch.faults import (
    layers as layers,
)
from kernels.qwen3.exam.torch.faults import (
    logits as logits,
)
from kernels.qwen3.exam.torch.faults import (
    memory as memory,
)
from kernels.qwen3.exam.torch.faults import (
    mlp as mlp,
)
from kernels.qwen3.exam.torch.faults import (
    norms as norms,
)
from kernels.qwen3.exam.torch.faults import (
    positions as positions,
)
from kernels.qwen3.exam.torch.faults import (
    products as products,
)
from kernels.qwen3.exam.torch.faults import (
    results as results,
)
from kernels.qwen3.exam.torch.faults import (
    robustness as robustness,
)
from kernels.qwen3.exam.torch.faults import (
    rope as rope,
)
from kernels.qwen3.exam.torch.faults import (
    sampling as sampling,
)
from kernels.qwen3.exam.torch.faults import (
    state as state,
)
from kernels.qwen3.exam.torch.hooks import FAULTS as FAULTS
