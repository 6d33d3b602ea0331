"""Torch kernels made of the reference in fp32, whose inputs and outputs a test may spoil: what declarations are examined with.

The values are right by construction; what is in question is how a kernel is called. Kernels written apart from the reference
are in ``kernels.py``.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel, kernel
from conformance.contract.registry import Model
from conformance.contract.stage import Stage
from conformance.lanes import reference_lock
from conformance.numerics.arithmetic import SINGLE, Arithmetic

Tensor = torch.Tensor
#: Changes the tensors of a call by name, before or after the result is computed.
Spoil = Callable[[dict[str, Tensor], Dims], None]

#: Two heads that share a KV head, five pages a sequence.
SMALL: dict[str, Any] = {"NH": 2, "NKV": 1, "D": 16, "I": 32, "V": 24, "S": 40, "BS": 8}


@functools.cache
def contract_of(stage: str) -> Stage:
    """The contract as whoever judges has it. In a kernel's process the reference is locked away; here the lock is picked."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != reference_lock.__name__]
    model: Model = importlib.import_module("conformance.kernels.qwen3.contract").MODEL
    return next(one for one in model.stages if stage in (one.name, one.id))


def compute(
    stage: str,
    arguments: Sequence[Tensor],
    dims: Dims,
    *,
    before: Spoil | None = None,
    after: Spoil | None = None,
    arithmetic: Callable[[dict[str, Tensor]], Arithmetic] | None = None,
) -> None:
    """What a kernel of ``stage`` does with its arguments.

    ``before`` sees copies of the inputs, ``after`` the outputs themselves beside the inputs; ``arithmetic`` chooses the
    arithmetic from the inputs.
    """
    contract = contract_of(stage)
    tensors = dict(zip((argument.name for argument in contract.arguments), arguments, strict=True))
    inputs = {argument.name: tensors[argument.name].clone() for argument in contract.inputs}
    if before is not None:
        before(inputs, dims)
    results = contract.reference(inputs, dims, SINGLE if arithmetic is None else arithmetic(inputs))
    for argument in contract.outputs:
        target, found = tensors[argument.name], results[argument.name].to(argument.dtype)
        if argument.access == "io":
            # Rows that the call does not write keep their bits, NaN payloads too.
            changed = ~((found == target) | (found.isnan() & target.isnan()))
            target[changed] = found[changed]
        else:
            target.copy_(found)
    if after is not None:
        after(tensors, dims)


def reference_kernel(
    stage: str,
    capabilities: Sequence[str] = (),
    *,
    before: Spoil | None = None,
    after: Spoil | None = None,
    arithmetic: Callable[[dict[str, Tensor]], Arithmetic] | None = None,
    **declared: Any,
) -> Kernel:
    """A kernel of ``stage`` as ``compute`` makes it; ``declared`` goes to ``conformance.kernel``."""

    def run(*arguments: Tensor, dims: Dims) -> None:
        compute(stage, arguments, dims, before=before, after=after, arithmetic=arithmetic)

    return kernel(stage, name=declared.pop("name", stage), capabilities=capabilities, **declared)(run)
