"""Which layer of a chain went wrong first, and what it read instead, told from the cache rows that every layer leaves.

The key and value rows of a layer follow from its input hidden states and its weights alone. So the rows say which state a layer
saw: the one it should have, an earlier one, the kernel's first input, half of one, or zeros; or which layer's weights it used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from conformance.arithmetic import CONTRACT
from conformance.contract import Dims, Tensors
from kernels.qwen3 import reference
from kernels.qwen3.reference import LAYER_WEIGHTS, current_rows, layer_of

#: Rows this close, relative to their size, came from the state in question: honest rounding is ten times closer.
SAME = 0.06


@dataclasses.dataclass(frozen=True)
class _Guess:
    """What a layer may have read, and with which layer's weights."""

    text: str
    hidden: torch.Tensor
    weights_of: int


def layers(inputs: Tensors, outputs: Tensors, dims: Dims) -> list[str]:
    """Sentences that say which layers did not see what they should have; empty if the rows give no hint."""
    one = dims.replace(L=1)
    states = [inputs["hidden_states"].double()]
    causes: list[str] = []
    for layer in range(dims.L):
        rows = current_rows(inputs["seq_lens"], dims, layer)
        found = tuple(outputs[name][rows].double() for name in ("k_cache", "v_cache"))
        if all(torch.equal(outputs[name][rows], inputs[name][rows]) for name in ("k_cache", "v_cache")):
            causes.append(f"layer {layer} wrote no cache rows")
            return causes
        match = next((guess for guess in _guesses(states, layer, dims) if _explains(guess, found, inputs, one, dims)), None)
        if match is None:
            causes.append(f"layer {layer} is the first whose cache rows follow from no state that it could have read")
            return causes
        if match.text:
            causes.append(f"layer {layer} {match.text}")
        states.append(_simulate(match, layer, inputs, one, dims))
    out = outputs["out"].double()
    if not _close(out, states[-1]):
        about = _about_out(out, states, dims, seen_before=bool(causes))
        causes += [about] if about else []
    return causes


def _guesses(states: list[torch.Tensor], layer: int, dims: Dims) -> Iterator[_Guess]:
    right = states[-1]
    yield _Guess("", right, layer)
    for earlier in range(len(states) - 2, -1, -1):
        yield _Guess(f"read {_name(earlier)} and did not see layer {layer - 1}'s output", states[earlier], layer)
    for other in range(dims.L):
        if other != layer:
            yield _Guess(f"used the weights of layer {other}", right, other)
    for text, mixed in _halves(states, dims):
        yield _Guess(f"saw only {text}", mixed, layer)
    yield _Guess("read zeros", torch.zeros_like(right), layer)


def _halves(states: list[torch.Tensor], dims: Dims) -> Iterator[tuple[str, torch.Tensor]]:
    """The newest state with half of its columns replaced by an earlier state's, or by zeros."""
    newest, half = states[-1], dims.H // 2
    older = [(_name(earlier), states[earlier]) for earlier in range(len(states) - 2, -1, -1)]
    for name, old in [*older, ("zeros", torch.zeros_like(newest))]:
        first = torch.cat([newest[:, :half], old[:, half:]], 1)
        second = torch.cat([old[:, :half], newest[:, half:]], 1)
        yield f"the first half of {_name(len(states) - 1)}, the rest was {name}", first
        yield f"the second half of {_name(len(states) - 1)}, the rest was {name}", second


def _name(state: int) -> str:
    return "the first input" if state == 0 else f"layer {state - 1}'s output"


def _weights(inputs: Tensors, layer: int, dims: Dims) -> dict[str, torch.Tensor]:
    return {name: layer_of(inputs[name], layer, dims.L) for name in LAYER_WEIGHTS}


def _explains(guess: _Guess, found: tuple[torch.Tensor, ...], inputs: Tensors, one: Dims, dims: Dims) -> bool:
    weights = _weights(inputs, guess.weights_of, dims)
    (x,) = reference.rms_norm(guess.hidden, weights["input_rms_weight"], dims=one, a=CONTRACT)
    k, v = CONTRACT.matmul(x, weights["wk"]), CONTRACT.matmul(x, weights["wv"])
    # The value row is a projection of the state; the key row went through norm and rotation as well.
    _, k = reference.qk_norm(k, k, weights["k_norm_weight"], weights["k_norm_weight"], dims=one, a=CONTRACT)
    _, k = reference.rope(k, k, inputs["seq_lens"], inputs["rope_cos"], inputs["rope_sin"], dims=one, a=CONTRACT)
    return _close(found[1], v.reshape(-1, dims.D)) and _close(found[0], k.reshape(-1, dims.D))


def _simulate(guess: _Guess, layer: int, inputs: Tensors, one: Dims, dims: Dims) -> torch.Tensor:
    shared = {name: inputs[name] for name in ("seq_lens", "rope_cos", "rope_sin")}
    caches = {name: layer_of(inputs[name], layer, dims.L) for name in ("k_cache", "v_cache")}
    weights = _weights(inputs, guess.weights_of, dims)
    _, _, out = reference.decode_layer(guess.hidden, **weights, **shared, **caches, dims=one, a=CONTRACT)
    return out


def _about_out(out: torch.Tensor, states: list[torch.Tensor], dims: Dims, seen_before: bool) -> str:
    for earlier in range(len(states) - 2, -1, -1):
        if _close(out, states[earlier]):
            return f"out is {_name(earlier)}, not layer {dims.L - 1}'s output"
    for text, mixed in _halves(states, dims):
        if _close(out, mixed):
            return f"out holds only {text}"
    if seen_before:
        return ""
    if dims.L == 1:
        return "the cache rows are right, the fault lies behind them: attention, output projection or MLP"
    return f"every layer's cache rows are right, the fault lies behind those of layer {dims.L - 1}"


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors agree row by row, up to honest rounding; rows that are not finite do not."""
    error = (found - expected).norm(dim=-1)
    return bool((error <= SAME * expected.norm(dim=-1) + 1e-30).all())
