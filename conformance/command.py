"""What every command has: exit codes, one line for whatever goes wrong, and an end in order when it is interrupted."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from conformance.errors import UnavailableError, UsageError
from conformance.outside import one_line, plain, require_path
from conformance.running.interrupts import interrupted_once

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

PASSED, FINDINGS, USAGE, COULD_NOT_RUN = 0, 1, 2, 3

#: Longest line that is printed for an error, which may hold any text that was given.
_LONGEST_LINE = 1000


def say(text: object, *, err: bool = False, coloured: bool = False) -> None:
    """Print text that may come from outside; ``coloured`` text is ours, with what came from outside made plain before.

    What cannot be told to standard error changes nothing: nobody would read it. Raises ``OSError`` for standard output.
    """
    try:
        click.echo(text if coloured else plain(text), err=err)
    except BrokenPipeError:
        raise
    except OSError as error:
        if not err:
            _give_up_on_stdout()
            raise OSError(error.errno, error.strerror, "standard output") from error


class FilePath(click.Path):
    """The path of a file or folder, as a ``Path``; one that no file can have is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or the error that the command line is answered with."""
        try:
            require_path(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


def card_options(command: Decorated) -> Decorated:
    """Give a command ``--device`` and ``--device-wait``, which ``conformance.lanes.cards.choice_of`` reads."""
    wait = click.option(
        "--device-wait", type=float, default=None, metavar="SECONDS", help="how long to wait for a busy card; 600 if not given"
    )
    device = click.option(
        "--device", default="", metavar="0,2-3", help="on a card: which ones may be used; else TASK_DEVICE, TILE_FWK_DEVICE_ID"
    )
    return device(wait(command))


class Command(click.Command):
    """Ends with one line and an exit code, whatever goes wrong.

    ``UsageError`` and what click refuses have exit code 2, ``UnavailableError`` and everything else 3, an interrupt 130 and a
    request to end 143.
    """

    def __call__(self, *args: Any, **extra: Any) -> Any:
        try:
            return self.main(*args, **extra)
        finally:
            # A second Ctrl-C while the process ends would leave a traceback in place of its exit code.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

    def main(self, *args: Any, **extra: Any) -> Any:
        """As of any command of click, on streams that can be written to and with signals that interrupt it once."""
        _prepare_streams()
        with interrupted_once():
            return super().main(*args, **extra)

    def make_context(self, info_name: str | None, *args: Any, **extra: Any) -> click.Context:
        """Read the arguments."""
        with _one_line(self.name):
            return super().make_context(info_name, *args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Do what the command does."""
        with _one_line(self.name):
            return super().invoke(ctx)


class Group(Command, click.Group):
    """The same for a command of commands."""


@contextlib.contextmanager
def _one_line(name: str | None) -> Iterator[None]:
    def end(text: str, code: int) -> click.exceptions.Exit:
        say(f"{name}: {one_line(text, _LONGEST_LINE)}", err=True)
        return click.exceptions.Exit(code)

    with interrupted_once() as interrupts:
        try:
            yield
        except (click.exceptions.Exit, click.exceptions.NoArgsIsHelpError, BrokenPipeError):
            raise  # a reader such as `head` that has seen enough is click's to end quietly
        except KeyboardInterrupt:
            raise end("interrupted", interrupts.exit_code) from None
        except click.ClickException as error:
            raise end(error.format_message(), error.exit_code) from None
        except UsageError as error:
            raise end(str(error), COULD_NOT_RUN if isinstance(error, UnavailableError) else USAGE) from None
        except Exception as error:
            if interrupts.number:  # some libraries make an error of their own of it
                raise end("interrupted", interrupts.exit_code) from None
            raise end(_told(error), COULD_NOT_RUN) from None


def _told(error: Exception) -> str:
    """What went wrong that is neither a wrong argument nor a finding: the machine's doing, or a fault of ours."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot use {error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "not enough memory for this: choose smaller sizes"
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    # It must not look like a finding about a kernel.
    return f"this should not have happened, please report it: {text}"


def _give_up_on_stdout() -> None:
    """Let what could not be written go: it would be tried again as the process ends, and change its exit code."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout.flush()


def open_closed_streams() -> None:
    """Let standard streams that are closed lead nowhere; the first file that is opened would be taken for one otherwise."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process


def _prepare_streams() -> None:
    """Open what is closed, and let no letter be one that a stream's encoding cannot show."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def shown_path(folder: Path) -> str:
    """A folder's path, relative to the current one where it lies below it."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
