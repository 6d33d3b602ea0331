"""Conformance harness for decode kernels: is it right, and if not, where and why.

>>> report = conformance.check("rms_norm", my_rms_norm, dims="tiny", seed=0)
>>> report.ok, report.findings
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Dims", "Finding", "Kernel", "Report", "UsageError", "check", "kernel", "stages"]

_HOMES = {
    "Dims": "conformance.contract",
    "Finding": "conformance.verdict",
    "Kernel": "conformance.declaration",
    "Report": "conformance.checking",
    "UsageError": "conformance.errors",
    "check": "conformance.checking",
    "kernel": "conformance.declaration",
    "stages": "conformance.contract",
}

if TYPE_CHECKING:
    from conformance.checking import Report, check
    from conformance.contract import Dims, stages
    from conformance.declaration import Kernel, kernel
    from conformance.errors import UsageError
    from conformance.verdict import Finding


def __getattr__(name: str) -> Any:
    # Lazy, so that the pytest plugin and `conformance --help` do not pay for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
