"""Real launches without a GPU: Triton's own dispatcher specialises and compiles every launch for
sm_90; what it would run is written down instead. Tensors on the CPU say that they are on card 1
while card 0 is the current one.

    python -m tests.launching        prints a line of JSON for every case of `tests/op_cases.py`

Values are never computed; what is seen is which kernels compile and how many variants of each, on
which card they would run, and whether the host looked at a tensor: `HostWatch` refuses every read
of one, and every copy of a number to the device.
"""

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CARD, CURRENT = 1, [0]
LAUNCHED: list[tuple[str, int]] = []  # (kernel, card) of each launch
EARLY: list[str] = []  # kernels of launches that may start before the one ahead ends
VARIANTS: list[tuple[str, int]] = []  # (kernel, which of those that were compiled) of each launch


class _Launcher:
    """What runs a compiled kernel: one for each entry of the dispatcher's cache."""

    made = 0

    def __init__(self, src, metadata):
        self.name, self.number = src.fn.__name__, _Launcher.made
        self.early = metadata.launch_pdl
        _Launcher.made += 1

    def __call__(self, *args):
        LAUNCHED.append((self.name, CURRENT[0]))
        VARIANTS.append((self.name, self.number))
        if self.early:
            EARLY.append(self.name)


class _Utils:
    def load_binary(self, *args):
        return self, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    """An H100 that runs nothing."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self):
        return CURRENT[0]

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def _exchange(card: int) -> int:
    """torch's own way to another card and back."""
    before = CURRENT[0]
    CURRENT[0] = card
    return before


class HostWatch(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    READS = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "masked_select",
        "equal",
        "unique",
        "lift_fresh",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        if name in self.READS:
            raise AssertionError(f"the host waits for the device: {func}")
        if name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            raise AssertionError(f"the host waits for the device: {func} by a mask")
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        def refuse(name):
            def read(*args, **options):
                raise AssertionError(f"the host waits for the device: {name}")

            return read

        self.tensor = {
            n: getattr(torch.Tensor, n)
            for n in ("item", "tolist", "numpy", "cpu", "new_tensor", "__bool__")
        }
        self.torch = {n: getattr(torch, n) for n in ("tensor", "as_tensor", "from_numpy")}
        for where, names in ((torch.Tensor, self.tensor), (torch, self.torch)):
            for name in names:
                setattr(where, name, refuse(name))
        return super().__enter__()

    def __exit__(self, *raised):
        for where, names in ((torch.Tensor, self.tensor), (torch, self.torch)):
            for name, original in names.items():
                setattr(where, name, original)
        return super().__exit__(*raised)


def pretend() -> None:
    """From here on every tensor says that it is on a card, and a graph is being captured."""
    driver.set_active(_Driver())
    torch.Tensor.is_cuda, torch.Tensor.is_cpu = property(lambda _: True), property(lambda _: False)
    torch.Tensor.get_device = lambda _: CARD
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = _exchange
    torch.cuda.is_current_stream_capturing = lambda: True
    # Not 9: a descriptor, which is chosen there, is filled by the real driver.
    torch.cuda.get_device_capability = lambda *_: (8, 0)


def run(call, watch: bool = True) -> dict:
    """What a call launched, and what it failed with."""
    LAUNCHED.clear()
    EARLY.clear()
    try:
        if watch:
            with HostWatch():
                call()
        else:
            call()
        error = None
    except Exception:
        error = traceback.format_exc().strip()
    return {
        "launched": list(LAUNCHED),
        "early": list(EARLY),
        "current": CURRENT[0],
        "error": error,
    }


def variants(calls: Iterable[Callable[[], object]]) -> dict:
    """How many variants of each kernel a number of calls took, and the first error."""
    VARIANTS.clear()
    errors = [run(call)["error"] for call in calls]
    counts = Counter(kernel for kernel, _ in set(VARIANTS))
    return {"variants": counts, "error": next((e for e in errors if e is not None), None)}


def main() -> None:
    from tests import op_cases

    def one(name, call, **about):
        print(json.dumps({"case": name, **about, **run(call)}), flush=True)

    plain, odd = op_cases.tensors(5, torch.bfloat16), op_cases.tensors(1)
    odd = {name: op_cases.strided(x) for name, x in odd.items()}
    double = op_cases.tensors(3, torch.float64)
    series = op_cases.series()
    pretend()
    for name, calls in series.items():
        print(json.dumps({"case": name, "kind": "variants", **variants(calls)}), flush=True)
    for name, (_, call) in op_cases.CASES.items():
        one(name, lambda: call(plain), kind="bf16")
        one(name, lambda: call(odd), kind="one strided row")
    for name, call in op_cases.NUMBERS.items():
        one(name, lambda: call(plain), kind="numbers")
    for name in op_cases.CAPTURABLE:
        one(name, lambda: op_cases.TORCH_ONLY[name][1](plain), kind="torch")
    for name in (
        "logit_stats",
        "token_stats, fused=True",
        "prob_stats",
        "temperature_head",
        "target_logits",
    ):
        call = op_cases.CASES[name][1]
        print(
            json.dumps({"case": name, "kind": "fp64", **run(lambda: call(double), watch=False)}),
            flush=True,
        )
        print(
            json.dumps(
                {
                    "case": name,
                    "kind": "fp64 by triton",
                    **run(lambda: call(double, backend="triton")),
                }
            ),
            flush=True,
        )
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    for name in ("sample", "subtile_maxima", "temperature_head"):
        one(name, lambda: op_cases.CASES[name][1](plain), kind="Hopper")
    one("sample, all cuts", lambda: op_cases.NUMBERS["sample, all cuts"](plain), kind="Hopper")
    # the control: the watch sees what it is there for
    x = torch.ones(3)
    for name, look in (
        ("item", lambda: x.sum().item()),
        ("bool", lambda: bool(x.sum() > 0)),
        ("mask", lambda: x[x > 0]),
        ("nonzero", lambda: (x > 0).nonzero()),
        ("tensor", lambda: torch.tensor([1.0])),
        ("numpy", lambda: x.numpy()),
    ):
        one(name, look, kind="control")


if __name__ == "__main__":
    sys.exit(main())
