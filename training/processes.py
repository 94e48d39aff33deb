"""The processes that `accelerate launch` starts for a scan, a run or an evaluation: what its
configurations mean here, and what becomes of the others when one of them ends.

A head has about a million parameters and the base model none that change, so there is nothing to
shard: every process holds the base model whole and takes its share of the examples. FSDP and
DeepSpeed are launchers here, and ZeRO stage 3, which takes weights apart as they are loaded, is
refused.
"""

import os
import signal
import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch

from autodeco_fast.errors import foreign
from autodeco_fast.files import output_folder
from autodeco_fast.urls import Location

_GO_ON = "the same command goes on from what is written (of train: with --resume)"
_LOST = f"another process of this run has ended, and so does this one; {_GO_ON}"
_TOLD = f"error: told to end, as launchers do when another process of a run has ended; {_GO_ON}"
# The slowest process of an evaluation may have a batch to draw when the others have none.
_PATIENCE = timedelta(hours=2)


class Processes:
    """The processes of a run, as one of them sees them."""

    def __init__(self, accelerator=None, *, replicas: bool = False):
        """
        Args:
            accelerator: one of `accelerate`; without it there is one process.
            replicas: whether all do the same work together, of which the main one writes the
                results, instead of a share each.
        """
        self._accelerator, self._replicas = accelerator, replicas
        self.is_main = accelerator is None or accelerator.is_main_process
        shared = accelerator is not None and not replicas
        # Of the share of this process, and how many shares there are.
        self.rank = accelerator.process_index if shared else 0
        self.world = accelerator.num_processes if shared else 1

    @property
    def is_writer(self) -> bool:
        """Whether this process writes down its share of the work."""
        return self.is_main or not self._replicas

    def wait_for_writer(self) -> None:
        """Until that is done; raises as `wait`."""
        if self._replicas:
            self.wait()

    def hold(self, folder: Location) -> AbstractContextManager[None]:
        """An output folder, held by the main process for all of them."""
        return output_folder(folder) if self.is_main else nullcontext()

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            ValueError: if one has ended.
        """
        if self._accelerator:
            with foreign(_LOST):
                self._accelerator.wait_for_everyone()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of every process's tensor, in the order of the ranks or any other; raises as `wait`."""
        if not self._accelerator:
            return tensor
        device = tensor.device
        with foreign(_LOST):
            return self._accelerator.reduce(tensor.to(self._accelerator.device)).to(device)

    def gather(self, values: list[float]) -> list[list[float]]:
        """The numbers of every share; raises as `wait`."""
        if self.world == 1:
            return [values]
        row = torch.tensor([values], dtype=torch.float64, device=self._accelerator.device)
        with foreign(_LOST):
            return self._accelerator.gather(row).tolist()


def several() -> bool:
    """Whether a launcher has started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end_with_a_line() -> None:
    """Lets a command that a launcher tells to end (SIGTERM) say why, and clean up; alone it goes as
    ever."""
    if several():
        signal.signal(signal.SIGTERM, _told_to_end)


def _told_to_end(*_) -> None:
    raise SystemExit(_TOLD)


def _asked_for(name: str) -> bool:
    """Whether the launcher was told to use it; accelerate says so in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def start_accelerator(**options):
    """An `Accelerator`, with what it was configured for checked.

    Raises:
        ValueError: if accelerate cannot start so, DeepSpeed not being installed for example, or
            would take the base model's weights apart.
    """
    # accelerate takes processes on CPUs for lone ones unless told, and its launcher may not tell.
    cpu = several() and not torch.accelerator.is_available()
    with foreign("accelerate cannot start as it was configured"):
        from accelerate import Accelerator, InitProcessGroupKwargs

        patience = InitProcessGroupKwargs(timeout=_PATIENCE)
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patience], **options)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's zero_stage must be 0, 1 or 2, got 3: it takes the base model's weights "
            "apart, and heads read all of its LM head"
        )
    # Under an FSDP configuration transformers 5.0 would give weights to the first process alone.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if _asked_for(name) and accelerator.is_main_process:
            warnings.warn(
                f"{name} shards nothing here: every process holds the base model whole, and its "
                "share of the examples",
                stacklevel=2,
            )
    return accelerator
