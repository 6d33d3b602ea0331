"""PyPTO kernels that take their process down, between two good ones: each is its own finding, and the others' results come."""

# The annotations of a jit function describe tensors; they are not types.
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

import ctypes
import os
from typing import Any

from conformance.contract import Dims
from conformance.declaration import kernel


def _good(dims: Dims) -> Any:
    from kernels.qwen3.rms_norm import rms_norm

    return rms_norm.build(dims)


@kernel("rms_norm", name="good_before", toolchain="pypto")
def good_before(dims: Dims) -> Any:
    """The bundled kernel."""
    return _good(dims)


@kernel("rms_norm", name="segfaults", toolchain="pypto")
def segfaults(dims: Dims) -> Any:
    """Its builder reads address 0."""
    ctypes.string_at(0)


@kernel("rms_norm", name="aborts", toolchain="pypto")
def aborts(dims: Dims) -> Any:
    """Its builder ends the process as a failed assertion in native code does."""
    os.abort()


@kernel("rms_norm", name="never_ends", toolchain="pypto")
def never_ends(dims: Dims) -> Any:
    """Its builder loops for ever."""
    while True:
        pass


@kernel("rms_norm", name="raises", toolchain="pypto")
def raises(dims: Dims) -> Any:
    """Its builder raises."""
    raise ValueError("no tile fits")


@kernel("rms_norm", name="good_after", toolchain="pypto")
def good_after(dims: Dims) -> Any:
    """The bundled kernel again."""
    return _good(dims)
