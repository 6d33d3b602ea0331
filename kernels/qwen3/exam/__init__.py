"""Kernels whose verdict is known: faults that must be found and legal variants that must pass, in torch and in PyPTO."""

from conformance.exam.known_kernels import KnownKernel
from conformance.kernels.qwen3.exam.pypto import faults as faults
from conformance.kernels.qwen3.exam.pypto import variants as variants
from conformance.kernels.qwen3.exam.pypto.weaving import faulty, legal
from conformance.kernels.qwen3.exam.torch.catalogue import torch_kernels

KNOWN_KERNELS: tuple[KnownKernel, ...] = (*torch_kernels(), *faulty.known, *legal.known)
