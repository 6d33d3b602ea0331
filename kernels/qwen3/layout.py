"""Where the tokens of one dispatch stand: which sequence each belongs to, what it attends to, and which cache rows it writes.

A layer is the same whether its cache is contiguous or paged and whether a sequence brings one token (decode) or several
(prefill). What differs is here, for the reference, the error model, the data and the localisation alike. Every cache of one
layer is ``[rows, D]``; with ``L`` layers, stacked along the first axis.
"""

from __future__ import annotations

import dataclasses

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import (
    Tensors,  # for all who import the rest of the layout from here
)

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """The ``N`` tokens of a dispatch and the caches of its ``B`` sequences.

    ``sequence [N]`` is the sequence of each token; ``length [N]`` how many rows of its history it attends to, its own included,
    so that its position is ``length - 1``; ``last [B]`` the token that is the last of each sequence, and ``seq_lens [B]`` the
    lengths of the histories, all new tokens included. ``slot [N]`` and ``block_table [B, MB]`` are given for a paged cache,
    ``None`` for a contiguous one.
    """

    dims: Dims
    sequence: Tensor
    length: Tensor
    last: Tensor
    seq_lens: Tensor
    slot: Tensor | None = None
    block_table: Tensor | None = None

    @classmethod
    def of(cls, inputs: Tensors, dims: Dims) -> Layout:
        """From the contract's arguments: prefill if there are ``chunk_lens``, paged if there is a ``block_table``."""
        seq_lens = inputs["seq_lens"].long()
        sequence = last = torch.arange(dims.B)
        length = seq_lens
        if "chunk_lens" in inputs:
            chunk_lens, chunk_offsets = inputs["chunk_lens"].long(), inputs["chunk_offsets"].long()
            sequence, length = torch.empty(dims.T, dtype=torch.int64), torch.empty(dims.T, dtype=torch.int64)
            for b, (start, count) in enumerate(zip(chunk_offsets.tolist(), chunk_lens.tolist(), strict=True)):
                sequence[start : start + count] = b
                length[start : start + count] = seq_lens[b] - count + 1 + torch.arange(count)
            last = chunk_offsets + chunk_lens - 1
        if "block_table" not in inputs:
            return cls(dims, sequence, length, last, seq_lens)
        slot = inputs["slot_mapping"].long() if "slot_mapping" in inputs else None
        return cls(dims, sequence, length, last, seq_lens, slot, inputs["block_table"].long().view(dims.B, dims.MB))

    @property
    def new(self) -> list[int]:
        """How many tokens each sequence brings, ``[B]``."""
        return torch.bincount(self.sequence, minlength=self.dims.B).tolist()  # type: ignore[no-any-return]

    def rows(self, layer: int = 0) -> Tensor:
        """The cache rows that the tokens write in a layer, all KV heads: ``[N * NKV]``, by token."""
        if self.block_table is not None:
            assert self.slot is not None, "a stage that writes to a paged cache takes slot_mapping"
            return paged_rows(self.slot, self.dims, layer)
        return current_rows(self.seq_lens, self.dims, layer)

    def histories(self, cache: Tensor) -> list[Tensor]:
        """The rows of each sequence in a cache of one layer, in order: ``[NKV, seq_len, D]``.

        All are cut from the cache at once: a gradient by the cache would be as large as it for every sequence otherwise.
        """
        dims, lengths = self.dims, self.seq_lens.tolist()
        if self.block_table is None:
            by_sequence = contiguous(cache, dims)[0].unbind(0)
        else:
            counts = [-(-length // dims.BS) for length in lengths]
            pages = torch.cat([self.block_table[b, :count] for b, count in enumerate(counts)])
            by_page = cache.view(-1, dims.NKV, dims.BS, dims.D)[pages].transpose(0, 1)  # [NKV, pages, BS, D]
            by_sequence = tuple(part.reshape(dims.NKV, -1, dims.D) for part in torch.split(by_page, counts, 1))
        return [rows[:, :length] for rows, length in zip(by_sequence, lengths, strict=True)]


def contiguous(cache: Tensor, dims: Dims) -> Tensor:
    """A contiguous cache as ``[L, B, NKV, S, D]``."""
    return cache.reshape(-1, dims.B, dims.NKV, dims.S, dims.D)


def current_rows(seq_lens: Tensor, dims: Dims, layer: int = 0) -> Tensor:
    """Rows of a contiguous cache that hold each sequence's current position, all KV heads: ``[B * NKV]``, by sequence."""
    sequence = torch.arange(dims.B).unsqueeze(1)
    head = torch.arange(dims.NKV).unsqueeze(0)
    position = (seq_lens.long() - 1).unsqueeze(1)
    return ((((layer * dims.B + sequence) * dims.NKV + head) * dims.S) + position).reshape(-1)


def paged_rows(slot_mapping: Tensor, dims: Dims, layer: int = 0) -> Tensor:
    """Rows of a paged cache at each token's slot, all KV heads: ``[N * NKV]``, by token."""
    slot = slot_mapping.long().unsqueeze(1)
    page, offset = slot // dims.BS, slot % dims.BS
    head = torch.arange(dims.NKV).unsqueeze(0)
    return (((layer * dims.NB + page) * dims.NKV + head) * dims.BS + offset).reshape(-1)
