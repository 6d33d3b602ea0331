"""PyPTO's text dumps, switched off.

With the tensors of every operation saved (``pass_verify_save_tensor``), PyPTO 0.2.0 also writes each function's expected results
and every operation as HTML, element by element on a thread of its own for which the interpreter waits in a busy loop. Nothing
reads those files, no option switches them off, and they take half to two thirds of the processor time of a comparison of passes
(``benchmarks/README.md``).

The functions that write them do nothing else, and are called through the dynamic linker. A library that is loaded first, and has
functions of the same names that return at once, takes their place.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from conformance.toolchains.calculator import build_once, calculator_path
from conformance.toolchains.detection import ToolchainUnavailableError, detect

LIBRARY = "no_text_dumps.so"
#: The member functions of PyPTO's interpreter that write HTML and nothing else, as the linker names them.
_NAMES = re.compile(rb"_ZN3npu8tile_fwk19FunctionInterpreter(?:14DumpTensorList|16DumpFunctionHead|13DumpOperation)E\w+")
_BUILD_SECONDS = 60


def without_text_dumps() -> Path | None:
    """The library to load, globally, before ``pypto``; built once per machine, beside the calculator.

    ``None`` where it cannot be built: everything works without it, and takes longer.
    """
    path = calculator_path().with_name(LIBRARY)
    try:
        return path if path.is_file() else build_once(path, _build, lambda message: None)
    except (ToolchainUnavailableError, OSError, subprocess.SubprocessError):
        return None


def _build(target: Path) -> None:
    interface = detect().require() / "lib" / "libtile_fwk_interface.so"
    names = sorted(set(_NAMES.findall(interface.read_bytes())))
    compiler = shutil.which("g++")
    if not names or compiler is None:
        raise ToolchainUnavailableError(f"{interface.name} has no such functions, or g++ is missing")
    source = "".join(f"void {name.decode()}(void) {{}}\n" for name in names)
    command = [compiler, "-x", "c", "-shared", "-fPIC", "-o", str(target), "-"]
    subprocess.run(command, input=source, text=True, capture_output=True, check=True, timeout=_BUILD_SECONDS)
