"""A head's training step against the bare LM-head product: seconds, TFLOP/s, share of the product,
peak memory.

    python -m bench.end_to_end.training [--shapes N,H,V …]

A step is the head forward, the statistics, the loss and the backward. The physical limit is the
matrix product alone; it is taken in several chunkings, each into one reused buffer (or written out
whole), and the fastest of them is what everything is compared with, in the same run. Peers: the
hinge in plain torch from logits [N, V], on a GPU also compiled, and AutoDeco's released steps. A
peer that runs out of memory is recorded as such. Statistics alone are `bench/test_token_stats.py`.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.training.objectives import AutoDecoJoint, AutoDecoTemperature, MinPHinge
from autodeco_fast.training.step import training_step
from bench.clock import quantile, turns
from bench.machine import device, product_dtypes
from bench.memory import peak_mb
from bench.records import options, record
from tests.reference import autodeco
from tests.reference.peers import eager_hinge_step

CPU_SHAPES = [(2048, 896, 151_936)]
GPU_SHAPES = [
    (N, H, V)
    for H, V in ((896, 151_936), (4096, 128_256), (4096, 151_936), (3840, 262_208))
    for N in (2048, 8192, 32_768)
]
TINY_SHAPES = [(16, 32, 999)]
EVERY_TOKEN = {"max_rank": 2**31 - 1, "easy_fraction": 1.0}
RELEASED = "AutoDeco's released"


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
        self.lm_head = nn.Linear(H, V, bias=False, device=device(), dtype=dtype)
        self.lm_head.requires_grad_(False).weight.normal_(std=0.1)
        self.target = torch.randint(0, V, (N,), device=device())
        heads = {"temp_head": TemperatureHead(H), "top_p_head": TopPHead(H)}
        self.heads = nn.ModuleDict(heads).to(device())

    def step(self, objective) -> Callable[[], None]:
        head = self.heads if isinstance(objective, AutoDecoJoint) else self.heads["temp_head"]

        def run() -> None:
            step, _ = training_step(self.hidden, self.target, self.lm_head, head, objective)
            step.assign(head.parameters())

        return run

    def eager_hinge(self) -> None:
        weight = self.lm_head.weight
        eager_hinge_step(self.hidden, weight, self.target, self.heads["temp_head"])

    def released(self, *, joint: bool) -> Callable[[], object]:
        heads = self.heads["temp_head"], self.heads["top_p_head"] if joint else None
        return functools.partial(
            autodeco.step, self.hidden, self.lm_head.weight, self.target, *heads
        )

    def products(self) -> dict[str, Callable[[], None]]:
        (N, _), (V, _) = self.hidden.shape, self.lm_head.weight.shape
        blocks = {
            "whole": (N, V),
            "2048 columns": (N, min(V, 2048)),
            "8192 columns": (N, min(V, 8192)),
            "64 rows": (64, V),
        }
        if N * V > 2**31:
            blocks = {"8192 columns": (N, 8192), "2048 rows": (2048, V)}
        return {
            f"product, {name}": product(self.hidden, self.lm_head.weight, *shape)
            for name, shape in blocks.items()
        }

    def slow(self, *, with_released: bool) -> dict[str, tuple[Callable[[], object], int]]:
        """Name → (call, rounds)."""
        found = {
            "AutoDeco joint step": (self.step(AutoDecoJoint()), 10),
            "eager torch, hinge": (self.eager_hinge, 5),
        }
        if device() == "cuda":
            found["eager torch, hinge, torch.compile"] = torch.compile(self.eager_hinge), 5
        if with_released:
            found[f"{RELEASED} temperature step"] = self.released(joint=False), 2
            found[f"{RELEASED} joint step"] = self.released(joint=True), 2
        return found


def measure(
    N: int, H: int, V: int, dtype: torch.dtype, *, with_released: bool, tiny: bool
) -> list[dict]:
    case = Case(N, H, V, dtype)
    products = case.products()
    times = turns(products, rounds=1 if tiny else 5, warmup=1)
    best = min(times, key=lambda name: quantile(times[name], 0.5))
    calls = {
        "hinge step": case.step(MinPHinge(**EVERY_TOKEN)),
        "AutoDeco temperature step": case.step(AutoDecoTemperature()),
    }
    times |= turns({best: products[best], **calls}, rounds=1 if tiny else 20)
    failed = {}
    for name, (call, rounds) in case.slow(with_released=with_released).items():
        print(name, flush=True)
        try:
            warmup = 0 if RELEASED in name else 1
            times |= turns({name: call}, rounds=1 if tiny else rounds, warmup=warmup)
            calls[name] = call
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
            torch.cuda.empty_cache()
    shape = {"N": N, "H": H, "V": V, "dtype": str(dtype).removeprefix("torch.")}
    shape["group"] = f"training step, N={N}, H={H}, V={V}, {shape['dtype']}"
    limit, flops = quantile(times[best], 0.5), 2.0 * N * H * V
    results = [
        {
            "variant": name,
            **shape,
            "flops": flops,
            "seconds": seconds,
            "over_product": quantile(seconds, 0.5) / limit,
            "share_of_limit": limit / quantile(seconds, 0.5),
            "tflops": flops / quantile(seconds, 0.5) / 1e12,
            "peak_mb": peak_mb(calls[name]) if name in calls else None,
        }
        for name, seconds in times.items()
    ]
    return results + [{"variant": name, **shape, "note": note} for name, note in failed.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--shapes", nargs="*", metavar="N,H,V", help="instead of this device's list"
    )
    args = parser.parse_args(arguments)
    on_gpu = device() == "cuda"
    given = [tuple(int(x) for x in shape.split(",")) for shape in args.shapes or ()]
    shapes = given or (TINY_SHAPES if args.tiny else GPU_SHAPES if on_gpu else CPU_SHAPES)
    results = []
    for shape in shapes:
        for dtype in product_dtypes():
            # The released step takes minutes on a CPU: there, once.
            with_released = on_gpu or dtype == "float32"
            how = {"with_released": with_released, "tiny": args.tiny}
            results += measure(*shape, getattr(torch, dtype), **how)
    record("training", results, output=args.output, targets="random")


if __name__ == "__main__":
    main()
