"""Hugging Face Qwen3 checkpoints, as the contract's stacked weights.

A checkpoint is a folder with ``config.json`` and either ``model.safetensors`` or shards that ``model.safetensors.index.json``
names. Opening one reads the configuration and the headers of the files and checks every tensor's name, shape and dtype; data is
read only afterwards, a tensor at a time. So a checkpoint that is not whole is refused before anything of it is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from conformance.cases.case import require_room
from conformance.cases.source import Source
from conformance.contract.dims import Dims
from conformance.errors import UsageError
from conformance.kernels.qwen3.config import Qwen3Dims
from conformance.kernels.qwen3.rotation import rotation_table
from conformance.numerics.ulp import rounded
from conformance.outside import read_bytes, require_path

Tensor = torch.Tensor

#: Longest configuration or index, in bytes, and most layers: beyond what anyone has, and read or gone through in a moment.
LONGEST_JSON, MOST_LAYERS = 64 << 20, 10_000

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

#: The contract's symbols for the sizes in a configuration.
_SIZES = {
    "H": "hidden_size",
    "NH": "num_attention_heads",
    "NKV": "num_key_value_heads",
    "D": "head_dim",
    "I": "intermediate_size",
    "V": "vocab_size",
    "L": "num_hidden_layers",
    "S": "max_position_embeddings",
}
#: Formats that hold weights by themselves; 8-bit ones need scales, which the contract has no argument for.
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
#: The inverse frequencies of RoPE, which some exporters save; they follow from the configuration.
_HARMLESS_SUFFIX = "rotary_emb.inv_freq"


def layer_tensors(dims: Dims) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A layer's weights by the contract's names: the checkpoint's name after ``model.layers.N.``, and the shape stored.

    A checkpoint stores projections ``[out, in]``, the contract ``[in, out]``; norm weights have one axis in a checkpoint.
    """
    H, D, I = dims.H, dims.D, dims.I  # noqa: E741  the contract's symbol
    return {
        "input_rms_weight": ("input_layernorm.weight", (H,)),
        "wq": ("self_attn.q_proj.weight", (dims.NH * D, H)),
        "wk": ("self_attn.k_proj.weight", (dims.NKV * D, H)),
        "wv": ("self_attn.v_proj.weight", (dims.NKV * D, H)),
        "q_norm_weight": ("self_attn.q_norm.weight", (D,)),
        "k_norm_weight": ("self_attn.k_norm.weight", (D,)),
        "wo": ("self_attn.o_proj.weight", (H, dims.NH * D)),
        "w_gate": ("mlp.gate_proj.weight", (I, H)),
        "w_up": ("mlp.up_proj.weight", (I, H)),
        "w_down": ("mlp.down_proj.weight", (H, I)),
        "post_rms_weight": ("post_attention_layernorm.weight", (H,)),
    }


def checkpoint_tensors(dims: Dims, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of these dimensions holds, by name: its shape. A tied one has no head of its own."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (dims.V, dims.H)}
    for layer in range(dims.L):
        shapes |= {f"model.layers.{layer}.{suffix}": shape for suffix, shape in layer_tensors(dims).values()}
    shapes[FINAL_NORM] = (dims.H,)
    if not tied:
        shapes[HEAD] = (dims.V, dims.H)
    return shapes


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; ``dims`` are those of its configuration. ``file_of`` names the file that holds each tensor."""

    folder: Path
    dims: Dims
    tied: bool
    file_of: Mapping[str, Path]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, B: int = 16, S: int | None = None, BS: int = 128) -> Checkpoint:
        """Check a checkpoint and return it, ready to be read.

        ``B`` is the batch to be served, ``BS`` the tokens of a KV page, ``S`` the length to be served: at most the
        configuration's ``max_position_embeddings``, which is the default. ``NB`` is enough pages for ``B`` sequences of length
        ``S``, and one more. Raises ``UsageError`` if the folder holds no Qwen3 checkpoint, if it is one that the contract
        cannot express, or if any tensor is missing, misshapen, of a dtype that is no weight's, or unknown. A checkpoint that says
        it is tied and holds a head nevertheless is the only one of which data is read, to see that the two are equal.
        """
        folder = Path(folder)
        dims, tied = _dims_of(folder / CONFIG)
        limit = dims.S
        dims = dims.replace(B=B, S=limit if S is None else S, BS=BS)
        if dims.S > limit:  # noqa: SIM300  "S" is a dimension, not a constant
            raise UsageError(f"{folder / CONFIG}: S must be at most max_position_embeddings, {limit}, found S={S}")
        headers = _headers(folder)
        _check_tensors(headers, dims, tied)
        file_of = {name: file for file, header in headers.items() for name in header}
        checkpoint = cls(folder, dims.replace(NB=dims.B * dims.MB + 1), tied, file_of)
        if tied and HEAD in file_of:
            checkpoint._check_tied()
        return checkpoint

    def weights(
        self, first_layer: int = 0, layers: int | None = None, dtype: torch.dtype | None = None, *, head: bool = True
    ) -> dict[str, Tensor]:
        """The weights of ``layers`` layers from ``first_layer`` on (by default all that follow), by the contract's names.

        Stacked along the first axis as the contract lays them out: projections bf16 ``[layers * in, out]``, norm weights fp32
        ``[layers, width]``; then, unless ``head`` is false, ``final_norm_weight [1, H]`` and ``lm_head_weight [V, H]``. Wider
        checkpoints are rounded. ``dtype`` gives everything in one dtype instead: ``torch.float64`` loses nothing of any
        checkpoint. Reads the layers asked for and no others; raises ``UsageError`` for layers that the model does not have.
        """
        layers = self.dims.L - first_layer if layers is None else layers
        if first_layer < 0 or layers < 1 or first_layer + layers > self.dims.L:
            wanted = f"first_layer={first_layer}, layers={layers}"
            raise UsageError(f"{self.folder}: expected a range of the model's {self.dims.L} layers, found {wanted}")
        result: dict[str, Tensor] = {}
        for name, (suffix, shape) in layer_tensors(self.dims).items():
            rows, columns = (shape[1], shape[0]) if len(shape) == 2 else (1, shape[0])
            stacked = torch.empty(layers * rows, columns, dtype=_dtype_for(shape, dtype))
            for layer in range(layers):
                stored = self._read_rounded(f"model.layers.{first_layer + layer}.{suffix}", stacked.dtype)
                stacked[layer * rows : (layer + 1) * rows] = stored.T if len(shape) == 2 else stored
            result[name] = stacked
        if head:
            result["final_norm_weight"] = self._read_copy(FINAL_NORM, (self.dims.H,), dtype).unsqueeze(0)
            result["lm_head_weight"] = self._read_copy(EMBEDDING if self.tied else HEAD, (self.dims.V, self.dims.H), dtype)
        return result

    def embed_tokens(self, dtype: torch.dtype | None = None) -> Tensor:
        """The embedding of every token, ``[V, H]``; bf16 unless a ``dtype`` is given."""
        return self._read_copy(EMBEDDING, (self.dims.V, self.dims.H), dtype)

    def rope_tables(self) -> dict[str, Tensor]:
        """``rope_cos`` and ``rope_sin``, fp32 ``[S, D]``."""
        require_room(24 * self.dims.S * self.dims.D, f"RoPE tables of {self.dims.S:,} positions")
        cosine, sine = rotation_table(self.dims.S, self.dims.D, self.dims.theta)
        return {"rope_cos": cosine.float(), "rope_sin": sine.float()}

    def _check_tied(self) -> None:
        # Some exporters save a tied head as well; transformers believes one that differs rather than the configuration.
        embedding, head = self._stored(EMBEDDING), self._stored(HEAD)
        if embedding.dtype != head.dtype or not torch.equal(embedding, head):
            raise UsageError(
                f"{self.file_of[HEAD]}: {HEAD} differs from {EMBEDDING}, found tie_word_embeddings true in {CONFIG}; "
                "set it to false if the head is to count, or remove the head"
            )

    def _read_copy(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        # A copy: what safetensors returns is the mapped file, and would change or fail with it.
        result = torch.empty(shape, dtype=_dtype_for(shape, dtype))
        return result.copy_(self._read_rounded(name, result.dtype))

    def _read_rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, rounded at most once."""
        stored = self._stored(name)
        if stored.dtype == torch.float64 and dtype == torch.bfloat16:
            stored = rounded(stored, dtype)  # the cast alone would go through fp32 and round twice
        return stored.to(dtype)

    def _stored(self, name: str) -> Tensor:
        """One tensor as it stands in the mapped file."""
        file = self.file_of[name]
        try:
            with safe_open(file, framework="pt") as opened:
                stored: Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file}: {name} was there and cannot be read: {error}; was the file changed meanwhile?") from error
        return stored


def _dtype_for(shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (torch.bfloat16 if len(shape) == 2 else torch.float32)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path, LONGEST_JSON))
    except OSError as error:
        raise UsageError(f"{path}: expected a file of a Hugging Face checkpoint, found {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
        raise UsageError(f"{path}: expected JSON, found something else: {error}; copy or download it again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _dims_of(path: Path) -> tuple[Dims, bool]:
    """The dimensions of a configuration with ``B`` and ``BS`` left at 1, and whether the head is the embedding."""
    config = _json(path)
    if config.get("model_type") != "qwen3":
        raise UsageError(f"{path}: expected model_type 'qwen3', found {config.get('model_type')!r}: only dense Qwen3 models load")

    def number(key: str, where: dict[str, Any] = config, *, whole: bool = True) -> Any:
        value = where.get(key)
        allowed = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < 1e30:
            kind = "a positive whole number" if whole else "a positive number"
            raise UsageError(f"{path}: expected {kind} as {key}, found {value!r}")
        return value

    # transformers 5 keeps rope_theta inside rope_parameters; before, it stood beside an optional rope_scaling.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UsageError(f"{path}: expected an object as rope_parameters, found {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    sizes = {symbol: number(key) for symbol, key in _SIZES.items()}
    if sizes["L"] > MOST_LAYERS:
        raise UsageError(f"{path}: expected at most {MOST_LAYERS:,} as {_SIZES['L']}, found {sizes['L']}")
    layer_types = config.get("layer_types")
    unsupported = {
        "rope scaling": (rope_type, rope_type == "default"),
        "attention_bias": (config.get("attention_bias"), not config.get("attention_bias")),
        "hidden_act": (config.get("hidden_act"), config.get("hidden_act", "silu") == "silu"),
        "use_sliding_window": (config.get("use_sliding_window"), not config.get("use_sliding_window")),
        "layer_types": (layer_types, layer_types in (None, ["full_attention"] * sizes["L"])),
        "quantization_config": (config.get("quantization_config"), not config.get("quantization_config")),
    }
    for key, (value, expressible) in unsupported.items():
        if not expressible:
            raise UsageError(f"{path}: the contract has no place for {key}, found {value!r}; use a checkpoint without it")
    theta = number("rope_theta", rope if "rope_theta" in rope else config, whole=False)
    eps = number("rms_norm_eps", whole=False)
    try:
        dims = Qwen3Dims(**sizes, B=1, BS=1, NB=1, eps=eps, theta=theta)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return dims, bool(config.get("tie_word_embeddings", False))


_Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of each tensor of a file


def _headers(folder: Path) -> dict[Path, _Header]:
    """The header of every file of weights, after checking that the index, if there is one, tells the truth."""
    if (folder / SINGLE_FILE).exists():
        return {folder / SINGLE_FILE: _header(folder / SINGLE_FILE)}
    index = folder / INDEX
    if not index.exists():
        raise UsageError(f"{folder}: expected {SINGLE_FILE}, or {INDEX} and its shards, found neither")
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UsageError(f"{index}: expected a weight_map from tensor names to file names, found {type(weight_map).__name__}")
    if not weight_map:
        raise UsageError(f"{index}: expected a weight_map that names the model's tensors, found an empty one")
    shards = {name: folder / name for name in sorted(set(weight_map.values()))}
    for name, path in shards.items():
        require_path(path)
        if Path(name).name != name:
            raise UsageError(f"{index}: expected the name of a file in the same folder, found {name!r}")
        if not path.exists():
            held = [tensor for tensor, shard in weight_map.items() if shard == name]
            raise UsageError(f"{path}: this shard is named by {INDEX} but absent; it holds {_names(held)}")
    headers = {path: _header(path) for path in shards.values()}
    for tensor, shard in weight_map.items():
        path = shards[shard]
        if tensor not in headers[path]:
            unnamed = [name for name in headers[path] if name not in weight_map]
            raise UsageError(f"{path}: expected {tensor}, which {INDEX} says it holds; not there{_suggestion(tensor, unnamed)}")
    for path, header in headers.items():
        for tensor in header:
            if weight_map.get(tensor) != path.name:
                raise UsageError(f"{path}: holds {tensor}, but {INDEX} does not say so; was the index made for other shards?")
    return headers


def _header(path: Path) -> _Header:
    if not path.is_file():
        raise UsageError(f"{path}: expected a whole safetensors file, found something that is no regular file")
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        # safetensors itself checks that the tensors of the header cover the file exactly.
        raise UsageError(
            f"{path}: expected a whole safetensors file, found {path.stat().st_size} bytes that are none ({error}); "
            "copy or download it again"
        ) from error


def _check_tensors(headers: Mapping[Path, _Header], dims: Dims, tied: bool) -> None:
    expected = checkpoint_tensors(dims, tied=tied)
    found = {name: (path, *entry) for path, header in headers.items() for name, entry in header.items()}
    # A tied checkpoint may hold its head as well: it is the embedding once more, and not read.
    allowed = expected | ({HEAD: (dims.V, dims.H)} if tied else {})
    unknown = [name for name in found if name not in allowed and not name.endswith(_HARMLESS_SUFFIX)]
    missing = [name for name in expected if name not in found]
    if missing:
        where = next(iter(headers)) if len(headers) == 1 else next(iter(headers)).parent / INDEX
        hint = _suggestion(missing[0], unknown)
        if missing == [HEAD]:
            hint = f": {CONFIG} says tie_word_embeddings is false"
        raise UsageError(f"{where}: expected {len(expected)} tensors, {_names(missing)} missing{hint}")
    if unknown:
        path = found[unknown[0]][0]
        raise UsageError(f"{path}: the contract has no place for {_names(unknown)}, and without it results would differ")
    for name, shape in allowed.items():
        if name not in found:
            continue
        path, dtype, stored = found[name]
        if stored != shape:
            raise UsageError(f"{path}: {name} has the wrong shape: expected {list(shape)} by {CONFIG}, found {list(stored)}")
        if dtype not in _DTYPES:
            raise UsageError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(_DTYPES)}")


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _suggestion(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [one for one in candidates if len(one) < 200][:1000], n=1, cutoff=0.6)
    return f"; found {close[0]}, which is no Qwen3 name: rename it?" if close else ""


def random_checkpoint(folder: str | os.PathLike[str], dims: Dims, seed: int = 0, *, tied: bool = False) -> None:
    """Write a small checkpoint with random bf16 weights, the same for a seed on every machine; ``Checkpoint.open`` reads it.

    ``S`` becomes ``max_position_embeddings``; ``B``, ``BS`` and ``NB`` are no part of a checkpoint. The model is a lively one:
    hidden states are of order 1, norm weights are spread by 0.3 (around 1, those of queries around 2), logits are spread by about
    2.5 and what is generated varies. Everything is in memory at once. Raises ``UsageError`` if the folder already holds a file of
    a checkpoint.
    """
    folder = Path(folder)
    for name in (CONFIG, SINGLE_FILE, INDEX):
        if (folder / name).exists():
            raise UsageError(f"{folder / name}: already there; name a new folder")
    source = Source(f"checkpoint/{seed}")
    shapes = checkpoint_tensors(dims, tied=tied)
    require_room(2 * sum(math.prod(shape) for shape in shapes.values()), "a model of these sizes")
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            # Sharper queries, or attention would average the prompt away and every sequence would soon repeat one token.
            centre = 2.0 if name.endswith("q_norm.weight") else 1.0
            tensors[name] = (centre + 0.3 * source.normal(name, shape)).to(torch.bfloat16)
        elif name == EMBEDDING and not tied:
            tensors[name] = source.grid(name, shape, 1.0)
        else:
            # Tied, the embedding must be as small as a head, or every token would only predict itself.
            gain = 2.0 if name in (EMBEDDING, HEAD) else 1.0
            tensors[name] = source.grid(name, shape, gain * shape[1] ** -0.5)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": dims.V,
        "hidden_size": dims.H,
        "intermediate_size": dims.I,
        "num_hidden_layers": dims.L,
        "num_attention_heads": dims.NH,
        "num_key_value_heads": dims.NKV,
        "head_dim": dims.D,
        "hidden_act": "silu",
        "max_position_embeddings": dims.S,
        "rms_norm_eps": dims.eps,
        "rope_theta": dims.theta,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The configuration last: without it the folder is no checkpoint, should writing be cut short.
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
