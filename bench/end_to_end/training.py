"""A head's training step against the bare LM-head product: seconds, TFLOP/s, share of the product,
peak memory.

    python -m bench.end_to_end.training [--shapes N,H,V …]

A step is the head forward, the statistics, the loss and the backward. The physical limit is the
matrix product alone; it is taken in several chunkings, each into one reused buffer (or written out
whole), and the fastest of them is what everything is compared with, in the same run. Peers: the
same in plain torch from logits [N, V] (on a GPU also compiled), PyTorch's chunked linear
cross-entropy (forward), AutoDeco's released steps, and where they are installed Liger's fused
linear cross-entropy and Cut Cross-Entropy (forward); on a GPU also the designs of `token_stats`
(forward). A peer that runs out of memory is recorded as such.
"""

import argparse
import functools

import torch
import torch.nn.functional as F
from torch import nn

from autodeco_fast import TemperatureHead, TopPHead, token_stats
from autodeco_fast.training.objectives import AutoDecoJoint, AutoDecoTemperature, MinPHinge
from autodeco_fast.training.step import training_step
from bench.clock import interleave
from bench.machine import device
from bench.memory import peak_bytes
from bench.records import record
from tests.reference import autodeco

CPU_SHAPES = [(2048, 896, 151_936)]
GPU_SHAPES = [
    (N, H, V)
    for H, V in ((896, 151_936), (4096, 128_256), (4096, 151_936), (3840, 262_208))
    for N in (2048, 8192, 32_768)
]
EVERY_TOKEN = {"max_rank": 2**31 - 1, "easy_fraction": 1.0}


def product(hidden: torch.Tensor, weight: torch.Tensor, rows: int, columns: int):
    """A call that multiplies in blocks of `rows` × `columns`."""
    out = torch.empty(min(rows, len(hidden)) * columns, dtype=hidden.dtype, device=hidden.device)

    def run() -> None:
        for h in hidden.split(rows):
            for w in weight.split(columns):
                torch.mm(h, w.T, out=out[: len(h) * len(w)].view(len(h), len(w)))

    return run


class Case:
    """Data and heads of one shape."""

    def __init__(self, N: int, H: int, V: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.hidden = torch.randn(N, H, device=device()).to(dtype)
        self.lm_head = nn.Linear(H, V, bias=False, device=device(), dtype=dtype).requires_grad_(
            False
        )
        self.lm_head.weight.normal_(std=0.1)
        self.target = torch.randint(0, V, (N,), device=device())
        self.heads = nn.ModuleDict({"temp_head": TemperatureHead(H), "top_p_head": TopPHead(H)}).to(
            device()
        )

    def step(self, objective):
        head = self.heads if isinstance(objective, AutoDecoJoint) else self.heads["temp_head"]
        return lambda: training_step(self.hidden, self.target, self.lm_head, head, objective)[
            0
        ].assign(head.parameters())

    def eager_hinge(self):
        """All six statistics, the loss and its gradient, from logits."""
        head = self.heads["temp_head"]
        with torch.no_grad():
            z = (self.hidden @ self.lm_head.weight.T).float()
            top, argmax = z.max(-1)
            at_target = z.gather(1, self.target[:, None])[:, 0]
            rank = (z > at_target[:, None]).sum(-1)
            log_p = F.log_softmax(z, -1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            del argmax, rank, entropy, z, log_p
        need = (top - at_target) / -torch.log(torch.tensor(0.1))
        kept, T = need <= 2.0, head(self.hidden)
        (((need - T).relu() + 0.1 * T) * kept).sum().div(kept.sum().clamp(min=1)).backward()

    def released(self, joint: bool):
        top_p_head = self.heads["top_p_head"] if joint else None
        return lambda: autodeco.step(
            self.hidden, self.lm_head.weight, self.target, self.heads["temp_head"], top_p_head
        )

    def statistics(self) -> dict:
        """On a GPU: both designs of `token_stats`, and the variants of the streaming one that this
        GPU runs, forward only."""
        if device() != "cuda":
            return {}
        from autodeco_fast.kernels import token_stats as kernel

        rest = self.target, None, None, None, 1.0, None
        calls = {
            "token_stats, chunks": lambda: token_stats(
                self.hidden, self.lm_head.weight, self.target, fused=False
            )
        }
        for name, variant, needs in (
            ("pointers", kernel.POINTERS, 8),
            ("Hopper", kernel.HOPPER, 9),
            ("Blackwell", kernel.BLACKWELL, 10),
        ):
            if torch.cuda.get_device_capability()[0] >= needs:
                calls[f"token_stats, streaming, {name}"] = functools.partial(
                    kernel.token_stats, self.hidden, self.lm_head.weight, *rest, variant=variant
                )
        return calls

    def forwards(self) -> dict:
        """Linear cross-entropies of others that are installed, forward only."""
        hidden, weight, target = self.hidden, self.lm_head.weight, self.target
        found = {}
        if hasattr(F, "linear_cross_entropy"):
            found["F.linear_cross_entropy, forward"] = lambda: F.linear_cross_entropy(
                hidden, weight, target
            )
        if device() == "cuda":
            try:
                from liger_kernel.ops.fused_linear_cross_entropy import (
                    fused_linear_cross_entropy_forward as liger,
                )

                found["Liger FLCE, forward"] = lambda: liger(hidden, weight, target)
            except ImportError:
                pass
            try:
                from cut_cross_entropy import linear_cross_entropy as cut

                found["Cut Cross-Entropy, forward"] = lambda: cut(hidden, weight, target)
            except ImportError:
                pass
        return found


def peers(case: Case) -> dict:
    """Name → (call, samples)."""
    eager = {"eager torch, hinge": (case.eager_hinge, 5)}
    if device() == "cuda":
        eager["eager torch, hinge, torch.compile"] = torch.compile(case.eager_hinge), 5
    others = {name: (call, 5) for name, call in {**case.statistics(), **case.forwards()}.items()}
    joint = {
        "AutoDeco's released temperature step": (case.released(False), 2),
        "AutoDeco's released joint step": (case.released(True), 2),
    }
    return {**eager, **others, **joint}


def measure(N: int, H: int, V: int, dtype: torch.dtype, with_released: bool) -> list[dict]:
    case = Case(N, H, V, dtype)
    blocks = {
        "whole": (N, V),
        "2048 columns": (N, 2048),
        "8192 columns": (N, 8192),
        "64 rows": (64, V),
    }
    if N * V > 2**31:
        blocks = {"8192 columns": (N, 8192), "2048 rows": (2048, V)}
    bare = {
        f"product, {name}": product(case.hidden, case.lm_head.weight, *shape)
        for name, shape in blocks.items()
    }
    times = interleave(bare, rounds=5, warmup=1)
    best = min(times, key=lambda name: times[name]["seconds"])
    ours = {
        "hinge step": case.step(MinPHinge(**EVERY_TOKEN)),
        "AutoDeco temperature step": case.step(AutoDecoTemperature()),
    }
    times |= interleave({best: bare[best], **ours}, rounds=20)
    slow = {"AutoDeco joint step": (case.step(AutoDecoJoint()), 10), **peers(case)}
    failed = {}
    for name, (call, samples) in slow.items():
        if "released" in name and not with_released:
            continue
        try:
            print(name, flush=True)
            times |= interleave({name: call}, rounds=samples, warmup=0 if "released" in name else 1)
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
            torch.cuda.empty_cache()
    measured = {**ours, **{name: call for name, (call, _) in slow.items() if name in times}}
    floating, limit = 2.0 * N * H * V, times[best]["seconds"]
    rows = [
        {
            "N": N,
            "H": H,
            "V": V,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": name,
            "seconds": t["seconds"],
            "p20": t["p20"],
            "p80": t["p80"],
            "over_product": t["seconds"] / limit,
            "tflops": floating / t["seconds"] / 1e12,
            "peak_mb": peak_bytes(measured[name]) / 1e6 if name in measured else None,
        }
        for name, t in times.items()
    ]
    return rows + [
        {"N": N, "H": H, "V": V, "variant": name, "note": note} for name, note in failed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes", nargs="*", metavar="N,H,V", help="instead of this device's list"
    )
    args = parser.parse_args()
    given = [tuple(int(x) for x in shape.split(",")) for shape in args.shapes or ()]
    shapes = given or (GPU_SHAPES if device() == "cuda" else CPU_SHAPES)
    rows = []
    for shape in shapes:
        dtypes = (torch.bfloat16,) if device() == "cuda" else (torch.float32, torch.bfloat16)
        for dtype in dtypes:  # the released step takes minutes on a CPU: there, once
            rows += measure(
                *shape, dtype, with_released=device() == "cuda" or dtype == torch.float32
            )
    samples = (
        "20 of the product and our first two steps in turn; then 10 of the joint step, 2 of the "
        "released, 5 of the others"
    )
    record("training", rows, targets="random", samples=samples)


if __name__ == "__main__":
    main()
