"""Requests: a prompt each, and the tokens that have been generated from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from conformance.contract.dims import Dims
from conformance.errors import UsageError


@dataclasses.dataclass
class Request:
    """A prompt and what has been generated from it: ``new`` tokens at most, fewer if ``end`` comes up, which is then the last."""

    number: int
    prompt: tuple[int, ...]
    new: int
    end: int | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    #: Places in ``tokens`` where the one sampled was not the largest logit's, and which that was.
    missampled: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether nothing more is to be generated."""
        return len(self.tokens) == self.new or (self.end is not None and self.tokens[-1:] == [self.end])

    @property
    def length(self) -> int:
        """All its tokens so far: ``seq_lens`` of the step that takes the latest one."""
        return len(self.prompt) + len(self.tokens)

    @property
    def most_rows(self) -> int:
        """How many cache rows it may come to need; the last token is not fed back."""
        return len(self.prompt) + self.new - 1


def requests_for(prompts: Iterable[Sequence[int]], new: int, dims: Dims, end: int | None = None) -> list[Request]:
    """A request for each prompt; raises ``UsageError`` for what the model cannot serve."""
    if new < 1:
        raise UsageError(f"the number of new tokens must be positive, found {new}")
    requests = [Request(number, tuple(prompt), new, end) for number, prompt in enumerate(prompts)]
    if not requests:
        raise UsageError("there is no prompt: give at least one")
    for request in requests:
        what = f"prompt {request.number}"
        if not request.prompt:
            raise UsageError(f"{what} is empty: a prompt has at least one token")
        if len(request.prompt) + new > dims.S:
            raise UsageError(f"{what} has {len(request.prompt)} tokens, and {new} new ones go beyond the context of {dims.S}")
        for token in request.prompt:
            _require_token(what, token, dims)
    if end is not None:
        _require_token("the end token", end, dims)
    return requests


def _require_token(what: str, token: int, dims: Dims) -> None:
    if not 0 <= token < dims.V:
        raise UsageError(f"{what}: token {token} is outside the vocabulary, 0 to {dims.V - 1}")
