"""Where the tokens of one dispatch stand: which sequence each belongs to, what it attends to, and which cache rows it writes.

A layer is the same whether its cache is contiguous or paged and whether a sequence brings one token (decode) or several
(prefill). What differs is here, for the reference, the error model, the data and the localisation alike. Every cache of one
layer is ``[rows, D]``; with ``L`` layers, stacked along the first axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import (
    Tensors,  # for all who import the rest of the layout from here
)

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Block:
    """Tokens that are attended to together: ``t`` of each of ``s`` sequences that bring ``m`` tokens each.

    ``sequences [s]``; ``own [s, m]`` all tokens of these sequences, by position; ``tokens [s, t]`` those of the block.
    """

    sequences: Tensor
    own: Tensor
    tokens: Tensor


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

    def history(self, cache: Tensor, sequences: Tensor, lengths: Tensor) -> Tensor:
        """The first rows of some sequences in a cache of one layer, in order: ``[len(sequences), NKV, max(lengths), D]``.

        Rows past a sequence's own length are zeros.
        """
        dims, longest = self.dims, int(lengths.max())
        if self.block_table is None:
            rows = contiguous(cache, dims)[0][sequences, :, :longest]
        else:
            # Entries past a sequence's pages are -1; what is read in their place is cleared.
            pages = self.block_table[sequences, : -(-longest // dims.BS)].clamp_min(0)
            by_page = cache.view(-1, dims.NKV, dims.BS, dims.D)[pages]  # [sequences, pages, NKV, BS, D]
            rows = by_page.transpose(1, 2).flatten(2, 3)[:, :, :longest]
        inside = torch.arange(longest) < lengths.unsqueeze(1)
        return torch.where(inside.view(len(sequences), 1, longest, 1), rows, torch.zeros((), dtype=rows.dtype))

    def histories(self, cache: Tensor) -> list[Tensor]:
        """All rows of each sequence in a cache of one layer: ``[NKV, seq_len, D]``."""
        rows = self.history(cache, torch.arange(self.dims.B), self.seq_lens)
        return [part[:, :length] for part, length in zip(rows.unbind(0), self.seq_lens.tolist(), strict=True)]

    def blocks(self, most: int) -> Iterator[Block]:
        """The tokens in blocks of sequences that bring equally many, so that attention takes a few large steps.

        The keys and the values of a block, and its scores, have about ``most`` elements each, or are of one sequence or token.
        """
        dims = self.dims
        order = torch.argsort(self.sequence * (int(self.length.max()) + 1) + self.length)
        counts = torch.bincount(self.sequence, minlength=dims.B)
        starts = counts.cumsum(0) - counts
        longest = int(self.seq_lens.max())
        for count in filter(None, torch.unique(counts).tolist()):
            alike = torch.nonzero(counts == count).flatten()
            alike = alike[self.seq_lens[alike].argsort()]
            height = max(1, most // (dims.NKV * longest * dims.D))
            width = max(1, most // (min(height, len(alike)) * dims.NH * longest))
            for sequences in torch.split(alike, height):
                own = order[starts[sequences].unsqueeze(1) + torch.arange(count)]
                for tokens in torch.split(own, width, 1):
                    yield Block(sequences, own, tokens)


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
