"""Checkpoints that transformers writes are read right, and broken ones are refused on opening, in one clear line."""

from __future__ import annotations

import json
import math
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conformance import UsageError
from conformance.contract.registry import stages
from conformance.kernels.qwen3.config import PRESETS, Qwen3Dims
from conformance.kernels.qwen3.generation.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE_FILE,
    Checkpoint,
    checkpoint_tensors,
    random_checkpoint,
)
from conformance.numerics.ulp import rounded
from conformance.tests.transformers_models import LAYER_MODULES, qwen3_model

Tensor = torch.Tensor

#: The hidden size is not NH * D: every shape says which of the two it means.
DIMS = Qwen3Dims(B=16, NH=3, NKV=1, D=16, H=32, I=40, V=50, L=3, S=64, BS=128, NB=17, eps=1e-5, theta=5e5)
WHOLE, SMALL = "1GB", "10KB"  # sizes of shards: one file, and eight or more
HEAD, EMBEDDING, QUERY = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders that ``save_pretrained`` wrote, each written once."""
    folders: dict[object, Path] = {}

    def folder_of(tied: bool = False, dtype: torch.dtype = torch.bfloat16, shards: str = WHOLE) -> Path:
        key = (tied, dtype, shards)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("saved")
            qwen3_model(DIMS, tied=tied, dtype=dtype).save_pretrained(folders[key], max_shard_size=shards)
        return folders[key]

    return folder_of


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]  # type: ignore[no-any-return]


def assert_refused(folder: Path, expected: str, **options: Any) -> None:
    """Opening is refused with one line that says ``expected``, a regular expression."""
    with pytest.raises(UsageError, match=expected) as caught:
        Checkpoint.open(folder, **options)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shards", [WHOLE, SMALL])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_tensor_is_where_the_contract_wants_it(
    saved: Callable[..., Path], dtype: torch.dtype, tied: bool, shards: str
) -> None:
    folder = saved(tied, dtype, shards)
    assert (folder / INDEX).exists() == (shards == SMALL)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.dims == DIMS
    state = qwen3_model(DIMS, tied=tied, dtype=dtype).state_dict()
    exact = {
        name: [state[f"model.layers.{layer}.{path}.weight"] for layer in range(DIMS.L)] for name, path in LAYER_MODULES.items()
    }
    wide = {name: torch.cat([part.T if part.dim() == 2 else part[None] for part in parts]) for name, parts in exact.items()}
    wide["final_norm_weight"] = state["model.norm.weight"][None]
    wide["lm_head_weight"] = state[HEAD]

    arguments = {argument.name: argument for argument in stages()["decode_fwd"].arguments}
    weights = checkpoint.weights()
    assert list(weights) == [name for name in arguments if name in wide]
    for name, weight in weights.items():
        assert weight.dtype == arguments[name].dtype
        assert tuple(weight.shape) == arguments[name].size(checkpoint.dims)
        assert torch.equal(weight.double(), rounded(wide[name].double(), weight.dtype))
    for name, weight in checkpoint.weights(dtype=torch.float64).items():
        assert torch.equal(weight, wide[name].double())
    assert torch.equal(checkpoint.embed_tokens().double(), rounded(state[EMBEDDING].double(), torch.bfloat16))
    assert torch.equal(checkpoint.embed_tokens(torch.float64), state[EMBEDDING].double())


def test_only_the_layers_asked_for_are_read(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(saved(shards=SMALL), tmp_path)
    checkpoint = Checkpoint.open(folder)
    everything = checkpoint.weights()
    needed = {shard for name, shard in weight_map(folder).items() if name.startswith("model.layers.1.")}
    unneeded = set(weight_map(folder).values()) - needed
    assert unneeded
    for shard in unneeded:
        (folder / shard).unlink()
    middle = checkpoint.weights(1, 1, head=False)
    assert "lm_head_weight" not in middle
    for name, weight in middle.items():
        assert torch.equal(weight, everything[name].chunk(DIMS.L)[1])
    with pytest.raises(UsageError, match=r"cannot be read.*No such file"):
        checkpoint.weights()


@pytest.mark.parametrize(("first", "layers"), [(0, 4), (2, 2), (3, None), (-1, 1), (0, 0)])
def test_layers_that_the_model_does_not_have(saved: Callable[..., Path], first: int, layers: int | None) -> None:
    with pytest.raises(UsageError, match="expected a range of the model's 3 layers"):
        Checkpoint.open(saved()).weights(first, layers)


def test_what_is_served_is_the_callers_choice(saved: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(saved(), B=3, S=40, BS=16)
    assert checkpoint.dims == DIMS.replace(B=3, S=40, BS=16, NB=3 * 3 + 1)
    tables = checkpoint.rope_tables()
    angle = torch.arange(40.0).double()[:, None] * DIMS.theta ** (-torch.arange(0, 16, 2).double() / 16)
    for name, expected in (("rope_cos", angle.cos()), ("rope_sin", angle.sin())):
        assert tables[name].dtype == torch.float32
        assert torch.allclose(tables[name].double(), expected.repeat(1, 2), rtol=0, atol=1e-7)
    assert_refused(saved(), "S must be at most max_position_embeddings, 64, found S=65", S=65)
    with pytest.raises(UsageError, match="dimension BS must be a positive whole number, found 0"):
        Checkpoint.open(saved(), BS=0)


#: The published models: whether the head is the embedding, and their parameters in billions, with and without the embedding, as
#: their model cards give them.
PUBLISHED = {
    "qwen3_0_6b": (True, 0.6, 0.44),
    "qwen3_1_7b": (True, 1.7, 1.4),
    "qwen3_4b": (True, 4.0, 3.6),
    "qwen3_8b": (False, 8.2, 6.95),
    "qwen3_14b": (False, 14.8, 13.2),
    "qwen3_32b": (False, 32.8, 31.2),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_parameters_of_the_published_models(preset: str) -> None:
    tied, billions, without_embedding = PUBLISHED[preset]
    sizes = {name: math.prod(shape) for name, shape in checkpoint_tensors(PRESETS[preset], tied=tied).items()}
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions, abs=0.05)
    rest = sum(size for name, size in sizes.items() if name not in (EMBEDDING, HEAD))
    assert rest / 1e9 == pytest.approx(without_embedding, abs=0.05)


@pytest.mark.parametrize("preset", ["qwen3_14b", "qwen3_32b"])
def test_real_geometry_is_opened_by_its_headers_alone(tmp_path: Path, preset: str) -> None:
    """Shards without contents: 30 and 66 GB that take no room on the disk and must take none in memory."""
    dims, shards = PRESETS[preset], 8
    names = list(checkpoint_tensors(dims, tied=False).items())
    index = {}
    for shard in range(shards):
        header, end = {}, 0
        for name, shape in names[shard * len(names) // shards : (shard + 1) * len(names) // shards]:
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
            index[name] = f"model-{shard}.safetensors"
        text = json.dumps(header).encode()
        with open(tmp_path / f"model-{shard}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    random_checkpoint(tmp_path / "config", DIMS)
    config = json.loads((tmp_path / "config" / CONFIG).read_text())
    sizes = {"hidden_size": dims.H, "intermediate_size": dims.I, "vocab_size": dims.V, "num_hidden_layers": dims.L}
    heads = {"num_attention_heads": dims.NH, "num_key_value_heads": dims.NKV, "head_dim": dims.D}
    (tmp_path / CONFIG).write_text(json.dumps(config | sizes | heads | {"max_position_embeddings": 40960}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    opened = Checkpoint.open(tmp_path, S=4096).dims
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # kB
    assert opened == dims.replace(NB=16 * 32 + 1, T=1, eps=DIMS.eps, theta=DIMS.theta)


def test_a_configuration_from_before_transformers_5(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(saved(), tmp_path)
    change_config(folder, rope_parameters=None, rope_scaling=None, rope_theta=10000, layer_types=None, sliding_window=4096)
    assert Checkpoint.open(folder).dims == DIMS.replace(theta=10000)


def test_what_changes_nothing_is_let_pass(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Saved inverse frequencies follow from the configuration; a tied head is the embedding once more."""
    folder = copy_of(saved(tied=True), tmp_path)
    extra = {"model.rotary_emb.inv_freq": torch.ones(8)}
    change_tensors(folder, lambda tensors: tensors.update(extra | {HEAD: tensors[EMBEDDING].clone()}))
    for name, weight in Checkpoint.open(folder).weights().items():
        assert torch.equal(weight, Checkpoint.open(saved(tied=True)).weights()[name])


def test_float64_is_rounded_once(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Just above a tie of bf16: by way of fp32 it would fall on the tie and be rounded to even, down."""
    folder = copy_of(saved(dtype=torch.float64), tmp_path)
    change_tensors(folder, lambda tensors: tensors[EMBEDDING].fill_(1 + 2.0**-8 + 2.0**-40))
    assert set(Checkpoint.open(folder).embed_tokens().flatten().tolist()) == {1 + 2.0**-7}


# What breaks a checkpoint in one file, and what the refusal must say.
BROKEN_FILE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(QUERY), rf"expected 36 tensors, {QUERY} missing$"),
    "missing_layer": (
        lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name],
        r"model\.layers\.2\.input_layernorm\.weight and 10 more missing",
    ),
    "renamed": (
        lambda t: t.update({QUERY.replace("q_proj", "query_proj"): t.pop(QUERY)}),
        rf"{QUERY} missing; found model\.layers\.1\.self_attn\.query_proj\.weight, which is no Qwen3 name",
    ),
    "misshapen": (
        lambda t: t.update({QUERY: t[QUERY][:-1].clone()}),
        rf"{QUERY} has the wrong shape: expected \[48, 32\] by config\.json, found \[47, 32\]",
    ),
    "head_missing": (lambda t: t.pop(HEAD), r"lm_head\.weight missing: config\.json says tie_word_embeddings is false"),
    "bias": (
        lambda t: t.update({QUERY.replace("weight", "bias"): torch.zeros(48)}),
        r"no place for model\.layers\.1\.self_attn\.q_proj\.bias",
    ),
    "one_layer_more": (
        lambda t: t.update({name.replace("layers.2", "layers.3"): t[name].clone() for name in list(t) if "layers.2" in name}),
        r"no place for model\.layers\.3\.\S+ and 10 more",
    ),
    "quantised": (
        lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)}),
        rf"{QUERY} has dtype F8_E4M3; expected one of BF16, F16, F32, F64",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_FILE)
def test_a_broken_file_is_refused(saved: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    folder = copy_of(saved(), tmp_path)
    change, expected = BROKEN_FILE[fault]
    change_tensors(folder, change)
    assert_refused(folder, r"^\S+/model\.safetensors: .*" + expected)


def test_a_tied_head_that_differs_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(saved(), tmp_path)
    change_config(folder, tie_word_embeddings=True)
    assert_refused(folder, r"model\.safetensors: lm_head\.weight differs from model\.embed_tokens\.weight")


@pytest.mark.parametrize("shards", [WHOLE, SMALL])
@pytest.mark.parametrize("left", [0, 100, 5000, -1])
def test_a_truncated_file_is_refused(saved: Callable[..., Path], tmp_path: Path, left: int, shards: str) -> None:
    folder = copy_of(saved(shards=shards), tmp_path)
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:left])
    assert_refused(folder, rf"{file.name}: expected a whole safetensors file, found {file.stat().st_size} bytes that are none")


def test_an_index_that_names_nothing_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(saved(shards=SMALL), tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    assert_refused(folder, f"{INDEX}: expected a weight_map that names the model's tensors, found an empty one")


def test_shards_and_their_index_must_agree(saved: Callable[..., Path], tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[dict[str, str]], object]) -> Path:
        folder = copy_of(saved(shards=SMALL), tmp_path / name)
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))
        return folder

    shard_of = weight_map(saved(shards=SMALL))
    shard, other = shard_of[QUERY], shard_of[HEAD]
    assert shard != other

    absent = copy_of(saved(shards=SMALL), tmp_path / "absent")
    (absent / shard).unlink()
    assert_refused(absent, rf"{shard}: this shard is named by {INDEX} but absent; it holds model\.layers\S+( and \d more)?$")

    moved = broken("moved", lambda names: names.update({QUERY: other}))
    assert_refused(moved, rf"{other}: expected {QUERY}, which {INDEX} says it holds; not there$")
    forgotten = broken("forgotten", lambda names: names.pop(QUERY))
    assert_refused(forgotten, rf"{shard}: holds {QUERY}, but {INDEX} does not say so")
    outside = broken("outside", lambda names: names.update({QUERY: f"../{shard}"}))
    assert_refused(outside, rf"{INDEX}: expected the name of a file in the same folder, found '\.\./{shard}'")
    unnamed = broken("unnamed", lambda names: names.update({QUERY: None}))  # type: ignore[dict-item]
    assert_refused(unnamed, rf"{INDEX}: expected a weight_map from tensor names to file names")

    # The index is right about the old name; the shard has another.
    renamed = copy_of(saved(shards=SMALL), tmp_path / "renamed")
    tensors = load_file(renamed / shard)
    tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(QUERY)
    save_file(tensors, renamed / shard)
    assert_refused(renamed, rf"{shard}: expected {QUERY}, .* not there; found model\.layers\.1\.self_attn\.query\.weight")

    # Both agree that there is no such tensor.
    missing = broken("missing", lambda names: names.pop(QUERY))
    tensors = load_file(missing / shard)
    tensors.pop(QUERY)
    save_file(tensors, missing / shard)
    assert_refused(missing, rf"{INDEX}: expected 36 tensors, {QUERY} missing$")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen3_moe"}, "expected model_type 'qwen3', found 'qwen3_moe'"),
        ({"attention_bias": True}, "no place for attention_bias, found True"),
        ({"hidden_act": "gelu"}, "no place for hidden_act, found 'gelu'"),
        ({"use_sliding_window": True, "sliding_window": 16}, "no place for use_sliding_window, found True"),
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "no place for layer_types, found .*sliding_attention"),
        ({"quantization_config": {"quant_method": "fp8"}}, "no place for quantization_config, found .*fp8"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "no place for rope scaling, found 'yarn'"),
        ({"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}, "found 'linear'"),
        ({"rope_parameters": {"rope_type": "default"}}, "expected a positive number as rope_theta, found None"),
        ({"rope_parameters": "default"}, "expected an object as rope_parameters, found 'default'"),
        ({"num_key_value_heads": 2}, "NH must be a multiple of NKV"),
        ({"vocab_size": "50"}, "expected a positive whole number as vocab_size, found '50'"),
        ({"rms_norm_eps": math.inf}, "expected a positive number as rms_norm_eps, found inf"),
    ],
)
def test_what_the_contract_cannot_express_is_refused(
    saved: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    folder = copy_of(saved(), tmp_path)
    change_config(folder, **changes)
    assert_refused(folder, rf"config\.json: .*{expected}")


def test_a_configuration_that_fits_other_weights_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(saved(), tmp_path)
    change_config(folder, vocab_size=51)
    assert_refused(folder, r"embed_tokens\.weight has the wrong shape: expected \[51, 32\] by config\.json, found \[50, 32\]")


def test_a_folder_that_is_no_checkpoint_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", r"config\.json: expected a file of a Hugging Face checkpoint, found No such file")
    folder = copy_of(saved(), tmp_path)
    (folder / SINGLE_FILE).unlink()
    assert_refused(folder, rf"expected {SINGLE_FILE}, or {INDEX} and its shards, found neither")
    for contents, expected in ((b"{", "JSON, found"), (b"\xff\xfe", "JSON, found"), (b"[]", "a JSON object, found list")):
        (folder / CONFIG).write_bytes(contents)
        assert_refused(folder, rf"config\.json: expected {expected}")
    sharded = copy_of(saved(shards=SMALL), tmp_path / "sharded")
    (sharded / INDEX).write_text("not JSON")
    assert_refused(sharded, rf"{INDEX}: expected JSON")


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_checkpoint_is_one_that_transformers_loads_too(tmp_path: Path, tied: bool) -> None:
    from transformers import Qwen3ForCausalLM

    random_checkpoint(tmp_path / "a", DIMS, seed=1, tied=tied)
    random_checkpoint(tmp_path / "b", DIMS, seed=1, tied=tied)
    random_checkpoint(tmp_path / "c", DIMS, seed=2, tied=tied)
    files = [(tmp_path / name / SINGLE_FILE).read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    checkpoint = Checkpoint.open(tmp_path / "a")
    assert checkpoint.dims == DIMS
    assert checkpoint.tied == tied
    model, report = Qwen3ForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.rope_parameters["rope_theta"] == DIMS.theta
    assert model.config.rms_norm_eps == DIMS.eps
    assert torch.equal(model.lm_head.weight.bfloat16(), checkpoint.weights()["lm_head_weight"])
    with torch.no_grad():
        seen = model(torch.tensor([[3, 7, 49, 22, 9, 1]]), output_hidden_states=True)
    assert 1 < float(seen.logits.std()) < 4
    assert all(0.1 < float(hidden.std()) < 10 for hidden in seen.hidden_states)
    with pytest.raises(UsageError, match=r"config\.json: already there"):
        random_checkpoint(tmp_path / "a", DIMS)
