"""``python -m conformance.kernels.qwen3.generation``: prompts through prefill and greedy decode, verified.

Exit codes are those of the ``conformance`` command: 0 every token is the fp64 reference's or a tie within the error bound; 1 one
is not, or a kernel failed; 2 usage; 3 something that had to run could not; 130 interrupted, 143 asked to end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from conformance.cli import read_dims
from conformance.command import FINDINGS, PASSED, Command, FilePath, card_options, say
from conformance.contract.dims import Dims
from conformance.contract.registry import preset_named
from conformance.errors import UsageError
from conformance.kernels.qwen3.contract import MODEL
from conformance.kernels.qwen3.generation.agreement import Agreement, TokenVerifier
from conformance.kernels.qwen3.generation.checkpoint import Checkpoint, random_checkpoint
from conformance.kernels.qwen3.generation.costs import Cost, cost_of
from conformance.kernels.qwen3.generation.drivers import DRIVERS, Driver
from conformance.kernels.qwen3.generation.executors import EXECUTORS, Executor, KernelExecutor, StageError, open_executor
from conformance.kernels.qwen3.generation.model import LoadedModel
from conformance.kernels.qwen3.generation.requests import Request, requests_for
from conformance.lanes.process import Limits
from conformance.outside import one_line, require_path
from conformance.reports.progress import is_interactive
from conformance.running.check import require_seconds
from conformance.running.interrupts import interrupted_once

_DRIVERS = "; ".join(f"{name}: {plan.summary}" for name, plan in DRIVERS.items())
_LIMITS = f"{Limits.seconds:.0f}, on a card {Limits.launch_seconds:.0f}"
_EXECUTORS = "; ".join(f"{name}: {summary}" for name, summary in EXECUTORS.items())


@click.command("generate", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--checkpoint", type=FilePath(), metavar="DIR", help="a Hugging Face Qwen3 checkpoint")
@click.option("--random", "seed", type=int, metavar="SEED", help="instead: a small model with random weights")
@click.option("--dims", default=None, metavar="PRESET|L=2,S=64", help="of the random model: a preset, or overrides of tiny")
@click.option("--prompt", "prompts", multiple=True, metavar="1,2,3", help="token ids; once for each sequence")
@click.option("--new", default=16, show_default=True, metavar="N", help="how many tokens to generate from each")
@click.option("--end", type=int, default=None, metavar="TOKEN", help="a token that ends its sequence early")
@click.option("--driver", default="paged", show_default=True, help=f"{_DRIVERS}; all: one after the other")
@click.option("--executor", default="interpret", show_default=True, help=_EXECUTORS)
@click.option("--kernels", "locations", multiple=True, metavar="FILE.py[:NAME]", help="use these in place of the bundled kernels")
@click.option("--batch", type=int, default=None, metavar="N", help="sequences served at a time; all, up to 16, by default")
@click.option("--context", type=int, default=None, metavar="S", help="length to serve; by default whole pages for what is asked")
@click.option("--page-size", type=int, default=None, metavar="BS", help="tokens of a page; 128, or what --dims says, by default")
@click.option("--pages", type=int, default=None, metavar="NB", help="pages of the paged driver; enough for the batch by default")
@click.option("--chunk", type=int, default=None, metavar="L", help="layers a dispatch of the chunked driver; half by default")
@click.option("--prefill-chunk", type=int, default=None, metavar="N", help="tokens of a prompt a prefill; all by default")
@click.option("--timeout", type=float, default=None, metavar="SECONDS", help=f"limit of one dispatch; {_LIMITS} if not given")
@card_options
@click.option("--verify/--no-verify", default=True, show_default=True, help="hold the tokens against the fp64 reference")
@click.option("--json", "json_path", type=FilePath(), metavar="FILE", help="write tokens and differences here")
def main(
    checkpoint: Path | None,
    seed: int | None,
    dims: str | None,
    prompts: tuple[str, ...],
    new: int,
    end: int | None,
    driver: str,
    executor: str,
    locations: tuple[str, ...],
    batch: int | None,
    context: int | None,
    page_size: int | None,
    pages: int | None,
    chunk: int | None,
    prefill_chunk: int | None,
    timeout: float | None,
    device: str,
    device_wait: float | None,
    verify: bool,
    json_path: Path | None,
) -> None:
    """Generate greedily from prompts of token ids, driver by driver, and say of every token whether it is the reference's."""
    driver_names = list(DRIVERS) if driver == "all" else [driver]
    for option, value, needed in (("--chunk", chunk, "chunked"), ("--pages", pages, "paged")):
        if value is not None and needed not in driver_names:
            raise UsageError(f"{option} goes with the {needed} driver")
    require_seconds("--timeout", timeout)
    for location in locations:
        require_path(location)
    if json_path is not None:
        _require_writable(json_path)
    ids = [_token_ids(text) for text in prompts]
    with interrupted_once() as interrupts, contextlib.ExitStack() as stack:
        places = min(max(len(ids), 1), MODEL.largest_batch) if batch is None else batch
        opened = stack.enter_context(_open_checkpoint(checkpoint, seed, dims, places, page_size))
        served = _served_dims(opened.dims, ids, new, end, context, pages)
        running = open_executor(executor, locations, timeout, device, device_wait)
        stack.callback(running.close)
        model = LoadedModel.of(dataclasses.replace(opened, dims=served), exact=running.exact)
        verifier = TokenVerifier(model) if verify else None
        runs = []
        for name in driver_names:
            runs.append(_run(name, model, running, verifier, ids, new, end, chunk, prefill_chunk))
            if interrupts.number:
                break
        interrupts.ignore()  # what there is is told and written, whatever comes now
    agree = _report_driver_differences(runs)
    if json_path is not None:
        _write_json(json_path, executor, served, runs)
    if interrupts.number:
        sys.exit(interrupts.exit_code)
    sys.exit(PASSED if agree and all(run.ok for run in runs) else FINDINGS)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What one driver gave; ``error`` is why it did not come to its end."""

    driver: str
    requests: list[Request]
    seconds: float
    agreement: Agreement | None = None
    error: str | None = None
    cost: Cost | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and (self.agreement is None or self.agreement.wrong == 0)


def _run(
    name: str,
    model: LoadedModel,
    executor: Executor,
    verifier: TokenVerifier | None,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_token: int | None,
    layers_per_dispatch: int | None,
    prefill_chunk: int | None,
) -> _Run:
    """Generate with one driver and print what came of it."""
    done, total = 0, max_new_tokens * len(prompts)

    def progress(count: int) -> None:
        nonlocal done
        done += count
        click.echo(f"\r\033[K{name} {done}/{total} tokens", nl=False, err=True)

    driver = Driver(
        name,
        model,
        executor,
        layers_per_dispatch=layers_per_dispatch,
        prefill_chunk=prefill_chunk,
        progress=progress if is_interactive() else None,
    )
    dispatches = executor.dispatches if isinstance(executor, KernelExecutor) else []
    began, before = time.monotonic(), len(dispatches)
    try:
        requests = driver.generate(prompts, max_new_tokens, end_token)
        run = _Run(name, requests, time.monotonic() - began)
    except StageError as error:
        run = _Run(name, [], time.monotonic() - began, error=str(error))
    except KeyboardInterrupt:
        run = _Run(name, driver.requests, time.monotonic() - began, error="interrupted")
    finally:
        if is_interactive():
            click.echo("\r\033[K", nl=False, err=True)
    run = dataclasses.replace(run, cost=cost_of(dispatches[before:], driver.plan.prefill))
    if run.error is not None:
        say(f"generate: {name}: {one_line(run.error, 1000)}", err=True)
    if run.requests:
        click.echo(f"{name}: {sum(len(request.tokens) for request in run.requests)} tokens in {run.seconds:.1f} s")
    for request in run.requests:
        click.echo(f"  prompt {request.number} ({len(request.prompt)} tokens): {','.join(map(str, request.tokens))}")
    if run.cost is not None:
        say(run.cost)
    if verifier is None or run.error is not None:
        return run
    try:
        agreement = verifier.judge(run.requests)
    except KeyboardInterrupt:
        say(f"generate: {name}: interrupted before its tokens were verified", err=True)
        return dataclasses.replace(run, error="interrupted before its tokens were verified")
    for difference in agreement.differences:
        click.echo(f"  {difference}")
    click.echo(f"  {agreement}")
    return dataclasses.replace(run, agreement=agreement)


def _report_driver_differences(runs: list[_Run]) -> bool:
    """Say whether drivers gave the same tokens; false if they did not and nothing explains why."""
    ended = [run for run in runs if run.error is None]
    if len(ended) < 2:
        return True
    differing = []
    first = ended[0]
    for run in ended[1:]:
        for one, other in zip(first.requests, run.requests, strict=True):
            if one.tokens != other.tokens:
                pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
                place = next((place for place, (left, right) in pairs if left != right), min(len(one.tokens), len(other.tokens)))
                differing.append(f"{run.driver} from {first.driver} in prompt {one.number} at new token {place}")
    if not differing:
        click.echo(f"{len(ended)} drivers: identical tokens")
        return True
    # Up to where two drivers part they have the same history, so that one of them differs from the reference there.
    explained = all(run.agreement is not None for run in ended)
    click.echo(f"{len(ended)} drivers differ{', for the reasons above' if explained else ''}: {'; '.join(differing)}")
    return explained


@contextlib.contextmanager
def _open_checkpoint(
    checkpoint: Path | None, seed: int | None, dims: str | None, batch: int, page_size: int | None
) -> Iterator[Checkpoint]:
    """The checkpoint that is named, or a random one that lasts as long as it is read."""
    if (checkpoint is None) == (seed is None):
        raise UsageError("name a model: --checkpoint DIR, or --random SEED for one with random weights, and not both")
    if checkpoint is not None:
        if dims is not None:
            raise UsageError("--dims goes with --random: a checkpoint has dimensions of its own")
        yield Checkpoint.open(checkpoint, B=batch, BS=128 if page_size is None else page_size)
        return
    assert seed is not None
    wanted = _model_dims(dims or "tiny")
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(folder, wanted, seed)
        yield Checkpoint.open(folder, B=batch, BS=wanted.BS if page_size is None else page_size)


def _served_dims(
    dims: Dims, prompts: Sequence[Sequence[int]], new: int, end: int | None, context: int | None, pages: int | None
) -> Dims:
    """The dimensions that are served: the context, and pages for it; raises ``UsageError`` for what cannot be."""
    if context is not None and not 1 <= context <= dims.S:
        raise UsageError(f"--context is 1 to {dims.S}, which the model was made for, found {context}")
    limit = dims.replace(S=dims.S if context is None else context)
    requests = requests_for(prompts, new, limit, end)
    longest = max(len(request.prompt) for request in requests) + new
    # No larger than needed: what a kernel is built for and what an interpreter copies grows with it.
    served = limit if context is not None else limit.replace(S=min(limit.S, -(-longest // dims.BS) * dims.BS))
    return served.replace(NB=served.B * served.MB + 1 if pages is None else pages)


def _model_dims(text: str) -> Dims:
    """A preset's name, or ``L=2,S=64`` as overrides of tiny (``preset=NAME`` among them): those of a model."""
    wanted = read_dims(text, "L=2,S=64")
    if isinstance(wanted, str):
        return preset_named(wanted)
    for name, instead in (("B", "give --batch"), ("NB", "give --pages"), ("T", "prompts say it, and --prefill-chunk")):
        if name in wanted:
            raise UsageError(f"--dims takes the sizes of a model, and {name} is none: {instead}")
    return preset_named(wanted.pop("preset", "tiny")).replace(**wanted)


def _token_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    for part in parts:
        if not re.fullmatch(r"-?[0-9]{1,18}", part):
            raise UsageError(f"--prompt takes token ids such as 1,2,3, found {part[:60]!r}")
    return [int(part) for part in parts]


def _require_writable(path: Path) -> None:
    """Raise ``UsageError`` unless a file can be written there; leaves no trace."""
    try:
        new = not path.exists()
        if not new and not path.is_file() and not path.is_dir():
            raise UsageError(f"cannot write {path}: it is no regular file")
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _write_json(path: Path, executor: str, dims: Dims, runs: list[_Run]) -> None:
    """Everything that was printed, and the reference's margins, for a program to read."""
    kept = []
    for run in runs:
        margins = run.agreement.margins if run.agreement else [None] * len(run.requests)
        sequences = [
            {"prompt": list(request.prompt), "tokens": request.tokens, "reference_margins": margin}
            for request, margin in zip(run.requests, margins, strict=True)
        ]
        differences = [dataclasses.asdict(difference) for difference in run.agreement.differences] if run.agreement else None
        kept.append(
            {
                "driver": run.driver,
                "seconds": round(run.seconds, 3),
                "error": run.error,
                "sequences": sequences,
                "differences": differences,
                "cost": None if run.cost is None else dataclasses.asdict(run.cost),
            }
        )
    content = {"executor": executor, "dims": dataclasses.asdict(dims), "runs": kept}
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
