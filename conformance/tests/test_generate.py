"""Generation: every driver on every executor, and what is said of tokens that are not the reference's."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from conformance.cases.case import Case
from conformance.cases.key import CaseKey
from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel
from conformance.contract.registry import stage_named
from conformance.contract.stage import Tensors
from conformance.kernels.qwen3.config import Qwen3Dims
from conformance.kernels.qwen3.exam.torch.choices import HUGGING_FACE_LIKE, Choices, random_choices
from conformance.kernels.qwen3.exam.torch.kernels import torch_kernel
from conformance.kernels.qwen3.generation.agreement import TokenVerifier
from conformance.kernels.qwen3.generation.checkpoint import Checkpoint, random_checkpoint
from conformance.kernels.qwen3.generation.command import main
from conformance.kernels.qwen3.generation.drivers import DRIVERS, Driver
from conformance.kernels.qwen3.generation.executors import Executor, ReferenceExecutor, StageError, open_executor
from conformance.kernels.qwen3.generation.model import LoadedModel
from conformance.kernels.qwen3.generation.requests import Request
from conformance.lanes.eager import run_eager
from conformance.lanes.process import Limits
from conformance.tests.transformers_models import qwen3_model

Tensor = torch.Tensor

NEW = 16
#: Three prompts: one token alone, one that ends with a page of four, one over several pages.
PROMPTS = [[7], [1, 2, 3, 4], [20, 3, 21, 3, 90, 17, 44, 20, 3, 21, 11]]
SMALL = Qwen3Dims(B=3, NH=4, NKV=2, D=16, I=64, V=96, L=3, S=40, BS=4, NB=1)
#: An odd number of heads of which five share one KV head, a hidden size below NH * D, and a context that no page divides.
ODD = Qwen3Dims(B=3, NH=15, NKV=3, D=8, H=72, I=100, V=250, L=2, S=38, BS=8, NB=1, eps=1e-5, theta=1e4)


def opened(folder: Path, dims: Dims, *, exact: bool, pages: int | None = None) -> LoadedModel:
    checkpoint = Checkpoint.open(folder, B=dims.B, BS=dims.BS)
    served = checkpoint.dims if pages is None else checkpoint.dims.replace(NB=pages)
    return LoadedModel.of(dataclasses.replace(checkpoint, dims=served), exact=exact)


@pytest.fixture
def random_model(tmp_path: Path) -> Callable[..., LoadedModel]:
    """A model with random weights, by its dimensions and seed."""

    def make(dims: Dims, seed: int = 0, *, exact: bool = False, pages: int | None = None) -> LoadedModel:
        folder = tmp_path / f"model-{seed}"
        if not folder.exists():
            random_checkpoint(folder, dims, seed)
        return opened(folder, dims, exact=exact, pages=pages)

    return make


class Watched:
    """An executor that keeps to the contract's shapes and dtypes, and remembers what it was asked."""

    def __init__(self, *, exact: bool = False) -> None:
        self._inner = ReferenceExecutor(exact=exact)
        self.exact = exact
        self.calls: list[tuple[str, Dims, dict[str, Tensor]]] = []

    def run(self, stage: str, dims: Dims, inputs: Tensors) -> dict[str, Tensor]:
        contract = stage_named(stage)
        for argument in contract.inputs:
            found = inputs[argument.name]
            assert tuple(found.shape) == argument.size(dims), f"{stage}: {argument.name}"
            assert found.is_contiguous()
            wide = self.exact and argument.dtype.is_floating_point and not argument.name.startswith("rope")
            assert found.dtype == (torch.float64 if wide else argument.dtype), f"{stage}: {argument.name}"
        small = {name: tensor.clone() for name, tensor in inputs.items() if tensor.dtype == torch.int32 or name == "logits"}
        self.calls.append((stage, dims, small))
        return self._inner.run(stage, dims, inputs)

    def close(self) -> None:
        pass

    def sizes(self, stage: str) -> list[int]:
        return [dims.B for name, dims, _ in self.calls if name == stage]


def tokens_of(requests: list[Request]) -> list[list[int]]:
    return [request.tokens for request in requests]


# The drivers


@pytest.mark.parametrize("dims", [SMALL, ODD], ids=["small", "odd"])
def test_every_driver_gives_the_tokens_of_transformers(tmp_path: Path, dims: Dims) -> None:
    torch_model = qwen3_model(dims)
    torch_model.save_pretrained(tmp_path)
    expected = [
        torch_model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        for prompt in PROMPTS
    ]
    assert len(set(map(tuple, expected))) == len(PROMPTS)
    model = opened(tmp_path, dims, exact=True)
    verifier = TokenVerifier(model)
    for name in DRIVERS:
        layers, prefill_chunk = 2 if name == "chunked" else None, 3 if dims is ODD else None
        executor = ReferenceExecutor(exact=True)
        driver = Driver(name, model, executor, layers_per_dispatch=layers, prefill_chunk=prefill_chunk)
        requests = driver.generate(PROMPTS, NEW)
        assert tokens_of(requests) == expected, name
        assert str(verifier.judge(requests)) == "48 tokens: 48 as the fp64 reference, 0 ties within the error bound, 0 wrong"


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", DRIVERS)
def test_a_driver_keeps_to_the_contract(random_model: Callable[..., LoadedModel], name: str, exact: bool) -> None:
    """Shapes and dtypes of every call, the right stages, never the pool's last page; a sequence ends with its end token."""
    executor = Watched(exact=exact)
    model = random_model(ODD, exact=exact)
    plain = tokens_of(Driver(name, model, executor, prefill_chunk=5).generate(PROMPTS, 8))
    plan = DRIVERS[name]
    layers = {"host_loop": 1, "chunked": 1}.get(name, 2)
    wanted = {plan.prefill, plan.decode, "greedy_sample"} | ({"lm_head"} if name in ("host_loop", "chunked") else set())
    assert {stage for stage, _, _ in executor.calls} == wanted
    assert {dims.L for stage, dims, _ in executor.calls if stage == plan.decode} == {layers}
    for _, dims, inputs in executor.calls:
        if "block_table" in inputs:
            table, seq_lens = inputs["block_table"].view(dims.B, dims.MB), inputs["seq_lens"]
            owned = (table >= 0).sum(1)
            assert torch.equal(owned, -(-seq_lens // dims.BS))
            assert int(table.max()) < dims.NB - 1
    end = plain[1][3]
    early = tokens_of(Driver(name, model, Watched(exact=exact)).generate(PROMPTS, 8, end_token=end))
    for whole, short in zip(plain, early, strict=True):
        stop = whole.index(end) + 1 if end in whole else len(whole)
        assert short == whole[:stop]
    assert len(early[1]) <= 4


def test_continuous_batching_admits_as_places_and_pages_come_free(random_model: Callable[..., LoadedModel]) -> None:
    prompts = [[5] * 9, [1], [2, 3], [4] * 6, [90, 8, 7], [6], [11, 12, 13, 14, 15], [60] * 4]
    alone = [
        tokens_of(Driver("fused", random_model(SMALL, exact=True), ReferenceExecutor(exact=True)).generate([prompt], 6))[0]
        for prompt in prompts
    ]
    end = alone[1][2]
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in alone]
    # Eight pages to hand out: the first prompt may come to need four, so that it is pages that some must wait for.
    model, executor = random_model(SMALL, exact=True, pages=9), Watched(exact=True)
    driver = Driver("paged", model, executor)
    assert tokens_of(driver.generate(prompts, 6, end_token=end)) == expected
    assert driver.pool is not None
    assert driver.pool.free_pages == driver.pool.pages - 1 == 8
    batches = executor.sizes("paged_decode_fwd")
    assert {2, 3} <= set(batches) <= {1, 2, 3}
    stages = [stage for stage, _, _ in executor.calls if stage != "greedy_sample"]
    assert stages.count("prefill_fwd") > 1
    assert "prefill_fwd" in stages[stages.index("paged_decode_fwd") :]
    assert sum(driver.pool.pages_for(len(prompt) + len(tokens) - 1) for prompt, tokens in zip(prompts, expected, strict=True)) > 8
    # On a contiguous cache the same prompts are served group by group.
    assert tokens_of(Driver("chunked", model, ReferenceExecutor(exact=True)).generate(prompts, 6, end_token=end)) == expected


def test_one_token_needs_no_decode_step(random_model: Callable[..., LoadedModel]) -> None:
    for name in DRIVERS:
        executor = Watched()
        requests = Driver(name, random_model(SMALL), executor).generate([[1, 2], [3]], 1)
        assert [len(request.tokens) for request in requests] == [1, 1]
        assert not executor.sizes(DRIVERS[name].decode)
    # The whole context may be used.
    longest = list(range(SMALL.S - 2))
    assert len(Driver("paged", random_model(SMALL), Watched()).generate([longest], 2)[0].tokens) == 2


# What differs from the reference


def test_in_bf16_every_difference_is_a_tie_within_the_bound(random_model: Callable[..., LoadedModel]) -> None:
    model = random_model(SMALL, seed=0)
    verifier = TokenVerifier(model)
    for name in DRIVERS:
        requests = Driver(name, model, ReferenceExecutor(exact=False)).generate(PROMPTS, NEW)
        agreement = verifier.judge(requests)
        assert agreement.wrong == 0, agreement.differences
        assert agreement.ties == 1  # this seed has one: without any the test would show nothing
        (tie,) = agreement.differences
        exact = agreement.margins[tie.sequence][tie.place]
        assert tie.allowed is not None
        assert exact <= tie.margin <= tie.allowed < 1
        assert "a tie within the error bound" in str(tie)


def test_bounds_of_whole_histories_hold_for_logits_of_single_steps(random_model: Callable[..., LoadedModel]) -> None:
    """All logits, not only those of chosen tokens: within what is allowed, and not a tenth of it."""
    model, executor = random_model(ODD), Watched()
    requests = Driver("paged", model, executor).generate([PROMPTS[2]], NEW)
    found = torch.cat([inputs["logits"] for stage, _, inputs in executor.calls if stage == "greedy_sample"]).double()
    exact_model = random_model(ODD, exact=True)
    watched = Watched(exact=True)
    follow = Followed(watched, requests[0].tokens)
    Driver("fused", exact_model, follow).generate([PROMPTS[2]], NEW)
    exact = torch.cat([inputs["logits"] for stage, _, inputs in watched.calls if stage == "greedy_sample"])
    allowed = TokenVerifier(model).allowances(requests, [NEW], NEW)[0]
    share = (found - exact).abs() / allowed
    assert found.shape == exact.shape == allowed.shape == (NEW, ODD.V)
    assert 0.15 < float(share.max()) < 1


class Followed:
    """An executor that samples given tokens, whatever the logits."""

    def __init__(self, inner: Executor, tokens: Sequence[int]) -> None:
        self.exact = inner.exact
        self._inner = inner
        self._tokens = list(tokens)

    def run(self, stage: str, dims: Dims, inputs: Tensors) -> dict[str, Tensor]:
        results = self._inner.run(stage, dims, inputs)
        return {"token_ids": torch.tensor([self._tokens.pop(0)])} if stage == "greedy_sample" else results

    def close(self) -> None:
        pass


class TorchKernels:
    """Torch kernels of every stage in this process, with one choice of the legal freedoms, and at most one fault in one stage."""

    exact = False

    def __init__(self, choices: Callable[[str], Choices], stage: str = "", fault: str = "") -> None:
        self._choices, self._stage, self._fault = choices, stage, fault
        self._kernels: dict[str, Kernel] = {}

    def run(self, stage: str, dims: Dims, inputs: Tensors) -> dict[str, Tensor]:
        if stage not in self._kernels:
            self._kernels[stage] = torch_kernel(stage, self._choices(stage), self._fault if stage == self._stage else "")
        outcome = run_eager(self._kernels[stage], Case(CaseKey(stage, "", "", 0), stage_named(stage), dims, dict(inputs)))
        assert outcome.status == "ok", outcome.message
        return outcome.outputs

    def close(self) -> None:
        pass


def as_hugging_face(stage: str) -> Choices:
    return HUGGING_FACE_LIKE


def at_random(stage: str) -> Choices:
    return random_choices(stage, 3)


@pytest.mark.parametrize(
    ("name", "choices"),
    [("host_loop", at_random), ("fused", as_hugging_face), ("chunked", at_random), ("paged", as_hugging_face)],
)
def test_no_legal_kernel_is_called_wrong(
    random_model: Callable[..., LoadedModel], name: str, choices: Callable[[str], Choices]
) -> None:
    model = random_model(SMALL)
    requests = Driver(name, model, TorchKernels(choices), prefill_chunk=6).generate(PROMPTS, NEW)
    agreement = TokenVerifier(model).judge(requests)
    assert agreement.wrong == 0, agreement.differences


@pytest.mark.parametrize(
    ("name", "stage", "fault"),
    [
        ("paged", "paged_decode_fwd", "identity_block_table"),
        ("paged", "paged_decode_fwd", "slot_of_the_row_before"),
        ("paged", "prefill_fwd", "history_ignored"),
        ("paged", "prefill_fwd", "offsets_ignored"),
        ("paged", "prefill_fwd", "not_causal"),
        ("fused", "decode_fwd", "weights_of_layer_0"),
        ("fused", "decode_fwd", "final_norm_missing"),
        ("chunked", "decode_fwd_layers", "position_off_by_one"),
        ("host_loop", "decode_layer", "q_norm_missing"),
        ("host_loop", "lm_head", "vocabulary_shifted"),
        ("host_loop", "greedy_sample", "compared_in_bf16"),
    ],
)
def test_a_fault_is_not_called_a_tie(random_model: Callable[..., LoadedModel], name: str, stage: str, fault: str) -> None:
    model = random_model(SMALL)
    kernels = TorchKernels(lambda stage: Choices(), stage, fault)
    agreement = TokenVerifier(model).judge(Driver(name, model, kernels, prefill_chunk=6).generate(PROMPTS, 8))
    assert agreement.wrong > 0


def test_a_float64_executor_is_forgiven_nothing(random_model: Callable[..., LoadedModel]) -> None:
    """What is a tie for bf16 is wrong where nothing was rounded."""
    rounded = Driver("fused", random_model(SMALL), ReferenceExecutor(exact=False)).generate(PROMPTS, NEW)
    agreement = TokenVerifier(random_model(SMALL, exact=True)).judge(rounded)
    assert (agreement.ties, agreement.wrong) == (0, 1)


class Broken(ReferenceExecutor):
    """The contract with a result of one stage replaced."""

    def __init__(self, stage: str, change: Callable[[Tensor], object]) -> None:
        super().__init__(exact=False)
        self._stage, self._break = stage, change

    def run(self, stage: str, dims: Dims, inputs: Tensors) -> dict[str, Tensor]:
        results = super().run(stage, dims, inputs)
        if stage == self._stage:
            self._break(next(reversed(results.values())))
        return results


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("decode_fwd", lambda logits: logits[0, 3].fill_(float("nan")), "decode_fwd: 1 of 288 logits are not finite"),
        (
            "greedy_sample",
            lambda token_ids: token_ids[1].fill_(96),
            "greedy_sample: gave 96 for prompt 1, which is no token of 96",
        ),
        ("greedy_sample", lambda token_ids: token_ids.fill_(-1), "greedy_sample: gave -1 for prompt 0"),
    ],
)
def test_what_is_no_logit_or_no_token_ends_the_run(
    random_model: Callable[..., LoadedModel], stage: str, change: Callable[[Tensor], object], message: str
) -> None:
    with pytest.raises(StageError, match=message):
        Driver("fused", random_model(SMALL), Broken(stage, change)).generate(PROMPTS, 4)


# The command

KERNELS = """
import ctypes
import torch
import conformance


def logits_of(hidden, gamma, weight, eps):
    wide = hidden.float()
    normalised = (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps) * gamma).bfloat16()
    return normalised.float() @ weight.float().T


@conformance.kernel("lm_head")
def right(hidden, final_norm_weight, lm_head_weight, logits, *, dims):
    logits.copy_(logits_of(hidden, final_norm_weight, lm_head_weight, dims.eps))


@conformance.kernel("lm_head")
def raises(hidden, final_norm_weight, lm_head_weight, logits):
    raise RuntimeError("no room\\nfor it")


@conformance.kernel("lm_head")
def crashes(hidden, final_norm_weight, lm_head_weight, logits):
    ctypes.string_at(0)


@conformance.kernel("lm_head")
def meddles(hidden, final_norm_weight, lm_head_weight, logits):
    logits.zero_()
    hidden.add_(1)


@conformance.kernel("greedy_sample")
def in_bf16(logits, token_ids):
    token_ids.copy_(logits.bfloat16().argmax(-1))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random_checkpoint(tmp_path / "model", SMALL)
    (tmp_path / "mine.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    prompts = [part for prompt in PROMPTS for part in ("--prompt", ",".join(map(str, prompt)))]
    return CliRunner().invoke(main, ["--checkpoint", "model", "--page-size", "4", *prompts, *arguments])


def test_the_command_runs_all_drivers_and_writes_what_they_gave(folder: Path) -> None:
    done = run("--driver", "all", "--executor", "contract", "--json", "out.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("48 tokens: 47 as the fp64 reference, 1 tie within the error bound, 0 wrong") == 4
    assert "4 drivers: identical tokens" in done.stdout
    written = json.loads(Path("out.json").read_text())
    assert [entry["driver"] for entry in written["runs"]] == list(DRIVERS)
    (first, *others) = [[sequence["tokens"] for sequence in entry["sequences"]] for entry in written["runs"]]
    assert all(other == first for other in others)
    assert [len(tokens) for tokens in first] == [NEW] * 3
    assert f"prompt 1 (4 tokens): {','.join(map(str, first[1]))}" in done.stdout
    (difference,) = written["runs"][0]["differences"]
    assert difference["kind"] == "tie"
    assert difference["margin"] <= difference["allowed"]


def test_the_fp64_reference_agrees_with_itself_without_a_tie(folder: Path) -> None:
    done = run("--driver", "all", "--executor", "reference", "--batch", "2", "--prefill-chunk", "3", "--chunk", "2")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("48 tokens: 48 as the fp64 reference, 0 ties within the error bound, 0 wrong") == 4


@pytest.mark.parametrize(
    ("kernel", "code", "words"),
    [
        ("right", 0, "48 tokens: 47 as the fp64 reference, 1 tie within the error bound, 0 wrong"),
        ("in_bf16", 1, "wrong, sampling allows no error"),
        pytest.param(
            "raises",
            1,
            "generate: chunked: lm_head: kernel raises raised RuntimeError: no room (mine.py:",
            marks=pytest.mark.slow,
        ),
        ("crashes", 1, "generate: chunked: lm_head: kernel crashes crashed: its process died of SIGSEGV"),
        ("meddles", 1, "generate: chunked: lm_head: kernel meddles changed 192 elements of hidden, which is an input"),
    ],
)
def test_a_kernel_of_the_users_takes_the_place_of_the_contract(folder: Path, kernel: str, code: int, words: str) -> None:
    done = run("--driver", "chunked", "--executor", "eager", "--kernels", f"mine.py:{kernel}")
    assert done.exit_code == code, done.output
    assert words in done.output
    assert len(done.stderr.strip().splitlines()) == (1 if words.startswith("generate:") else 0)


@pytest.mark.parametrize("driver", ["paged", pytest.param("all", marks=pytest.mark.slow)])
def test_the_bundled_pypto_kernels_give_the_references_tokens(folder: Path, driver: str) -> None:
    """Through PyPTO's interpreter. The margins of this seed are all beyond the error bound: nothing can be a tie."""
    random_checkpoint(folder / "two_layers", SMALL.replace(L=2, H=48), seed=6)
    arguments = ["--checkpoint", "two_layers", "--page-size", "4", "--prompt", "7", "--prompt", "1,2,3,4,5", "--new", "3"]
    done = CliRunner().invoke(main, [*arguments, "--driver", driver, "--executor", "interpret", "--prefill-chunk", "4"])
    assert done.exit_code == 0, done.output
    count = done.stdout.count("6 tokens: 6 as the fp64 reference, 0 ties within the error bound, 0 wrong")
    assert count == (4 if driver == "all" else 1)
    assert ("4 drivers: identical tokens" in done.stdout) == (driver == "all")


@pytest.mark.slow
def test_where_a_pypto_kernel_differs_it_is_shown_to_be_a_tie(folder: Path) -> None:
    """Three prompts, sixteen new tokens: some margins of this model are within the error bound, and kernels decide otherwise."""
    prompts = ["--prompt", ",".join(map(str, range(1, 20))), "--prompt", "7", "--prompt", "100,200,300,400,21"]
    arguments = ["--random", "1", "--dims", "L=2,S=64", *prompts, "--new", "16", "--driver", "fused", "--executor", "interpret"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    found = re.search(r"48 tokens: (\d+) as the fp64 reference, (\d+) ties within the error bound, 0 wrong", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) + int(found[2]) == 48
    # Three were measured; another machine's fp32 sums may decide one the other way.
    assert int(found[2]) >= 1
    assert done.stdout.count(": a tie within the error bound") == int(found[2])


@pytest.mark.parametrize(("target", "reason"), [("model", "Is a directory"), ("nowhere/new.json", "No such file or directory")])
def test_a_file_that_cannot_be_written_is_refused_before_work_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, target: str, reason: str
) -> None:
    monkeypatch.setattr("conformance.kernels.qwen3.generation.command._open_checkpoint", None)
    done = run("--json", target)
    assert done.exit_code == 2, done.output
    assert done.stderr == f"generate: cannot write {target}: {reason}\n"


def test_looking_whether_a_file_can_be_written_leaves_no_trace(folder: Path) -> None:
    assert run("--json", "new.json", "--executor", "gpu").exit_code == 2
    assert not Path("new.json").exists()
    Path("old.json").write_text("kept")
    assert run("--json", "old.json", "--executor", "gpu").exit_code == 2
    assert Path("old.json").read_text() == "kept"


def test_what_a_model_takes_is_no_memory_of_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The process alone takes some 250 MB, and with its half of the logits, which two processes share, more than the limit.
    monkeypatch.setattr(Limits, "of_runs", lambda seconds: Limits(memory_bytes=350 << 20))
    kernel = "import time, conformance\n\n@conformance.kernel('greedy_sample')\ndef mine(logits, token_ids):\n"
    (tmp_path / "mine.py").write_text(f"{kernel}    token_ids.copy_(logits.argmax(-1))\n    time.sleep(0.5)\n")
    executor = open_executor("eager", [str(tmp_path / "mine.py")])
    dims = SMALL.replace(B=16, V=10_000_000, L=1)
    try:
        assert not executor.run("greedy_sample", dims, {"logits": torch.zeros(16, dims.V)})["token_ids"].any()
    finally:
        executor.close()


def test_a_device_that_is_not_there_is_exit_code_3(folder: Path) -> None:
    done = run("--executor", "device")
    assert done.exit_code == 3
    assert done.stderr.startswith("generate: the device executor cannot run here: no usable NPU: CANN not found: ")
    assert len(done.stderr.strip().splitlines()) == 1


_MODEL = ("--checkpoint", "model", "--executor", "contract")
_PROMPT = (*_MODEL, "--prompt", "1,2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "1"], "name a model: --checkpoint DIR, or --random SEED"),
        ([*_PROMPT, "--random", "0"], "and not both"),
        (["--checkpoint", "nowhere", "--prompt", "1"], "nowhere/config.json: expected a file of a Hugging Face checkpoint"),
        ([*_PROMPT, "--dims", "tiny"], "--dims goes with --random"),
        (["--random", "0", "--dims", "huge", "--prompt", "1"], "unknown preset 'huge'"),
        (["--random", "0", "--dims", "L=x", "--prompt", "1"], "overrides such as L=2,S=64, found 'L=x'"),
        (["--random", "0", "--dims", "L=²", "--prompt", "1"], "overrides such as L=2,S=64, found 'L=²'"),
        (["--random", "0", "--dims", "L=1,B=2", "--prompt", "1"], "takes the sizes of a model, and B is none: give --batch"),
        (["--random", "0", "--dims", "NB=9", "--prompt", "1"], "takes the sizes of a model, and NB is none: give --pages"),
        (["--random", "0", "--dims", "T=9", "--prompt", "1"], "takes the sizes of a model, and T is none: prompts say it"),
        ([*_MODEL], "there is no prompt"),
        ([*_MODEL, "--prompt", ""], "prompt 0 is empty"),
        ([*_PROMPT, "--prompt", "1,x"], "--prompt takes token ids such as 1,2,3, found 'x'"),
        ([*_PROMPT, "--prompt", "1,96"], "prompt 1: token 96 is outside the vocabulary, 0 to 95"),
        ([*_PROMPT, "--prompt", "-1"], "prompt 1: token -1 is outside the vocabulary"),
        ([*_PROMPT, "--end", "96"], "the end token: token 96 is outside the vocabulary"),
        ([*_PROMPT, "--new", "39"], "prompt 0 has 2 tokens, and 39 new ones go beyond the context of 40"),
        ([*_PROMPT, "--context", "8"], "go beyond the context of 8"),
        ([*_PROMPT, "--context", "41"], "--context is 1 to 40"),
        ([*_PROMPT, "--new", "0"], "the number of new tokens must be positive"),
        ([*_PROMPT, "--batch", "0"], "dimension B must be a positive whole number"),
        ([*_PROMPT, "--page-size", "0"], "dimension BS must be a positive whole number"),
        ([*_PROMPT, "--driver", "fastest"], "unknown driver 'fastest'; known are host_loop, fused, chunked, paged"),
        ([*_PROMPT, "--executor", "gpu"], "unknown executor 'gpu'; known are reference, contract, interpret, eager, device"),
        ([*_PROMPT, "--chunk", "2"], "--chunk goes with the chunked driver"),
        ([*_PROMPT, "--driver", "chunked", "--chunk", "4"], "a chunk is 1 to 3 of the model's layers, found 4"),
        ([*_PROMPT, "--driver", "fused", "--pages", "4"], "--pages goes with the paged driver"),
        ([*_PROMPT, "--pages", "2", "--page-size", "4"], "prompt 0 may need 5 pages, the pool can hand out 1"),
        ([*_PROMPT, "--pages", "1000000000"], "a cache of 1,000,000,000 pages takes"),
        ([*_PROMPT, "--pages", "1" + 30 * "0"], "dimension NB is at most 2,147,483,647, found a larger one"),
        ([*_PROMPT, "--prefill-chunk", "0"], "a chunk of a prefill has at least one token"),
        ([*_PROMPT, "--kernels", "mine.py"], "the contract executor runs no kernels"),
        (["--checkpoint", "model", "--prompt", "1", "--executor", "eager"], "name their file with --kernels FILE.py"),
        ([*_PROMPT[:2], "--prompt", "1", "--executor", "eager", "--kernels", "mine.py"], "two kernels of stage lm_head"),
        ([*_PROMPT[:2], "--prompt", "1", "--executor", "eager", "--kernels", "nowhere.py"], "no such kernel file"),
        (
            [*_PROMPT[:2], "--prompt", "1", "--executor", "eager", "--kernels", "mine.py:nothing"],
            "no kernel 'nothing' in mine.py",
        ),
        ([*_PROMPT, "--device", "0"], "--device is for runs on a card, and the contract executor takes none"),
        ([*_PROMPT[:2], "--prompt", "1", "--executor", "device", "--device", "x"], "--device takes numbers of cards, such as 0"),
        ([*_PROMPT, "--json", "nowhere/out.json"], "cannot write nowhere/out.json: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("verifying", [False, True])
def test_an_interrupt_leaves_the_tokens_so_far(folder: Path, monkeypatch: pytest.MonkeyPatch, verifying: bool) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    forward, calls = Driver._forward, itertools.count()

    def third_fails(*arguments: Any, **options: Any) -> Any:
        return interrupted() if next(calls) == 9 else forward(*arguments, **options)

    if verifying:
        monkeypatch.setattr(TokenVerifier, "judge", interrupted)
    else:
        monkeypatch.setattr(Driver, "_forward", third_fails)
    done = run("--driver", "all", "--executor", "contract", "--json", "out.json")
    assert done.exit_code == 143, done.output
    (kept,) = json.loads(Path("out.json").read_text())["runs"]
    assert kept["driver"] == "host_loop"
    assert kept["error"].startswith("interrupted")
    assert all(sequence["tokens"] for sequence in kept["sequences"])
