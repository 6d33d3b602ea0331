"""PyPTO's dumps that nobody reads, switched off.

With the tensors of every operation saved (``pass_verify_save_tensor``), PyPTO 0.2.0 also writes each function's expected results
and every operation as HTML, element by element on a thread of its own for which the interpreter waits in a busy loop. Nothing
reads those files, no option switches them off, and they take half to two thirds of the processor time of a comparison of passes
(``benchmarks/README.md``).

Of the tensors themselves, each a file, the lane reads the results of functions and what operations in subgraphs copy out. It
reads none of an operation outside a subgraph, which is all of the tensor graph, none that a copy leaves, no function's inputs,
and not the expected values that it gave itself: more than half of the files. Were one of them needed after all, the comparison
would say that it is missing.

The functions that write all these do nothing else, and are called through the dynamic linker. A library that is loaded first, and
has functions of the same names, takes their place.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from conformance.toolchains.calculator import build_once, calculator_path
from conformance.toolchains.detection import ToolchainUnavailableError, detect

LIBRARY = "fewer_dumps.so"
_INTERFACE = "libtile_fwk_interface.so"
#: The member functions of PyPTO's interpreter that write HTML and nothing else, as the linker names them.
_TEXT = re.compile(rb"_ZN3npu8tile_fwk19FunctionInterpreter(?:14DumpTensorList|16DumpFunctionHead|13DumpOperation)E\w+")
#: The one that writes a tensor to the file of a given name.
_TENSOR = b"_ZN3npu8tile_fwk19FunctionInterpreter16DumpTensorBinaryERKSt10shared_ptrINS0_17LogicalTensorDataEESs"
#: What an operation leaves is called ``function~caller~trip~function~number~OPERATION~...``, with no caller outside subgraphs; a
#: function's input ``tensor_Incast_...``; an argument's expected value ``tensor_graph~argument~golden~...``.
#: Of the ``std::string`` only the address of its characters is used, which comes first in it.
_FEWER_TENSORS = """
#include <dlfcn.h>
#include <string.h>
typedef void write_tensor(void *interpreter, void *tensor, char **name);
void %(symbol)s(void *interpreter, void *tensor, char **name) {
    if (strstr(*name, "~~") || strstr(*name, "~COPY_OUT~") || !strncmp(*name, "tensor_Incast_", 14))
        return;
    if (!strncmp(*name, "tensor_graph~", 13) && strstr(*name, "~golden~"))
        return;
    static write_tensor *original;
    if (!original)
        original = (write_tensor *)dlsym(dlopen("%(interface)s", RTLD_LAZY | RTLD_NOLOAD), "%(symbol)s");
    original(interpreter, tensor, name);
}
"""
_BUILD_SECONDS = 60


def fewer_dumps() -> Path | None:
    """The library to load, globally, before ``pypto``; built once per machine, beside the calculator.

    ``None`` where it cannot be built: everything works without it, and takes longer.
    """
    path = calculator_path().with_name(LIBRARY)
    try:
        return build_once(path, _build, lambda message: None)
    except (ToolchainUnavailableError, OSError, subprocess.SubprocessError):
        return None


def _build(target: Path) -> None:
    interface = detect().require() / "lib" / _INTERFACE
    symbols = interface.read_bytes()
    names = sorted(set(_TEXT.findall(symbols)))
    compiler = shutil.which("g++")
    if not names or compiler is None:
        raise ToolchainUnavailableError(f"{interface.name} has no such functions, or g++ is missing")
    source = "".join(f"void {name.decode()}(void) {{}}\n" for name in names)
    if _TENSOR + b"\0" in symbols:
        source += _FEWER_TENSORS % {"symbol": _TENSOR.decode(), "interface": _INTERFACE}
    # Linked by name to nothing: what it calls is looked up when PyPTO has loaded it.
    command = [compiler, "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(target), "-", "-x", "none", "-ldl"]
    subprocess.run(command, input=source, text=True, capture_output=True, check=True, timeout=_BUILD_SECONDS)
