"""Several processes of a run as threads of this one: cheap enough to end any of them anywhere."""

import itertools
import threading
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch

LOST = "another process of this run has ended, and so does this one; the same command goes on"


class Killed(BaseException):
    """What ends a process here; nothing catches it."""


class Member:
    """One process, as `accelerate.Accelerator` shows it."""

    device = torch.device("cpu")

    def __init__(self, group: "_Group", rank: int):
        self._group = group
        self.process_index, self.num_processes = rank, group.barrier.parties
        self.is_main_process = rank == 0

    def wait_for_everyone(self) -> None:
        self._group.barrier.wait()

    def _everyones(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._group.given[self.process_index] = tensor
        self.wait_for_everyone()
        found = list(self._group.given)
        self.wait_for_everyone()
        return found

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._everyones(tensor)).sum(0)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._everyones(tensor))


class _Group:
    def __init__(self, world: int):
        self.barrier = threading.Barrier(world, timeout=120)
        self.given: list[torch.Tensor | None] = [None] * world


def together(world: int, work: Callable[[Member], object]) -> list:
    """What the work returned or raised in each of `world` processes; where one has ended by an
    exception, the others' next collective raises."""
    group = _Group(world)
    outcomes: list = [None] * world

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(Member(group, rank))
        except BaseException as error:
            outcomes[rank] = error
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@contextmanager
def killed_at(n: int, module, name: str, before=lambda *args: None):
    """Ends the process that makes the n-th call of a function, after `before`."""
    numbers, call = itertools.count(), getattr(module, name)

    def dying(*args, **options):
        if next(numbers) == n:
            before(*args)
            raise Killed
        return call(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, dying)
        yield


def assert_all_ended(outcomes: list) -> None:
    """One was killed, the others say that one was."""
    assert sum(isinstance(outcome, Killed) for outcome in outcomes) == 1, outcomes
    for outcome in outcomes:
        if not isinstance(outcome, Killed):
            assert isinstance(outcome, ValueError), outcome
            assert str(outcome).startswith(LOST)
