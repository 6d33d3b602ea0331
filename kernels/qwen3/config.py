"""Dimensions of Qwen3 models.

``qwen3_14b`` is the public Qwen3-14B configuration; ``tiny`` is small enough for an interpreter; ``awkward`` has an odd number
of heads of which five share one KV head, as there, a small head, lengths no page divides, and a hidden size, an intermediate size
and a vocabulary that no tile divides. Its ``G`` is not its ``NKV``: in ``tiny`` they are equal, and a kernel that takes KV head
``h // NKV`` for ``h // G`` is right there. ``B``, ``L``, ``NB`` and ``T`` are upper limits: a case draws them.
"""

from __future__ import annotations

from conformance.contract.dims import Dims

TINY = Dims(B=16, NH=4, NKV=2, D=64, I=512, V=512, L=8, S=128, BS=16, NB=136, T=64)
AWKWARD = Dims(B=16, NH=15, NKV=3, D=16, I=360, V=500, L=3, S=76, BS=8, NB=168, T=40)
QWEN3_14B = Dims(B=16, NH=40, NKV=8, D=128, I=17408, V=151936, L=40, S=4096, BS=128, NB=520, T=256)

PRESETS: dict[str, Dims] = {"tiny": TINY, "awkward": AWKWARD, "qwen3_14b": QWEN3_14B}
