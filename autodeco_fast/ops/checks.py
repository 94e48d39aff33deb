"""What ops ask of their inputs, in one line each."""

import sys

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_softcap(softcap: float | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be None or positive, got {softcap}")


def check_plain(weight: torch.Tensor) -> None:
    """Refuses weights of which `weight @ …` is not what its elements say, or is not here."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(weight, distributed.DTensor):
        raise ValueError(
            "weight must be a plain tensor, got a DTensor: pass weight.full_tensor(), "
            "or each rank's rows to token_stats_partial"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point tensor, got {weight.dtype}: dequantize a quantized head first")


def check_product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    kinds: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """`hidden [N, H]` and `weight [V, H]` of one dtype, `bias [V]` or None."""
    check_plain(weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"hidden and weight must be [N, H] and [V, H], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype not in kinds:
        raise ValueError(f"hidden must be {_names(kinds)}, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must have the dtype of hidden, got {weight.dtype} and {hidden.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != hidden.dtype):
        raise ValueError(f"bias must be [{weight.shape[0]}] {hidden.dtype}, got {tuple(bias.shape)} {bias.dtype}")
    check_softcap(softcap)


def check_logits(logits: torch.Tensor, kinds: tuple[torch.dtype, ...]) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have two dimensions, the last not empty, got shape {tuple(logits.shape)}")
    if logits.dtype not in kinds:
        raise ValueError(f"logits must be {_names(kinds)}, got {logits.dtype}")


def check_row(name: str, value: torch.Tensor | None, n: int) -> None:
    """`[n]`, or None."""
    if value is not None and value.shape != (n,):
        raise ValueError(f"{name} must be [{n}], got shape {tuple(value.shape)}")


def check_target(target: torch.Tensor, n: int, V: int, ignore_index: int) -> None:
    """`[n]` int64; its values only on a CPU: on a GPU looking would be a host sync."""
    if target.shape != (n,) or target.dtype != torch.int64:
        raise ValueError(f"target must be [{n}] int64, got {tuple(target.shape)} {target.dtype}")
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= V))]
    if wrong.numel():
        raise ValueError(f"target ids must be in [0, {V}) or {ignore_index}, got {wrong[0].item()}")


def _names(kinds: tuple[torch.dtype, ...]) -> str:
    names = [str(kind).removeprefix("torch.") for kind in kinds]
    return ", ".join(names[:-1]) + " or " + names[-1]
