"""What the device can do at most, measured: bytes and floating-point operations a second.

    python -m bench.limits

writes a record of them, and on a GPU of the clock's reading around nothing.
"""

import functools
from collections.abc import Callable

import torch

from bench.clock import empty_pair, quantile, turns
from bench.machine import device, product_dtypes
from bench.records import options, record

LARGE, SMALL = 1 << 30, 1 << 20  # bytes


def _rounds(work: Callable[[], object]) -> list[float]:
    return turns({"": work})[""]


@functools.cache
def copy_rounds(n_bytes: int) -> list[float]:
    """Seconds of every round of a copy."""
    a = torch.ones(n_bytes // 4, device=device())
    b = torch.empty_like(a)
    return _rounds(lambda: b.copy_(a))


@functools.cache
def read_rounds(n_bytes: int) -> list[float]:
    """Seconds of every round of a maximum over an fp32 array."""
    a = torch.zeros(n_bytes // 4, device=device())
    return _rounds(lambda: a.amax())


def product_rounds(dtype: torch.dtype, n: int) -> list[float]:
    """Seconds of every round of an n × n × n product of random numbers."""
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    return _rounds(lambda: a @ b)


def copy_bandwidth(n_bytes: int = LARGE) -> float:
    """Bytes a second, read plus written, of a copy."""
    return 2 * n_bytes / quantile(copy_rounds(n_bytes), 0.5)


def read_bandwidth(n_bytes: int = LARGE) -> float:
    """Bytes a second of a maximum over an array: of memory, if the caches do not hold it."""
    return n_bytes / quantile(read_rounds(n_bytes), 0.5)


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    n_bytes = SMALL if args.tiny else LARGE
    n = 64 if args.tiny else 8192 if device() == "cuda" else 2048
    results = []
    for name, moved, rounds in (
        ("copy, read + written", 2 * n_bytes, copy_rounds(n_bytes)),
        ("read (maximum)", n_bytes, read_rounds(n_bytes)),
    ):
        rate = moved / quantile(rounds, 0.5)
        results.append({"variant": name, "seconds": rounds, "bytes": moved, "GB/s": rate / 1e9})
    for dtype in dict.fromkeys(("float32", *product_dtypes())):
        rounds, flops = product_rounds(getattr(torch, dtype), n), 2 * n**3
        rate = flops / quantile(rounds, 0.5)
        name = f"product, {n}³, {dtype}"
        times = {"seconds": rounds, "flops": flops, "TFLOP/s": rate / 1e12}
        results.append({"variant": name, **times})
    if device() == "cuda":
        results.append({"variant": "empty pair of events", "seconds": empty_pair()})
    record("limits", results, output=args.output)


if __name__ == "__main__":
    main()
