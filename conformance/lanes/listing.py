"""Which kernels a file defines, told by a worker process: no code of the file runs in the process that judges."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from conformance.contract.dims import Dims
from conformance.contract.kernel import TOOLCHAINS, Declaration, require_name
from conformance.contract.loading import digest_of, require_file
from conformance.contract.precision import declared_names, require_ties
from conformance.contract.registry import model_named, models, stage_named
from conformance.errors import UsageError
from conformance.lanes.eager import EAGER
from conformance.lanes.messages import MOST_TEXT, AskAccepts, Declared, FindKernel, Listed, ListKernels, Message, Reasons
from conformance.lanes.worker_process import Limits, UnknownEndError, WorkerError, WorkerProcess
from conformance.outside import one_line
from conformance.toolchains.detection import ToolchainUnavailableError

#: What importing a file may take: as long as a kernel's process may take to start. Its answers take no time.
IMPORT_LIMITS = Limits(seconds=120.0)
ANSWER_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedKernel(Declaration):
    """A kernel that another process has imported: what it declares, and where it is found again.

    ``module`` is a file's path or a dotted name. ``chooses``: it has a function that says which dimensions it takes, which is
    asked in ``listing``'s process.
    """

    module: str
    attribute: str
    chooses: bool
    listing: Listing = dataclasses.field(repr=False, compare=False)

    def asked(self, dims: Dims) -> str | None:
        """Why the kernel does not take these dimensions, as its own function says; raises ``UsageError`` if that fails."""
        return self.listing.reason(self, dims) if self.chooses else None


class Listing:
    """Asks about the kernels of some files, in a worker process that is started on first use and ends with this object."""

    def __init__(self) -> None:
        self._worker = WorkerProcess(limits=IMPORT_LIMITS)
        self._reasons: dict[tuple[str, str, Dims], str | None] = {}

    def kernels(self, modules: Iterable[str]) -> list[ListedKernel]:
        """The kernels that modules define, in the order of their definition.

        Each module is a file's path or a dotted name. Raises ``UsageError`` that says why one cannot be imported.
        """
        locations = [_location(module) for module in modules]
        return [kernel for one in locations for kernel in self._listed(ListKernels(one), Path(one).name)]

    def kernel(self, module: str, name: str, stage: str | None = None) -> ListedKernel:
        """The kernel of that name, or a plain function that is to be one of ``stage``; raises ``UsageError``."""
        location = _location(module)
        (found,) = self._listed(FindKernel(location, name, stage), Path(location).name)
        return found

    def reason(self, kernel: ListedKernel, dims: Dims) -> str | None:
        """Why a kernel does not take these dimensions, or ``None``; raises ``UsageError`` if it cannot say."""
        key = kernel.module, kernel.attribute, dims
        if key not in self._reasons:
            request = AskAccepts(kernel.module, kernel.attribute, kernel.stage_name, (dims.sizes,))
            answer = self._ask(request, ANSWER_SECONDS, f"accepts of kernel {kernel.name}:")
            if not isinstance(answer, Reasons) or len(answer.reasons) != 1:
                raise UsageError(f"accepts of kernel {kernel.name} was not answered")
            self._reasons[key] = answer.reasons[0] and one_line(answer.reasons[0], 500)
        return self._reasons[key]

    def close(self) -> None:
        """End the worker process; a later question starts another."""
        self._worker.close()

    def _listed(self, request: ListKernels | FindKernel, file: str) -> list[ListedKernel]:
        answer = self._ask(request, IMPORT_LIMITS.seconds, f"{file}: when it was imported,")
        if not isinstance(answer, Listed):
            raise UsageError(f"{file}: its process sent something else than its kernels")
        module = request.module
        # Of a module by its name only the worker knows the file: to look for it may import what it lies in.
        text = digest_of(module) if module.endswith(".py") else None
        for declared in answer.kernels:
            if declared.module != module or (text is not None and declared.digest != text):
                raise UsageError(f"{file} is not the text whose kernels were listed: it changed meanwhile")
        return [self._checked(declared, file) for declared in answer.kernels]

    def _checked(self, declared: Declared, file: str) -> ListedKernel:
        """What was declared, if it can be so: the process that says it is one in which the file's code runs."""
        name = require_name(declared.name)
        stage = stage_named(declared.stage_name)
        model = model_named(stage.model)
        if (
            declared.toolchain not in TOOLCHAINS
            or not set(declared.capabilities) <= set(model.meanings)
            or declared.profile not in (None, *(profile.name for profile in stage.profiles))
            or not 1 <= declared.capacity <= model.largest_batch
        ):
            raise UsageError(f"{file}: kernel {name} declares what no kernel can")
        declared_names(stage, declared.rounds, declared.precision)
        require_ties(stage, declared.ties)
        fields = msgspec.structs.asdict(declared)
        fields |= {"source": Path(one_line(declared.source, MOST_TEXT)), "summary": one_line(declared.summary, 200)}
        return ListedKernel(listing=self, **fields)

    def _ask(self, request: Message, seconds: float, what: str) -> object:
        for _ in range(2):
            try:
                if self._worker.pid is None:
                    self._worker.start(EAGER.preload)
                return self._worker.ask(request, seconds, "it")
            except WorkerError as failure:
                self._worker.stop()
                text = one_line(failure.outcome.message, MOST_TEXT).removesuffix(" during it").replace(" during it;", ";", 1)
                did = {"timed_out": f"did not come to its end within {seconds:g} s"}.get(failure.outcome.status, text)
                raise UsageError(f"{what} {did}") from failure
            except UnknownEndError:
                self._worker.stop()
                self._worker.may_fork = False
            except (UsageError, ToolchainUnavailableError):
                raise
            except BaseException:
                self._worker.stop()
                raise
        raise UsageError(f"{what} its process ended, and nobody knows how")


def _location(module: str) -> str:
    return str(require_file(module)) if module.endswith(".py") else module


@functools.lru_cache(maxsize=1)
def _bundled(process: int, modules: tuple[str, ...]) -> tuple[ListedKernel, ...]:
    return tuple(Listing().kernels(modules))


def bundled_kernels() -> list[ListedKernel]:
    """The kernels that come with the installed models, in the order of their contracts."""
    # A process that was forked has no listing of its own yet, and a model may be installed meanwhile.
    return list(_bundled(os.getpid(), tuple(name for model in models() for name in model.kernel_modules)))


def kernels_of(location: str) -> list[ListedKernel]:
    """The kernels that a file (or a module, by its dotted name) defines; raises ``UsageError``."""
    return Listing().kernels([location])


def kernel_named(location: str, name: str, stage: str | None = None) -> ListedKernel:
    """The kernel of that name in a file, or a plain function that is to be one of ``stage``; raises ``UsageError``."""
    return Listing().kernel(location, name, stage)
