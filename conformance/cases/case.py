"""A case: the concrete inputs that follow from a key."""

from __future__ import annotations

import dataclasses
import math
import os

import torch

from conformance.cases.key import CaseKey
from conformance.cases.source import SharedDraws, Source
from conformance.contract.dims import Dims
from conformance.contract.registry import stage_named
from conformance.contract.stage import Stage
from conformance.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Case:
    """One concrete input set. ``inputs`` are contiguous CPU tensors by argument name: what is read and what is updated."""

    key: CaseKey
    stage: Stage
    dims: Dims
    inputs: dict[str, torch.Tensor]


def make_case(key: CaseKey, shared: SharedDraws | None = None) -> Case:
    """The case of a key, which has the tensors of the one before that it would draw again if they are ``shared``.

    Raises ``UsageError`` for a key that does not fit its stage.
    """
    stage, dims = stage_named(key.stage), key.dims
    batch = dims.symbol("batch")
    if key.regime not in stage.regimes:
        raise UsageError(f"stage {stage.name} has no regime {key.regime!r}; it has {', '.join(stage.regimes)}")
    if stage.has_lengths != bool(key.seq_lens) or (stage.has_lengths and len(key.seq_lens) != dims.batch):
        expected = f"{dims.batch} sequence lengths" if stage.has_lengths else "no sequence lengths"
        raise UsageError(
            f"case key {key}: stage {stage.name} with {batch}={dims.batch} takes {expected}, found {len(key.seq_lens)}"
        )
    for length in key.seq_lens:
        if not 1 <= length <= dims.length:
            raise UsageError(f"case key {key}: sequence length {length} is outside 1..{dims.length}")
    if stage.has_chunks != bool(key.chunk_lens) or (stage.has_chunks and len(key.chunk_lens) != dims.batch):
        expected = f"{dims.batch} chunk lengths" if stage.has_chunks else "no chunk lengths"
        raise UsageError(
            f"case key {key}: stage {stage.name} with {batch}={dims.batch} takes {expected}, found {len(key.chunk_lens)}"
        )
    for length, chunk in zip(key.seq_lens, key.chunk_lens, strict=False):
        if not 1 <= chunk <= length:
            raise UsageError(f"case key {key}: chunk length {chunk} is outside 1..{length}, the length of its sequence")
    if dims.symbol("pages") in stage.drawn:
        needed = 1 + sum(-(-length // dims.page_size) for length in key.seq_lens)
        if needed > dims.pages:
            found = f"{dims.symbol('pages')}={dims.pages}"
            raise UsageError(f"case key {key}: {needed} pages are needed (one more than are in use), found {found}")
    case = Case(key, stage, dims, make_inputs(stage, key, dims, shared))
    if shared is not None:
        shared.keep(case.inputs.values())
    return _with_rows(case, key.rows) if key.rows else case


def require_room(size: int, what: str) -> None:
    """Raise ``UsageError`` for what takes more bytes than the machine has memory: making it would end this process."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > room:
        raise UsageError(
            f"{what} takes {size / 1e9:,.1f} GB of memory, this machine has {room / 1e9:,.1f} GB: choose smaller sizes"
        )


def make_inputs(stage: Stage, key: CaseKey, dims: Dims, shared: SharedDraws | None = None) -> dict[str, torch.Tensor]:
    """The inputs of a stage for a key, at dimensions that may be other than the key's (more layers)."""
    sizes = (math.prod(argument.size(dims)) * argument.dtype.itemsize for argument in stage.inputs)
    require_room(sum(sizes), f"case key {key}: the data")
    with torch.inference_mode(False):  # whatever mode the caller is in: tensors made in it can never be differentiated
        chunks = {"chunk_lens": key.chunk_lens} if stage.has_chunks else {}
        source = Source(f"{stage.name}/{key.regime}/{key.seed}", key.seed, shared)
        inputs = stage.make_inputs(dims, key.seq_lens, key.regime, source, **chunks)
    for argument in stage.inputs:
        expected, found = (argument.dtype, argument.size(dims)), inputs.get(argument.name)
        if found is None or (found.dtype, tuple(found.shape)) != expected:
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise UsageError(
                f"the data of stage {stage.name} do not fit its contract: {argument.name} is {argument.describe()}, "
                f"{expected[0]} {list(expected[1])} here; found {what}"
            )
    return {argument.name: inputs[argument.name].contiguous() for argument in stage.inputs}


def _with_rows(case: Case, rows: tuple[int, ...]) -> Case:
    """The same case with its sequences selected and reordered: wherever the batch is a factor of an axis, that factor is indexed.

    What follows the sequences in another way, the stage rearranges itself.
    """
    batch = case.dims.symbol("batch")
    if any(row >= case.dims.batch for row in rows):
        raise UsageError(f"case key {case.key}: rows must be below {batch or 'batch'}={case.dims.batch}")
    chosen = torch.tensor(rows)
    dims = case.dims.resized(batch=len(rows))
    own: dict[str, torch.Tensor] = {}
    if case.stage.rearrange is not None:
        own = case.stage.rearrange(case.inputs, case.dims, rows)
        dims = dims.resized(tokens=sum(case.key.chunk_lens[row] for row in rows))
    inputs = {}
    for argument in case.stage.inputs:
        if argument.name in own:
            inputs[argument.name] = own[argument.name].contiguous()
            continue
        tensor = case.inputs[argument.name]
        shape = tensor.shape
        for axis, factors in enumerate(argument.axes):
            if batch in factors:
                sizes = [case.dims.size(factor) for factor in factors]
                split = tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])
                kept = split.index_select(axis + factors.index(batch), chosen)
                tensor = kept.reshape(*shape[:axis], -1, *shape[axis + 1 :])
        inputs[argument.name] = tensor.contiguous()
    return dataclasses.replace(case, dims=dims, inputs=inputs)
