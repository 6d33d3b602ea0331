"""Which of the two toolchains named ``pypto`` is installed, told from its files without importing it.

Both packages are imported as ``pypto`` and only one can be installed at a time. Importing the wrong one, or one whose native
libraries do not load, must not take the harness down, and version numbers do not tell the two apart.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from conformance.toolchains.capabilities import Capabilities

Flavour = Literal["cann", "hw-native-sys"]

#: The one version that all lanes can use: interpret reads intermediate files, whose layout is nobody's promise. compile_only and
#: device take any version that has the names that they use.
SUPPORTED_VERSION = "0.2.0"
INSTALL = f"pip install pypto=={SUPPORTED_VERSION}"


class ToolchainUnavailableError(RuntimeError):
    """Something that a lane needs is not on this machine; the message is one line that says what, and what to do."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """The installed ``pypto``: ``flavour`` is ``None`` if there is none, ``supported`` whether all lanes can use it.

    ``message`` says what it is, or why not all lanes can.
    """

    flavour: Flavour | None
    version: str | None
    supported: bool
    message: str
    #: The folder of the package, and what it has, if it is of the flavour that the lanes run.
    location: Path | None = None
    capabilities: Capabilities | None = None

    def require(self, lane: str = "interpret") -> Path:
        """The package's folder; raises ``ToolchainUnavailableError`` unless a lane can use it."""
        reason = self.why_not(lane)
        if reason or self.location is None:
            raise ToolchainUnavailableError(reason)
        return self.location

    def why_not(self, lane: str) -> str:
        """Why a lane cannot use it, in one line; empty if it can."""
        if self.supported:
            return ""
        if lane == "interpret" or self.capabilities is None:
            return self.message
        lacks = self.capabilities.lacks[lane]
        if not lacks:
            return ""
        shown = self.version or "of unknown version"
        return f"pypto {shown} lacks what the {lane} lane uses ({'; '.join(lacks)}): {INSTALL}"


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
    # Not above: whether there is a pypto is asked by what has the standard library alone.
    from conformance.toolchains.capabilities import look_at

    found = look_at(location)
    if version != SUPPORTED_VERSION:
        message = (
            f"the interpret lane needs pypto {SUPPORTED_VERSION}, found pypto {shown}: it reads intermediate files, whose layout "
            f"belongs to the version; in an environment of its own: {INSTALL}"
        )
        return Toolchain("cann", version, False, message, location, found)
    lacks = found.lacks["interpret"]
    if lacks:
        message = f"pypto {shown} is not the one of that version on PyPI: it lacks {'; '.join(lacks)}; {INSTALL}"
        return Toolchain("cann", version, False, message, location, found)
    return Toolchain("cann", version, True, f"pypto {version} (CANN)", location, found)


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version("pypto")
    except importlib.metadata.PackageNotFoundError:
        return None
