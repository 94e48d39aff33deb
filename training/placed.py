"""Base models that are not whole on one device.

    device_map     spread by accelerate over GPUs, memory and disk; one process
    fully_shard    FSDP2: processes share every weight and gather it where a forward needs it
    tp_plan        transformers' tensor parallelism: processes share the work of every forward, and
                   the vocabulary of the LM head

Of the first two the LM head is gathered, V·H numbers in every process. Of the third it stays in
slices, and row statistics are merged: 32 bytes a token and process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from autodeco_fast import TokenStats
from autodeco_fast.ops.token_stats_partial import (
    TokenStatsPartial,
    merge_token_stats,
    target_logits,
    token_stats_partial,
)


def is_sharded(model: nn.Module) -> bool:
    """Whether every forward of the model is one of all processes, each with a batch: FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


@dataclass(frozen=True)
class VocabSlice:
    """Which ids of the vocabulary the LM head in this process is of; others have the rest."""

    parameter: torch.Tensor  # DTensor [V, H], Shard(0)

    @staticmethod
    def of(model: nn.Module, weight: torch.Tensor) -> "VocabSlice | None":
        """None where all of the weight is here, or can be gathered (FSDP2)."""
        from torch.distributed.tensor import DTensor, Shard

        if is_sharded(model) or not isinstance(weight, DTensor):
            return None
        return VocabSlice(weight.detach()) if tuple(weight.placements) == (Shard(0),) else None

    @property
    def group(self):
        """Of the processes that share the vocabulary."""
        return self.parameter.device_mesh.get_group()

    @property
    def first_id(self) -> int:
        """As `torch.chunk` cuts."""
        mesh, V = self.parameter.device_mesh, len(self.parameter)
        return min(V, mesh.get_local_rank() * -(-V // mesh.size()))

    def stats(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **transform
    ) -> TokenStats:
        """`token_stats` of the whole vocabulary; hidden states and targets are the same in every
        process, `weight` and the transform's bias are this one's."""
        from torch import distributed

        given = {"first_id": self.first_id, **transform}
        of_target = target_logits(hidden, weight, target, **given)
        distributed.all_reduce(of_target, distributed.ReduceOp.MAX, self.group)
        mine = token_stats_partial(hidden, weight, target, of_target, **given)
        gathered = [self._everyones(tensor.contiguous()) for tensor in mine]
        return merge_token_stats([TokenStatsPartial(*pair) for pair in zip(*gathered)], target)

    def _everyones(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        from torch import distributed

        found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(found, tensor, self.group)
        return found

    def gathered(self, logits: torch.Tensor) -> torch.Tensor:
        """`[N, V]` of every process's `[N, V_slice]`."""
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size([len(logits), len(self.parameter)])
        mesh = self.parameter.device_mesh
        shared = DTensor.from_local(logits, mesh, [Shard(1)], shape=shape, stride=(shape[1], 1))
        return shared.full_tensor()


def lm_head_tensors(
    embedding: nn.Module, part: VocabSlice | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight `[V, H]` and bias `[V]` of an output embedding, or this process's slice of them; of
    one that is offloaded, copies on the device it runs on."""
    from accelerate.utils import align_module_device
    from accelerate.utils.modeling import has_offloaded_params

    bias = getattr(embedding, "bias", None)
    if not has_offloaded_params(embedding):
        here = whole if part is None else _local
        return here(embedding.weight), None if bias is None else here(bias)
    with align_module_device(embedding):
        weight, bias = embedding.weight.detach(), getattr(embedding, "bias", None)
        return weight.clone(), None if bias is None else bias.detach().clone()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter without its graph, gathered from all processes if they share it."""
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to_local()


@contextmanager
def seen_hidden(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the model inside returns in forwards of the whole one, which alone may be called where
    it is sharded: `[B, L, H]` each."""
    seen: list[torch.Tensor] = []
    handle = model.base_model.register_forward_hook(
        lambda _, args, output: seen.append(output.last_hidden_state)
    )
    try:
        yield seen
    finally:
        handle.remove()
