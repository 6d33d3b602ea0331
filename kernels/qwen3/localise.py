"""Which layer of a chain went wrong first, and what it read instead, told from the cache rows that every layer leaves.

The key and value rows of a layer follow from its input hidden states and its weights alone. So the rows say which state a layer
saw: the one it should have, an earlier one, the kernel's first input, half of one, or zeros; or which layer's weights it used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from conformance.contract.dims import Dims
from conformance.contract.stage import Tensors, layer_of
from conformance.kernels.qwen3 import reference
from conformance.kernels.qwen3.layout import Layout
from conformance.kernels.qwen3.reference import weights_of
from conformance.numerics.arithmetic import CONTRACT

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
    layout = Layout.of(inputs, dims)
    states = [inputs["hidden_states"].double()]
    causes: list[str] = []
    for layer in range(dims.L):
        rows = layout.rows(layer)
        found = tuple(outputs[name][rows].double() for name in ("k_cache", "v_cache"))
        if all(torch.equal(outputs[name][rows], inputs[name][rows]) for name in ("k_cache", "v_cache")):
            causes.append(f"layer {layer} wrote no cache rows")
            return causes
        match = next((guess for guess in _guesses(states, layer, dims) if _explains(guess, found, inputs, layout)), None)
        if match is None:
            causes.append(f"layer {layer} is the first whose cache rows follow from no state that it could have read")
            return causes
        if match.text:
            causes.append(f"layer {layer} {match.text}")
        states.append(_simulate(match, layer, inputs, layout))
    result, expected = _results(inputs, outputs, states, layout)
    if not _close(result, expected[-1]):
        about = _about_result("out" if "out" in outputs else "logits", result, expected, dims, seen_before=bool(causes))
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


def _explains(guess: _Guess, found: tuple[torch.Tensor, ...], inputs: Tensors, layout: Layout) -> bool:
    dims = layout.dims
    weights = weights_of(inputs, guess.weights_of, dims)
    (x,) = reference.rms_norm(guess.hidden, weights["input_rms_weight"], dims=dims, a=CONTRACT)
    k, v = CONTRACT.matmul(x, weights["wk"]), CONTRACT.matmul(x, weights["wv"])
    # The value row is a projection of the state; the key row went through norm and rotation as well.
    _, k = reference.qk_norm(k, k, weights["k_norm_weight"], weights["k_norm_weight"], dims=dims, a=CONTRACT)
    _, k = reference.rope(k, k, layout.length, inputs["rope_cos"], inputs["rope_sin"], dims=dims, a=CONTRACT)
    return _close(found[1], v.reshape(-1, dims.D)) and _close(found[0], k.reshape(-1, dims.D))


def _simulate(guess: _Guess, layer: int, inputs: Tensors, layout: Layout) -> torch.Tensor:
    dims = layout.dims
    caches = [layer_of(inputs[name], layer, dims.L) for name in ("k_cache", "v_cache")]
    weights = weights_of(inputs, guess.weights_of, dims)
    one = dataclasses.replace(layout, dims=dims.replace(L=1))
    _, _, out = reference.layer(guess.hidden, weights, inputs, one, *caches, a=CONTRACT)
    return out


def _results(
    inputs: Tensors, outputs: Tensors, states: list[torch.Tensor], layout: Layout
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the kernel returned, and what it would be if it came from each of the states: hidden states, or logits of them."""
    if "out" in outputs:
        return outputs["out"].double(), states
    head = {name: inputs[name] for name in ("final_norm_weight", "lm_head_weight")}
    logits = [reference.lm_head(state[layout.last], **head, dims=layout.dims, a=CONTRACT)[0] for state in states]
    return outputs["logits"].double(), logits


def _about_result(name: str, result: torch.Tensor, expected: list[torch.Tensor], dims: Dims, seen_before: bool) -> str:
    what = "is" if name == "out" else "follow from"
    for earlier in range(len(expected) - 2, -1, -1):
        if _close(result, expected[earlier]):
            return f"{name} {what} {_name(earlier)}, not layer {dims.L - 1}'s output"
    if name == "out":
        for text, mixed in _halves(expected, dims):
            if _close(result, mixed):
                return f"out holds only {text}"
    if seen_before:
        return ""
    behind = "attention, output projection or MLP" if name == "out" else "attention, output projection, MLP or LM head"
    if dims.L == 1:
        return f"the cache rows are right, the fault lies behind them: {behind}"
    return f"every layer's cache rows are right, the fault lies behind those of layer {dims.L - 1}"


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors agree row by row, up to honest rounding; rows that are not finite do not."""
    error = (found - expected).norm(dim=-1)
    return bool((error <= SAME * expected.norm(dim=-1) + 1e-30).all())
