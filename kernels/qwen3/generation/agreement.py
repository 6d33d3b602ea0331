"""Whether generated tokens are the reference's, and where one is not, whether rounding can be the reason.

Teacher forcing: one prefill of the fp64 reference over a whole sequence, prompt and generated tokens, gives the exact logits at
every position given the tokens before it, so that a token that differs is counted once and not in all that follow. The error
model of the same prefill says how far two logits can be off in a correct bf16 kernel.

The bound is that of every legal kernel, so tokens alone prove little where the reference itself is nearly undecided: at ``tiny``
with two layers it decides about three tokens in five. Faults smaller than that are for ``conformance check`` to find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from conformance.contract.dims import Dims
from conformance.contract.registry import stage_named
from conformance.contract.stage import Tensors
from conformance.judge.limits import FLUSHED, HALF_ULP_SLACK, kappa
from conformance.kernels.qwen3 import error_model, reference
from conformance.kernels.qwen3.generation.model import LoadedModel
from conformance.kernels.qwen3.generation.requests import Request
from conformance.numerics import bounds
from conformance.numerics.arithmetic import EXACT
from conformance.numerics.ulp import spacing

Tensor = torch.Tensor

#: How far float64's own rounding may move two logits, as a part of the larger: all that a float64 executor is forgiven.
FLOAT64_NOISE = 1e-12

#: ``tie``: rounding can be the reason; ``wrong``: it cannot; ``missampled``: it is not even the largest of the logits it was
#: chosen from.
Kind = Literal["tie", "wrong", "missampled"]


@dataclasses.dataclass(frozen=True)
class TokenDifference:
    """A generated token that is not the reference's, or that was not chosen rightly.

    ``place`` counts the new tokens of ``sequence`` from 0, ``position`` its prompt too. ``margin`` is by how much the exact logit
    of ``expected`` exceeds that of ``token``, ``allowed`` what the errors of the two can add up to.
    """

    kind: Kind
    sequence: int
    place: int
    position: int
    token: int
    expected: int
    margin: float
    allowed: float | None = None

    def __str__(self) -> str:
        where = f"prompt {self.sequence}, new token {self.place} (position {self.position}): {self.token}"
        if self.kind == "missampled":
            return f"{where}, but the largest logit is that of {self.expected}: wrong, sampling allows no error"
        verdict = "a tie within the error bound" if self.kind == "tie" else "wrong"
        return f"{where}, reference {self.expected}; margin {self.margin:.3g}, allowed {self.allowed:.3g}: {verdict}"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Every token that is not the reference's, of ``tokens`` in all.

    ``margins`` holds, by sequence and new token, how much the reference's largest logit exceeds its second.
    """

    tokens: int
    differences: tuple[TokenDifference, ...]
    margins: tuple[tuple[float, ...], ...]

    @property
    def ties(self) -> int:
        """How many differences rounding can explain."""
        return sum(difference.kind == "tie" for difference in self.differences)

    @property
    def wrong(self) -> int:
        """How many differences it cannot."""
        return len(self.differences) - self.ties

    def __str__(self) -> str:
        same = self.tokens - len(self.differences)
        ties = f"{self.ties} tie{'' if self.ties == 1 else 's'} within the error bound"
        return f"{self.tokens} tokens: {same} as the fp64 reference, {ties}, {self.wrong} wrong"


class TokenVerifier:
    """Verifies generated tokens against the exact logits of a model; these are kept, since drivers that agree need the same."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._exact_logits: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    def judge(self, requests: Sequence[Request]) -> Agreement:
        """Compare every new token of some sequences with the reference's."""
        self._compute_logits(requests)
        found: list[TokenDifference] = []
        margins = []
        for request in requests:
            logits = self._exact_logits[_key(request)]
            largest = logits.topk(min(2, logits.shape[-1]), -1).values
            margins.append(tuple((largest[:, 0] - largest[:, -1]).tolist()))
            (expected,) = reference.greedy_sample(logits, dims=self._model.dims, a=EXACT)
            for place, (token, right) in enumerate(zip(request.tokens, map(int, expected.tolist()), strict=True)):
                kind: Kind = "missampled" if place in request.missampled else "wrong"
                right = request.missampled.get(place, right)
                if token != right:
                    margin = float(logits[place, right] - logits[place, token])
                    found.append(TokenDifference(kind, request.number, place, len(request.prompt) + place, token, right, margin))
        tokens = sum(len(request.tokens) for request in requests)
        return Agreement(tokens, self._classified(found, requests, tokens), tuple(margins))

    def _compute_logits(self, requests: Sequence[Request]) -> None:
        """The exact logits of all sequences that have none yet, in one prefill."""
        new = list({_key(request): request for request in requests if _key(request) not in self._exact_logits}.values())
        if not new:
            return
        prefill = _TeacherForcedPrefill.of(self._model, new, [len(request.tokens) for request in new])
        _, _, hidden = reference.stacked_layers(dims=prefill.dims, a=EXACT, **prefill.inputs)
        head = {name: self._model.weights[name] for name in ("final_norm_weight", "lm_head_weight")}
        for request, rows in zip(new, prefill.predecessors, strict=True):
            (self._exact_logits[_key(request)],) = reference.lm_head(hidden[rows], **head, dims=prefill.dims, a=EXACT)

    def _classified(self, found: list[TokenDifference], requests: Sequence[Request], tokens: int) -> tuple[TokenDifference, ...]:
        """The differences with the allowed error of each; those within it become ties."""
        last_place: dict[int, int] = {}
        for difference in found:
            if difference.kind == "wrong":
                last_place[difference.sequence] = difference.place
        concerned = [request for request in requests if request.number in last_place]
        counts = [last_place[request.number] + 1 for request in concerned]
        allowed = self.allowances(concerned, counts, tokens) if concerned else {}
        classified = []
        for difference in found:
            if difference.kind == "wrong":
                errors = allowed[difference.sequence][difference.place]
                most = float(errors[difference.token] + errors[difference.expected])
                kind: Kind = "tie" if difference.margin <= most else "wrong"
                difference = dataclasses.replace(difference, kind=kind, allowed=most)
            classified.append(difference)
        return tuple(classified)

    def allowances(self, requests: Sequence[Request], counts: Sequence[int], tokens: int) -> dict[int, Tensor]:
        """How far a correct kernel's logits can be off, ``[count, V]`` for the first ``counts`` new tokens of each.

        As ``conformance.judge`` tests an element, ``tokens * V`` of them in all: under each profile, and the larger counts.
        """
        if self._model.exact:
            noise = {}
            for request in requests:
                logits = self._exact_logits[_key(request)]
                noise[request.number] = FLOAT64_NOISE * logits.abs().amax(-1, keepdim=True).expand_as(logits)
            return noise
        prefill = _TeacherForcedPrefill.of(self._model, requests, counts)
        most = [torch.zeros(())] * len(requests)
        for profile in stage_named("qwen3/prefill_fwd").profiles:
            hidden = error_model.prefill_fwd(prefill.inputs, prefill.dims, profile)["out"]
            for index, rows in enumerate(prefill.predecessors):
                last = bounds.rounding(hidden[rows], profile)
                estimate = error_model.head(last, self._model.weights, prefill.dims, profile)
                likely = kappa(tokens * estimate.value.shape[-1]) * estimate.variance.sqrt()
                errors = torch.minimum(likely, estimate.worst.nan_to_num(torch.inf))
                errors += spacing(estimate.value, torch.float32) * (0.5 * HALF_ULP_SLACK) + FLUSHED
                most[index] = torch.maximum(most[index], errors)
        return {request.number: errors for request, errors in zip(requests, most, strict=True)}


def _key(request: Request) -> tuple[tuple[int, ...], ...]:
    return request.prompt, tuple(request.tokens)


@dataclasses.dataclass(frozen=True)
class _TeacherForcedPrefill:
    """The arguments of a prefill of whole sequences, each up to the token before its ``counts``-th new one; no LM head."""

    dims: Dims
    inputs: Tensors
    #: Indices of the packed tokens that the new ones follow: ``[count]`` for each sequence.
    predecessors: list[Tensor]

    @classmethod
    def of(cls, model: LoadedModel, requests: Sequence[Request], counts: Sequence[int]) -> _TeacherForcedPrefill:
        """On a paged cache with a page for each sequence."""
        histories = [[*request.prompt, *request.tokens[: count - 1]] for request, count in zip(requests, counts, strict=True)]
        lengths = torch.tensor([len(history) for history in histories])
        ends = lengths.cumsum(0)
        most = int(lengths.max())
        dims = model.dims.replace(B=len(requests), T=int(ends[-1]), S=most, BS=most, NB=len(requests))
        cache = torch.zeros(dims.L * dims.NB * dims.NKV * dims.BS, dims.D, dtype=torch.bfloat16)
        inputs = {
            **{name: model.weights[name] for name in (*reference.LAYER_WEIGHTS, "rope_cos", "rope_sin")},
            "hidden_states": model.embedding[[token for history in histories for token in history]],
            "seq_lens": lengths,
            "chunk_lens": lengths,
            "chunk_offsets": ends - lengths,
            "block_table": torch.arange(dims.B),
            "slot_mapping": torch.cat([b * most + torch.arange(int(length)) for b, length in enumerate(lengths)]),
            "k_cache": cache,
            "v_cache": cache,
        }
        predecessors = [torch.arange(int(end) - count, int(end)) for end, count in zip(ends, counts, strict=True)]
        return cls(dims, inputs, predecessors)
