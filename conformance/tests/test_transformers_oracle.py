"""The whole-model references against ``transformers``: packed and chunked prefill, paged and contiguous decode, greedy tokens.

The weights reach the reference through a checkpoint that ``transformers`` saved, so what agrees here is the loader's layout, the
reference's formulas and the meaning of every argument that says where a token stands. Both sides compute in float64, but in
``transformers`` norms, softmax and rotation angles are fp32 whatever the dtype. Left as it is, it agrees to fp32's rounding; with
these steps widened and its own rotation tables, to float64's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.cases.source import Source
from conformance.contract.dims import Dims
from conformance.contract.registry import stages
from conformance.kernels.qwen3 import reference
from conformance.kernels.qwen3.config import Qwen3Dims
from conformance.kernels.qwen3.generation.checkpoint import Checkpoint
from conformance.kernels.qwen3.layout import Layout
from conformance.kernels.qwen3.rotation import rotation_table
from conformance.numerics.arithmetic import CONTRACT, EXACT
from conformance.tests.transformers_models import qwen3_model, wide_steps

Tensor = torch.Tensor

#: What a logit may differ by, as a part of the largest: measured is 8e-7 at most, and 4e-15 without the fp32 steps.
ALLOWED, ALLOWED_WIDE = 3e-6, 1e-12
#: Tokens that are generated; with them the second sequence goes on to a new page at once, the first and third later.
STEPS = 10
PROMPTS, FIRST_CHUNKS = (2, 8, 19), (1, 5, 8)
BS, S = 8, 40

_COMMON = {"B": len(PROMPTS), "S": S, "BS": BS, "NB": 1}
GEOMETRIES = {
    "as_0_6b": Qwen3Dims(NH=4, NKV=2, D=64, H=128, I=384, V=300, L=2, **_COMMON),
    "odd_heads": Qwen3Dims(NH=15, NKV=3, D=16, H=144, I=200, V=250, L=3, eps=1e-5, **_COMMON),
    "all_share": Qwen3Dims(NH=5, NKV=1, D=16, I=100, V=130, L=4, theta=1e4, **_COMMON),
}


@dataclasses.dataclass
class Generated:
    """A saved model and what ``transformers`` makes of it: for each prompt ``STEPS`` greedy tokens, appended to it in ``tokens``,
    and in ``logits`` those of every position, ``[len(prompt) + STEPS, V]``.
    """

    folder: Path
    model: Any
    tokens: list[list[int]]
    logits: list[Tensor]

    @classmethod
    def by(cls, model: Any, dims: Dims, folder: Path) -> Generated:
        model.save_pretrained(folder, max_shard_size="300KB")
        source = Source("prompts")
        tokens, logits = [], []
        for length in PROMPTS:
            prompt = torch.tensor([source.integers(f"prompt of {length}", 0, dims.V - 1, length)])
            sequence = model.generate(prompt, max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
            tokens.append(sequence[0].tolist())
            with torch.no_grad():  # once more without its cache: generate() hands logits out in fp32
                logits.append(model(sequence).logits[0])
        return cls(folder, model, tokens, logits)


Oracle = Callable[..., Generated]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """What a model of a geometry generates; made once."""

    @functools.cache
    def of(geometry: str, tied: bool = False) -> Generated:
        return Generated.by(qwen3_model(GEOMETRIES[geometry], tied=tied), GEOMETRIES[geometry], tmp_path_factory.mktemp("model"))

    return of


class Session:
    """The sequences as the reference stages serve them, on pages in no order; every cache row that nobody wrote is NaN."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder, B=len(PROMPTS), S=S, BS=BS)
        self.dims, self.arithmetic = checkpoint.dims, EXACT
        self.embedding = checkpoint.embed_tokens(torch.float64)
        self.inputs = checkpoint.weights(dtype=torch.float64) | checkpoint.rope_tables()
        self.pages = torch.tensor(Source("pages").permutation("pages", self.dims.NB)[: self.dims.B * self.dims.MB])
        self.pages = self.pages.view(self.dims.B, self.dims.MB)
        self.lengths = [0] * self.dims.B
        empty = self._empty(self.dims.L, self.dims.NB, self.dims.NKV, BS, self.dims.D)
        self.inputs |= {"k_cache": empty, "v_cache": empty}

    def prefill(self, chunks: Sequence[list[int]]) -> Tensor:
        """Logits ``[B, V]`` after the next tokens of every sequence, packed with the last sequence first."""
        packed: list[int] = []
        slots: list[int] = []
        offsets = [0] * self.dims.B
        for b in reversed(range(self.dims.B)):
            offsets[b] = len(packed)
            packed += chunks[b]
            slots += [self._slot(b, self.lengths[b] + index) for index in range(len(chunks[b]))]
            self.lengths[b] += len(chunks[b])
        chunk_lens = [len(chunk) for chunk in chunks]
        dims = self.dims.replace(T=len(packed))
        return self._run("prefill_fwd", packed, dims, chunk_lens=chunk_lens, chunk_offsets=offsets, slot_mapping=slots)

    def decode(self, tokens: list[int], *, paged: bool) -> Tensor:
        """Logits ``[B, V]`` after one more token of every sequence. Contiguous once, contiguous for good."""
        if not paged and "block_table" in self.inputs:
            del self.inputs["block_table"]
            self.inputs |= {name: self._contiguous(self.inputs[name]) for name in ("k_cache", "v_cache")}
        slots = [self._slot(b, length) for b, length in enumerate(self.lengths)]
        self.lengths = [length + 1 for length in self.lengths]
        if not paged:
            return self._run("decode_fwd", tokens, self.dims)
        return self._run("paged_decode_fwd", tokens, self.dims, slot_mapping=slots)

    def _run(self, stage: str, tokens: list[int], dims: Dims, **places: list[int]) -> Tensor:
        places["seq_lens"] = self.lengths
        if stage != "decode_fwd":
            places["block_table"] = [
                int(page) if j * BS < length else -1
                for row, length in zip(self.pages, self.lengths, strict=True)
                for j, page in enumerate(row)
            ]
        self.inputs |= {name: torch.tensor(place, dtype=torch.int32) for name, place in places.items()}
        self.inputs["hidden_states"] = self.embedding[tokens]
        results = stages()[stage].reference(self.inputs, dims, self.arithmetic)
        self.inputs |= {name: results[name] for name in ("k_cache", "v_cache")}
        return results["logits"]

    def _slot(self, sequence: int, position: int) -> int:
        return int(self.pages[sequence, position // BS]) * BS + position % BS

    def _empty(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=torch.float64).view(-1, self.dims.D)

    def _contiguous(self, cache: Tensor) -> Tensor:
        L, B, NB, NKV, D = (getattr(self.dims, name) for name in ("L", "B", "NB", "NKV", "D"))
        paged, moved = cache.view(L, NB, NKV, BS, D), self._empty(L, B, NKV, S, D).view(L, B, NKV, S, D)
        for b, length in enumerate(self.lengths):
            for position in range(length):
                moved[:, b, :, position] = paged[:, self.pages[b, position // BS], :, position % BS]
        return moved.view(-1, D)


def compare(session: Session, generated: Generated, mode: str) -> tuple[float, list[list[int]]]:
    """The largest difference of any logit, as a part of the largest logit of its dispatch, and the greedy tokens of each step.

    ``mode`` is ``paged`` or ``contiguous`` for the decode steps, or ``chunked``: paged, with prefill in two chunks. The tokens
    that go in are those that ``transformers`` generated, so that a wrong one does not hide how close the others are.
    """
    differences = []

    def judge(logits: Tensor) -> None:
        expected = torch.stack([wanted[length - 1] for wanted, length in zip(generated.logits, session.lengths, strict=True)])
        assert logits.dtype == expected.dtype == torch.float64
        differences.append(float((logits - expected).abs().max() / expected.abs().max()))

    done = [0] * len(PROMPTS)
    for ends in [FIRST_CHUNKS, PROMPTS] if mode == "chunked" else [PROMPTS]:
        logits = session.prefill([ids[start:end] for ids, start, end in zip(generated.tokens, done, ends, strict=True)])
        judge(logits)
        done = list(ends)
    sampled = []
    for step in range(STEPS):
        sampled.append(stages()["greedy_sample"].reference({"logits": logits}, session.dims, EXACT)["token_ids"].int().tolist())
        tokens = [ids[length + step] for ids, length in zip(generated.tokens, PROMPTS, strict=True)]
        if step < STEPS - 1:
            logits = session.decode(tokens, paged=mode != "contiguous")
            judge(logits)
    return max(differences), [list(tokens) for tokens in zip(*sampled, strict=True)]


def continuations(generated: Generated) -> list[list[int]]:
    return [ids[length:] for ids, length in zip(generated.tokens, PROMPTS, strict=True)]


@pytest.mark.parametrize("mode", ["paged", "chunked", "contiguous"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_prefill_and_decode_agree_with_transformers(oracle: Oracle, geometry: str, tied: bool, mode: str) -> None:
    generated = oracle(geometry, tied)
    difference, tokens = compare(Session(generated.folder), generated, mode)
    assert difference < ALLOWED
    assert tokens == continuations(generated)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_only_the_fp32_steps_of_transformers_part_us(tmp_path: Path, geometry: str) -> None:
    """Its norms and softmax widened, and its angles in our tables: then nothing but float64's rounding is left."""
    model = qwen3_model(GEOMETRIES[geometry])
    with wide_steps():
        generated = Generated.by(model, GEOMETRIES[geometry], tmp_path)
    session = Session(generated.folder)
    cosine, sine = (table[0] for table in model.model.rotary_emb(generated.logits[0], torch.arange(S)[None]))
    for name, table in (("rope_cos", cosine), ("rope_sin", sine)):
        # An fp32 angle is off by half a unit in its last place, and so is the frequency it came from.
        assert float((session.inputs[name] - table).abs().max()) < S * 2.0**-24
        session.inputs[name] = table
    difference, tokens = compare(session, generated, "chunked")
    assert difference < ALLOWED_WIDE
    assert tokens == continuations(generated)


Patch = pytest.MonkeyPatch


def rope_of(query_shift: int = 0, interleaved: bool = False) -> Callable[..., tuple[Tensor, Tensor]]:
    original = reference.rope

    def rope(q: Tensor, k: Tensor, seq_lens: Tensor, *tables: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
        dims = keywords["dims"]
        if interleaved:
            q, k = (x.reshape(-1, dims.D // 2, 2).transpose(1, 2).reshape(x.shape) for x in (q, k))
        rotated_q, _ = original(q, k, seq_lens + query_shift, *tables, **keywords)
        return rotated_q, original(q, k, seq_lens, *tables, **keywords)[1]

    return rope


def without_q_norm(patch: Patch, session: Session) -> None:
    original = reference.qk_norm
    patch.setattr(reference, "qk_norm", lambda q, k, *weights, **keywords: (q, original(q, k, *weights, **keywords)[1]))


def with_layout(change: Callable[[Layout], Layout]) -> Callable[[Patch, Session], None]:
    def apply(patch: Patch, session: Session) -> None:
        original = reference.attend
        patch.setattr(reference, "attend", lambda q, layout, *rest, **keywords: original(q, change(layout), *rest, **keywords))

    return apply


def with_strided_heads(patch: Patch, session: Session) -> None:
    original = reference.attend

    def attend(q: Tensor, *rest: Any, dims: Dims, **keywords: Any) -> Tensor:
        regrouped = q.view(-1, dims.G, dims.NKV, dims.D).transpose(1, 2).reshape(q.shape)
        attn = original(regrouped, *rest, dims=dims, **keywords)
        return attn.view(-1, dims.NKV, dims.G, dims.D).transpose(1, 2).reshape(q.shape)

    patch.setattr(reference, "attend", attend)


def with_other_theta(patch: Patch, session: Session) -> None:
    cosine, sine = rotation_table(S, session.dims.D, session.dims.theta * 1.01)
    session.inputs |= {"rope_cos": cosine, "rope_sin": sine}


def swapped(one: str, other: str) -> Callable[[Patch, Session], None]:
    def apply(patch: Patch, session: Session) -> None:
        session.inputs |= {one: session.inputs[other], other: session.inputs[one]}

    return apply


def decode_one_position_late(patch: Patch, session: Session) -> None:
    # At decode alone: attention sees relative positions, so one late everywhere is not even wrong.
    original = reference.rope

    def rope(q: Tensor, k: Tensor, seq_lens: Tensor, *tables: Tensor, dims: Dims, **keywords: Any) -> tuple[Tensor, Tensor]:
        return original(q, k, seq_lens + int(len(seq_lens) == dims.B), *tables, dims=dims, **keywords)

    patch.setattr(reference, "rope", rope)


FAULTS: dict[str, Callable[[Patch, Session], object]] = {
    "no q_norm": without_q_norm,
    "q_norm and k_norm swapped": swapped("q_norm_weight", "k_norm_weight"),
    "gate and up swapped": swapped("w_gate", "w_up"),
    "norms of a layer swapped": swapped("input_rms_weight", "post_rms_weight"),
    "no final norm weight": lambda patch, session: session.inputs["final_norm_weight"].fill_(1),
    "ten times the eps": lambda patch, session: setattr(session, "dims", session.dims.replace(eps=10 * session.dims.eps)),
    "theta 1% off": with_other_theta,
    "query one position late": lambda patch, session: patch.setattr(reference, "rope", rope_of(query_shift=1)),
    "decode one position late": decode_one_position_late,
    "rope of neighbours": lambda patch, session: patch.setattr(reference, "rope", rope_of(interleaved=True)),
    "query heads share by stride": with_strided_heads,
    "prefill sees the future": with_layout(lambda layout: dataclasses.replace(layout, length=layout.seq_lens[layout.sequence])),
    "newest row not seen": with_layout(lambda layout: dataclasses.replace(layout, length=(layout.length - 1).clamp(min=1))),
    "bf16 rounding": lambda patch, session: setattr(session, "arithmetic", CONTRACT),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_wrong_detail_is_told_apart(oracle: Oracle, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The comparison can fail: every wrong detail that a reference might have is ten times what is allowed, or more."""
    generated = oracle("odd_heads")
    session = Session(generated.folder)
    FAULTS[fault](monkeypatch, session)
    difference, _ = compare(session, generated, "chunked")
    assert difference > 10 * ALLOWED
