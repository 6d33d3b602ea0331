"""Kernels whose verdict is known: faults that must be found and legal variants that must pass, in torch and in PyPTO."""

from conformance.exam.known_kernels import KnownKernel
from kernels.qwen3.exam.pypto import faults, lost_carry, variants
from kernels.qwen3.exam.torch.catalogue import torch_subjects

KNOWN_KERNELS: tuple[KnownKernel, ...] = (
    *torch_subjects(),
    *faults.exam.subjects,
    *lost_carry.exam.subjects,
    *variants.exam.subjects,
)
