"""The compile_only lane, in its worker: the front end, every compiler pass and control-flow code generation; nothing is executed.

What the front end made of the kernel is looked at by itself: see ``unwritten.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.contract.stage import Stage
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import Guarded
from conformance.lanes.messages import Passes, RunRequest
from conformance.lanes.pypto.probe import build, probe_arguments
from conformance.lanes.pypto.runtime import Runtime, clean
from conformance.lanes.pypto.serve import Build, serve
from conformance.lanes.pypto.unwritten import look_at_graph
from conformance.lanes.worker import Start

#: The last stage of the compiler. With ``ASCEND_HOME_PATH`` it calls the device's compiler for the kernels of the cores.
LAST_STAGE = "CODEGEN_BINARY"


def open_lane(kernel: Kernel, start: Start) -> RunRequest:
    """What a worker of the lane does with a request, which has no case."""

    def run(build: Build, passes: Passes, arguments: dict[str, Guarded]) -> Outcome:
        return compile_only(build.runtime, build.jit, build.stage, build.dims)

    return serve(kernel, start, run)


def probe(start: Start) -> Outcome:
    """Whether the compiler works: it compiles a kernel that is known to be right."""
    runtime = Runtime(start.folder, start.scratch, None)
    try:
        arguments, kernel = probe_arguments(), build(runtime.pypto)
        with runtime.output_folder(sum(argument.nbytes for argument in arguments)):
            runtime.call(kernel, arguments, stage=LAST_STAGE)
    except Exception as error:
        return Outcome("raised", message=clean(error))
    return Outcome("ok")


def compile_only(runtime: Runtime, jit: Any, stage: Stage, dims: Dims) -> Outcome:
    """Compile for arguments of these dimensions; their memory is never touched, so real sizes cost none."""
    arguments = [torch.empty(argument.size(dims), dtype=argument.dtype) for argument in stage.arguments]
    with runtime.output_folder(sum(argument.nbytes for argument in arguments)) as folder:
        runtime.call(jit, arguments, stage=LAST_STAGE)
        binaries = any(folder.glob("output/output_*/kernel_aicore/*.o"))
    outcome = Outcome("ok", executed=False, compiled="device compile" if binaries else "host compile")
    if runtime.knows_files:
        look_at_graph(outcome, runtime, jit, stage, dims)
    else:
        outcome.message = "reads of memory that nothing wrote were not looked for: this version's compiled graph is not known"
    return outcome
