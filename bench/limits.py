"""What the device can do at most, measured: bytes and floating-point operations a second.

    python -m bench.limits

writes a record of them, and on a GPU of the clock's reading around nothing.
"""

import functools

import torch

from bench.clock import empty_pair, quantile, turns
from bench.machine import device, product_dtypes
from bench.records import options, record

LARGE, SMALL = 1 << 30, 1 << 20  # bytes


def _median(work) -> float:
    return quantile(turns({"": work}, rounds=10)[""], 0.5)


@functools.cache
def copy_bandwidth(n_bytes: int = LARGE) -> float:
    """Bytes a second, read plus written, of a large copy."""
    a = torch.ones(n_bytes // 4, device=device())
    b = torch.empty_like(a)
    return 2 * n_bytes / _median(lambda: b.copy_(a))


@functools.cache
def read_bandwidth(n_bytes: int = LARGE) -> float:
    """Bytes a second of a maximum over a large fp32 array."""
    a = torch.zeros(n_bytes // 4, device=device())
    return n_bytes / _median(lambda: a.amax())


@functools.cache
def product_rate(dtype: torch.dtype, n: int) -> float:
    """Floating-point operations a second of an n × n × n product of random numbers."""
    a, b = (torch.randn(n, n, device=device()).to(dtype) for _ in range(2))
    return 2 * n**3 / _median(lambda: a @ b)


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    n_bytes = SMALL if args.tiny else LARGE
    n = 64 if args.tiny else 8192 if device() == "cuda" else 2048
    results = []
    for name, moved, rate in (
        ("copy, read + written", 2 * n_bytes, copy_bandwidth(n_bytes)),
        ("read (maximum)", n_bytes, read_bandwidth(n_bytes)),
    ):
        results.append(
            {"variant": name, "seconds": moved / rate, "bytes": moved, "GB/s": rate / 1e9}
        )
    for dtype in dict.fromkeys(("float32", *product_dtypes())):
        rate, flops = product_rate(getattr(torch, dtype), n), 2 * n**3
        name = f"product, {n}³, {dtype}"
        times = {"seconds": flops / rate, "flops": flops, "TFLOP/s": rate / 1e12}
        results.append({"variant": name, **times})
    if device() == "cuda":
        results.append({"variant": "empty pair of events", "seconds": empty_pair()})
    record("limits", results, output=args.output)


if __name__ == "__main__":
    main()
