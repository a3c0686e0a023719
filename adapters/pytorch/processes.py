"""The processes of a job: which share each computes, and how the shares are put together.

`Processes` is a job of one process, for which all this is nothing. `SeveralProcesses` is a data-parallel
job over torch.distributed, which Hugging Face accelerate sets up (backend, device, timeouts) from what
torchrun or `accelerate launch` put into the environment.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from inspect import signature
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunus.adapters.pytorch.covariance import Moments
from prunus.adapters.pytorch.shared_norms import SharedNorms
from prunus.adapters.pytorch.weights import tensors_of
from prunus.core.errors import MissingDependencyError, ProcessError
from prunus.core.processes import Place

PATIENCE = timedelta(hours=1)
"""How long a process waits for another that is alive; one that has ended is noticed at once."""
_BUFFERS_STAY: dict[str, Any] = {
    # the older word is deprecated where the newer one is known
    (
        "forward_sync_buffers"
        if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        else "broadcast_buffers"
    ): False
}
_Result = TypeVar("_Result")


class Shareable(Protocol):
    """Batches of which a process can take its share."""

    def share(self, rank: int, count: int) -> Self: ...


_Batches = TypeVar("_Batches", bound=Shareable)


class Processes:
    """A job of one process."""

    place = Place()

    def share(self, batches: _Batches) -> _Batches:
        """What this process computes of `batches`."""
        return batches

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, elementwise."""
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, elementwise."""
        return self.sum(values) / self.place.count

    def merge(self, moments: Moments) -> Moments:
        """In the first process: the moments of what all have seen."""
        return moments

    def by_first(self, change: Callable[[], _Result], module: nn.Module) -> _Result | None:
        """Let the first process change `module`; then it is so in all. Answers in the first process only."""
        return change()

    @contextmanager
    def parallel(self, module: nn.Module) -> Iterator[nn.Module]:
        """`module` as it is to be called in training: backward passes leave the mean gradient of all."""
        yield module

    def postponed(self, network: Any) -> AbstractContextManager[Any]:
        """For forward and backward passes of `network` whose gradients are added to by a later pass."""
        return nullcontext()

    def watched(self) -> AbstractContextManager[None]:
        """Around what needs the other processes. Raises ProcessError if one has gone."""
        return nullcontext()

    def norms(self) -> AbstractContextManager[Any]:
        """For forward passes in training: batch norms see the images of all processes."""
        return nullcontext()


ALONE = Processes()


class SeveralProcesses(Processes):
    """A job of several processes, this being one of them."""

    def __init__(self, device: str) -> None:
        """Joins the others. Raises MissingDependencyError, and ProcessError if they do not come."""
        try:
            from accelerate import PartialState
        except ImportError:
            raise MissingDependencyError(
                "a job of several processes", "pip install 'prunus[distributed]'"
            ) from None
        with watched():
            state = PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)
            # what is said, as opposed to computed, needs no device and no time limit of one
            talk = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(talk, dist.ProcessGroup)  # this process is in it
        self._talk = talk
        self.place = Place(state.process_index, state.num_processes)
        self.device = str(state.device)

    def share(self, batches: _Batches) -> _Batches:
        return batches.share(self.place.rank, self.place.count)

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().to(self.device, copy=True)
        with watched():
            dist.all_reduce(total)
        return total.to(values.device)

    def merge(self, moments: Moments) -> Moments:
        everybodys: list[Any] | None = [None] * self.place.count if self.place.first else None
        with watched():
            dist.gather_object(moments, everybodys, group=self._talk)
        for other in (everybodys or [])[1:]:
            moments.merge(other)
        return moments

    def by_first(self, change: Callable[[], _Result], module: nn.Module) -> _Result | None:
        result = change() if self.place.first else None
        with watched():
            for tensor in tensors_of(module).values():
                dist.broadcast(tensor, 0)
        return result

    @contextmanager
    def parallel(self, module: nn.Module) -> Iterator[nn.Module]:
        gc.collect()  # the hooks of an earlier wrapper go with it, before this one puts its own on the parameters
        with watched():
            # statistics are the same everywhere already; heads and towers that a loss leaves out have no gradient
            network = DistributedDataParallel(module, find_unused_parameters=True, **_BUFFERS_STAY)
        yield network

    def postponed(self, network: Any) -> AbstractContextManager[Any]:
        assert isinstance(network, DistributedDataParallel)
        return network.no_sync()

    def watched(self) -> AbstractContextManager[None]:
        return watched()

    def norms(self) -> AbstractContextManager[Any]:
        return SharedNorms(watched)

    # ---- what the first process says to the others -------------------------------------------------

    def tell(self, message: Any) -> Any:
        """The first process's `message`, in every process."""
        box = [message]
        with watched():
            dist.broadcast_object_list(box, 0, group=self._talk)
        return box[0]

    def check_same(self, what: str, digest: str) -> None:
        """Raises ProcessError, with both, in every process if one has another digest than the first."""
        digests: list[Any] = [None] * self.place.count
        with watched():
            dist.all_gather_object(digests, digest, group=self._talk)
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise ProcessError(
                    f"process {rank} has another {what} than process 0: {other} instead of {digests[0]}. "
                    "All need the same command, data, and versions of prunus and its libraries"
                )

    def leave(self) -> None:
        """The job is done."""
        dist.destroy_process_group()


def join(device: str) -> Processes:
    """The processes that a launcher started, or one alone. `device`: "cpu", "cuda"..., "auto" is not resolved."""
    if Place.here().alone:
        return ALONE
    return SeveralProcesses(device)


@contextmanager
def watched() -> Iterator[None]:
    """Says in the project's words that another process has gone."""
    try:
        yield
    except (dist.DistError, RuntimeError, ValueError) as error:
        if isinstance(error, dist.DistError) or _speaks_of_connections(error):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ProcessError(f"another process of this job has ended or cannot be reached ({reason})") from error
        raise


def _speaks_of_connections(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "timed out", "store"))


__all__ = ["ALONE", "Processes", "SeveralProcesses", "join", "watched"]
