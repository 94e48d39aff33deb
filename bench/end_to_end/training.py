"""A head's training step against the bare LM-head product: seconds, TFLOP/s, share of the product,
peak memory.

    python -m bench.end_to_end.training [--shapes N,H,V …]

A step is the head forward, the statistics, the loss and the backward. The physical limit is the
matrix product alone; it is taken in several chunkings, each into one reused buffer (or written out
whole), and the fastest of them is what everything is compared with, in the same run. Peers: the
hinge in plain torch from logits [N, V], as it is and compiled, and AutoDeco's released steps. They
take turns with ours, `over_ours` is over its step there (`ours_beside`). A peer that fails, for
want of memory or for another reason, is recorded with that. On two CPU cores such a round takes
two and a half minutes, AutoDeco's released joint step more than half of it, and the six of them a
quarter of an hour. Statistics alone are `bench/test_token_stats.py`.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.training.objectives import AutoDecoJoint, AutoDecoTemperature, MinPHinge
from autodeco_fast.training.step import training_step
from bench.clock import Call, device_bound, in_turn, quantile, turns
from bench.machine import device, product_dtypes
from bench.memory import peak_mb
from bench.peers import compiled_by_torch
from bench.records import Recording, options, reason
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
HINGE, TEMPERATURE, JOINT = "hinge step", "AutoDeco temperature step", "AutoDeco joint step"
EAGER, RELEASED = "eager torch, hinge", "AutoDeco's released"
PEER_ROUNDS = 10 if device() == "cuda" else 5


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

    def peers(self, *, with_released: bool, tiny: bool) -> dict[str, tuple[Call, str]]:
        """Name → (call, the step of ours that it is compared with)."""
        compiled = compiled_by_torch(self.eager_hinge, tiny=tiny)
        found = {EAGER: (self.eager_hinge, HINGE), f"{EAGER}, torch.compile": (compiled, HINGE)}
        if with_released:
            for joint, name in ((False, TEMPERATURE), (True, JOINT)):
                call = self.released(joint=joint)
                found[f"{RELEASED} {name.removeprefix('AutoDeco ')}"] = call, name
        return found


def what_runs(peers: dict[str, tuple[Call, str]]) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls every peer once; those that can be timed, and why the others cannot."""
    able, failed = {}, {}
    for name, (call, _) in peers.items():
        print(name, flush=True)
        try:
            call()
            able[name] = call
        except Exception as error:
            failed[name] = reason(error)
            if device() == "cuda":
                torch.cuda.empty_cache()
    return able, failed


def measure(
    N: int, H: int, V: int, dtype: torch.dtype, *, with_released: bool, tiny: bool
) -> list[dict]:
    case = Case(N, H, V, dtype)
    products = case.products()
    times = turns(products, rounds=1 if tiny else 5, warmup=1)
    best = min(times, key=lambda name: quantile(times[name], 0.5))
    ours = {
        HINGE: case.step(MinPHinge(**EVERY_TOKEN)),
        TEMPERATURE: case.step(AutoDecoTemperature()),
    }
    times |= turns({best: products[best], **ours}, rounds=1 if tiny else 20)
    ours[JOINT] = case.step(AutoDecoJoint())
    peers = case.peers(with_released=with_released, tiny=tiny)
    able, failed = what_runs(peers)
    # A second is longer than what threads or caches of the one before can change.
    beside = in_turn({**ours, **able}, rounds=1 if tiny else PEER_ROUNDS, warmup=1)
    times |= {name: beside[name] for name in (JOINT, *able)}
    shape = {"N": N, "H": H, "V": V, "dtype": str(dtype).removeprefix("torch.")}
    shape["group"] = f"training step, N={N}, H={H}, V={V}, {shape['dtype']}"
    limit, flops = quantile(times[best], 0.5), 2.0 * N * H * V
    calls, results = ours | able, []
    for name, seconds in times.items():
        median = quantile(seconds, 0.5)
        result = {"variant": name, **shape, "flops": flops, "seconds": seconds}
        result |= {"over_product": median / limit, "share_of_limit": limit / median}
        result |= {"tflops": flops / median / 1e12, "peak_mb": None}
        if name in able:
            of_ours = quantile(beside[peers[name][1]], 0.5)
            result |= {"over_ours": median / of_ours, "ours_beside": of_ours}
        if name in calls:
            result["peak_mb"] = peak_mb(calls[name])
            if device() == "cuda":
                result["device_bound"] = device_bound(calls[name])
        results.append(result)
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
    recording = Recording("training", output=args.output)
    for shape in shapes:
        for dtype in product_dtypes():
            # The released steps take minutes on a CPU: there, in one dtype.
            with_released = on_gpu or dtype == "float32"
            how = {"with_released": with_released, "tiny": args.tiny}
            recording.add(measure(*shape, getattr(torch, dtype), **how), targets="random")


if __name__ == "__main__":
    main()
