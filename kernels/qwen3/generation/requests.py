"""Requests: a prompt each, and the tokens that have been generated from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from conformance.contract.dims import Dims
from conformance.errors import UsageError


@dataclasses.dataclass
class Request:
    """A prompt and the tokens generated from it: ``max_new_tokens`` at most, fewer if ``end_token`` is sampled, then the last."""

    number: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    end_token: int | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    #: Where in ``tokens`` the sampled one is not the largest logit's: the index there, and the token that it should have been.
    missampled: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be generated."""
        return len(self.tokens) == self.max_new_tokens or (self.end_token is not None and self.tokens[-1:] == [self.end_token])

    @property
    def length(self) -> int:
        """Tokens so far, prompt and new ones: its ``seq_lens`` entry in the step that takes the latest one."""
        return len(self.prompt) + len(self.tokens)

    @property
    def max_cache_rows(self) -> int:
        """How many cache rows it can need at most: one a token, but for the last, which is not fed back."""
        return len(self.prompt) + self.max_new_tokens - 1


def requests_for(
    prompts: Iterable[Sequence[int]], max_new_tokens: int, dims: Dims, end_token: int | None = None
) -> list[Request]:
    """A request for each prompt; raises ``UsageError`` for what the model cannot serve."""
    if max_new_tokens < 1:
        raise UsageError(f"the number of new tokens must be positive, found {max_new_tokens}")
    requests = [Request(number, tuple(prompt), max_new_tokens, end_token) for number, prompt in enumerate(prompts)]
    if not requests:
        raise UsageError("there is no prompt: give at least one")
    for request in requests:
        what = f"prompt {request.number}"
        if not request.prompt:
            raise UsageError(f"{what} is empty: a prompt has at least one token")
        if len(request.prompt) + max_new_tokens > dims.S:
            length = len(request.prompt)
            raise UsageError(f"{what} has {length} tokens, and {max_new_tokens} new ones go beyond the context of {dims.S}")
        for token in request.prompt:
            _require_token(what, token, dims)
    if end_token is not None:
        _require_token("the end token", end_token, dims)
    return requests


def _require_token(what: str, token: int, dims: Dims) -> None:
    if not 0 <= token < dims.V:
        raise UsageError(f"{what}: token {token} is outside the vocabulary, 0 to {dims.V - 1}")
