"""Conformance harness for decode kernels: is it right, and if not, where and why.

>>> report = conformance.check("rms_norm", my_rms_norm)
>>> report.ok, report.findings
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Dims", "Finding", "Kernel", "Report", "UsageError", "check", "kernel", "stages"]

_HOMES = {
    "Dims": "conformance.contract.dims",
    "Finding": "conformance.judge.verdict",
    "Kernel": "conformance.contract.kernel",
    "Report": "conformance.running.check",
    "UsageError": "conformance.errors",
    "check": "conformance.running.check",
    "kernel": "conformance.contract.kernel",
    "stages": "conformance.contract.registry",
}

if TYPE_CHECKING:
    from conformance.contract.dims import Dims
    from conformance.contract.kernel import Kernel, kernel
    from conformance.contract.registry import stages
    from conformance.errors import UsageError
    from conformance.judge.verdict import Finding
    from conformance.running.check import Report, check


def __getattr__(name: str) -> Any:
    # Lazy, so that the pytest plugin and `conformance --help` do not pay for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
