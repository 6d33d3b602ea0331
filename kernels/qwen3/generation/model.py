"""The weights of a model that is served, in memory."""

from __future__ import annotations

import dataclasses

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors, layer_of
from conformance.kernels.qwen3.generation.checkpoint import Checkpoint
from conformance.kernels.qwen3.reference import LAYER_WEIGHTS

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is served; its checkpoint is read once.

    ``weights`` are those of all layers, the head's and the RoPE tables, by the contract's names; ``embedding`` is ``[V, H]``.
    ``dims.B`` is the largest batch, ``dims.NB`` the pages of the paged driver's pool.
    """

    dims: Dims
    weights: Tensors
    embedding: Tensor
    #: What ``layers`` gave: on a card an argument stays while it is the very tensor of the step before.
    _views: dict[tuple[int, int], Tensors] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, exact: bool) -> LoadedModel:
        """Read a checkpoint: in the contract's dtypes, or, for an exact executor, all of it in float64."""
        dtype = torch.float64 if exact else None
        weights = checkpoint.weights(dtype=dtype) | checkpoint.rope_tables()
        return cls(checkpoint.dims, weights, checkpoint.embed_tokens(dtype))

    @property
    def exact(self) -> bool:
        """Whether the weights are in float64, for an exact executor."""
        return self.embedding.dtype == torch.float64

    def layers(self, first: int, count: int) -> Tensors:
        """All weights, of the layers' those of ``count`` layers from ``first`` on: the same row slices every time, no copies."""
        if (first, count) not in self._views:
            self._views[first, count] = {
                name: layer_of(tensor, first, self.dims.L, count) if name in LAYER_WEIGHTS else tensor
                for name, tensor in self.weights.items()
            }
        return self._views[first, count]
