"""Which of the two toolchains named ``pypto`` is installed, told from its files without importing it.

Both packages are imported as ``pypto`` and only one can be installed at a time. Importing the wrong one, or one whose native
libraries do not load, must not take the harness down, and version numbers do not tell the two apart.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Literal

Flavour = Literal["cann", "hw-native-sys"]

#: The one version whose intermediate files and private methods the pypto lanes know.
SUPPORTED_VERSION = "0.2.0"
INSTALL = f"pip install pypto=={SUPPORTED_VERSION}"


class ToolchainUnavailableError(RuntimeError):
    """Something that a lane needs is not on this machine; the message is one line that says what, and what to do."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """The installed ``pypto``: ``flavour`` is ``None`` if there is none, ``supported`` whether the pypto lanes can use it."""

    flavour: Flavour | None
    version: str | None
    supported: bool
    message: str
    #: The folder of the package.
    location: Path | None = None

    def require(self) -> Path:
        """The package's folder; raises ``ToolchainUnavailableError`` unless the toolchain is supported."""
        if not self.supported or self.location is None:
            raise ToolchainUnavailableError(self.message)
        return self.location


def detect() -> Toolchain:
    """Look at the installed ``pypto`` without importing it."""
    try:
        spec = importlib.util.find_spec("pypto")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return Toolchain(None, None, False, f"pypto is not installed: {INSTALL} (Python 3.10 to 3.12, Linux x86-64 or aarch64)")
    return inspect_package(Path(next(iter(spec.submodule_search_locations))), _installed_version())


def inspect_package(location: Path, version: str | None) -> Toolchain:
    """What the package in that folder is, by the files that only one of the two has; ``version`` as its metadata says."""
    shown = version or "of unknown version"
    if (location / "language").is_dir() or (location / "jit" / "decorator.py").is_file() or any(location.glob("pypto_core*.so")):
        return Toolchain(
            "hw-native-sys",
            version,
            False,
            f"the installed pypto {shown} is the hw-native-sys one (pypto.language), which these lanes do not run yet; "
            f"in an environment of its own: {INSTALL}",
            location,
        )
    if not ((location / "frontend").is_dir() or any(location.glob("pypto_impl*.so"))):
        return Toolchain(
            None, version, False, f"the package pypto {shown} in {location} is neither known PyPTO toolchain: {INSTALL}", location
        )
    if version != SUPPORTED_VERSION:
        return Toolchain(
            "cann",
            version,
            False,
            f"pypto {SUPPORTED_VERSION} is needed, found pypto {shown}: the lanes read its intermediate files, "
            f"whose layout belongs to the version; {INSTALL}",
            location,
        )
    return Toolchain("cann", version, True, f"pypto {version} (CANN)", location)


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("pypto")
    except importlib.metadata.PackageNotFoundError:
        return None
