"""Torch kernels of ``rms_norm``: a right one, and ones that take their process down or hold it up."""

import ctypes
import time

import torch

from conformance.contract.kernel import kernel


def plain(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, dims: object = None) -> None:
    """Right, and not decorated."""
    wide = x.float()
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight)


right = kernel("rms_norm", name="right_in_torch")(plain)


@kernel("rms_norm")
def raises(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Raises."""
    raise ZeroDivisionError("of course")


@kernel("rms_norm")
def segfaults(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Reads address 0."""
    ctypes.string_at(0)


@kernel("rms_norm")
def sleeps(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Sleeps for an hour, holding on to the interpreter as a native call does."""
    ctypes.PyDLL(None).sleep(3600)
    time.sleep(3600)
