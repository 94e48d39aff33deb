"""How `accelerate launch` starts the processes of a scan or a run, and what its configurations mean
here.

A head has about a million parameters and the base model none that change, so there is nothing to
shard: every process holds the base model whole and takes its share of the examples. FSDP and
DeepSpeed are launchers here, and ZeRO stage 3, which takes weights apart as they are loaded, is
refused.
"""

import os
import warnings

import torch

from autodeco_fast.errors import foreign


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
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = several and not torch.accelerator.is_available()
    with foreign("accelerate cannot start as it was configured"):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=cpu, **options)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's zero_stage must be 0, 1 or 2, got 3: it takes the base model's weights "
            "apart, and heads read all of its LM head"
        )
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if _asked_for(name) and accelerator.is_main_process:
            warnings.warn(
                f"{name} shards nothing here: every process holds the base model whole, and its "
                "share of the examples",
                stacklevel=2,
            )
    return accelerator
