"""The interpret lane, in its worker: PyPTO compiles the kernel and executes the compiled graph on the CPU."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from conformance.contract.kernel import Kernel
from conformance.lanes.base import Outcome
from conformance.lanes.buffers import Guarded, same_bits
from conformance.lanes.messages import Passes, RunRequest
from conformance.lanes.pypto.passes import LAST_PASS, compare_passes
from conformance.lanes.pypto.serve import Build, serve
from conformance.lanes.pypto.unwritten import look_at_graph
from conformance.lanes.worker import Start

#: Inputs are read back, to see whether the kernel changed them, where they are not larger than this altogether, in bytes: what
#: a kernel writes to does not depend on its size, and every argument that is read back costs two files of its size.
READ_INPUTS_BELOW = 32 << 20

_RESULT = re.compile(r"tensor_graph~(\d+)~\d+\.data")


def open_lane(kernel: Kernel, start: Start) -> RunRequest:
    """What a worker of the lane does with a request."""

    def run(build: Build, passes: Passes, arguments: dict[str, Guarded]) -> Outcome:
        outcome = interpret(build, {name: guarded.tensor for name, guarded in arguments.items()}, passes)
        if passes == "all":
            # It takes another compile: made where everything is looked at, not for every case.
            look_at_graph(outcome, build.runtime, build.jit, build.stage, build.dims)
        return outcome

    return serve(kernel, start, run)


def interpret(build: Build, tensors: Mapping[str, torch.Tensor], passes: Passes) -> Outcome:
    """Run the kernel on the arguments of a case, by name. The interpreter works on copies: what they held is put back afterwards.

    Interpreting a pass takes as many steps as the kernel has tiles: a real-size MLP did not end in five minutes, against 30 s
    with ``passes="none"``.
    """
    runtime, jit, stage = build.runtime, build.jit, build.stage
    arguments = [tensors[argument.name] for argument in stage.arguments]
    scale = sum(tensor.nbytes for tensor in arguments)
    read_inputs = (
        sum(tensors[argument.name].nbytes for argument in stage.arguments if argument.access == "in") < READ_INPUTS_BELOW
    )
    wanted = [argument.access != "in" or read_inputs for argument in stage.arguments]
    with runtime.output_folder(scale) as folder:
        runtime.call(
            jit,
            arguments,
            stage="EXECUTE_GRAPH",
            golden=[expected_nothing(tensor) if want else None for tensor, want in zip(arguments, wanted, strict=True)],
            verify=_verify_options(passes),
        )
        output = _only(folder.glob("output/output_*"), "output folder")
        results = read_results(_only(output.glob("verify_*"), "verification folder"), arguments)
        comparison = compare_passes(output) if passes != "none" else None
    if comparison is not None and not comparison.compared and not comparison.differences:
        raise RuntimeError("no compiler pass left anything to compare: the kernel computes nothing, or PyPTO's files changed")
    missing = [
        argument.name for index, argument in enumerate(stage.arguments) if argument.access != "in" and index not in results
    ]
    if missing:
        raise RuntimeError(f"the interpreter left no result for {', '.join(missing)}")
    for index, argument in enumerate(stage.arguments):
        if index in results and (argument.access != "in" or not same_bits(results[index], arguments[index])):
            arguments[index].copy_(results[index])
    return Outcome(
        "ok",
        pass_differences=comparison.differences if comparison else (),
        passes_compared=comparison.compared if comparison else 0,
    )


def expected_nothing(tensor: torch.Tensor) -> torch.Tensor:
    """The expected value to give for an argument so that the interpreter writes its result to a file.

    Its own comparison is not used (it forgives a share of wrong elements and all NaN), and is cheapest against NaN: an
    expected 0.0 beside a result of 0.0 costs a record of its own for every element.
    """
    if not tensor.is_floating_point():
        return tensor
    return torch.full_like(tensor, math.nan)


def read_results(folder: Path, arguments: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """What the arguments held after the run, by their position, from the files that the interpreter wrote."""
    results: dict[int, torch.Tensor] = {}
    for path in (folder / "tensor_graph").iterdir():
        match = _RESULT.fullmatch(path.name)
        if match is None:
            continue
        like = arguments[int(match[1])]
        data = bytearray(path.read_bytes())
        if len(data) != like.nbytes:
            raise RuntimeError(f"the interpreter wrote {len(data)} bytes of argument {match[1]}, which has {like.nbytes}")
        results[int(match[1])] = torch.frombuffer(data, dtype=like.dtype).view(like.shape)
    return results


def _verify_options(passes: Passes) -> dict[str, Any]:
    return {
        # Every operation's tensor is needed: after the graph is cut into subgraphs, what PyPTO saves (and compares) of a
        # function's result is its first tile only.
        "pass_verify_save_tensor": passes != "none",
        "pass_verify_pass_filter": {"none": [], "last": [LAST_PASS], "all": ["all"]}[passes],
    }


def _only(paths: Any, what: str) -> Path:
    found = list(paths)
    if len(found) != 1:
        raise RuntimeError(f"expected one {what} of the interpreter, found {len(found)}")
    return Path(found[0])
