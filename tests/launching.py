"""Real launches without a GPU: Triton's own dispatcher specialises and compiles every launch for
sm_90, to PTX; what it would run is written down instead. Tensors on the CPU say that they are on
card 1 while card 0 is the current one.

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
from contextlib import ExitStack
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
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


class _Reads(TorchDispatchMode):
    """Refuses operators that make the host wait."""

    WAIT = (
        *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "_linalg_check_errors"),
        *("nonzero", "masked_select", "bincount", "histc", "lift_fresh"),
        *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
    )

    def __init__(self, host: dict[int, torch.Tensor]):
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.name().split("::")[-1].split(".")[0], kwargs or {}
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        counts = name == "repeat_interleave" and kwargs.get("output_size") is None
        copies = name == "copy_" and (_store(args[0]) in self.host) != (
            _store(args[1]) in self.host
        )
        if name in self.WAIT or by_mask or counts or copies:
            raise AssertionError(f"the host waits for the device: {func}")
        return func(*args, **kwargs)


def _store(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class HostWatch:
    """Fails where the host would wait for the device.

    A tensor is the host's if it was made without a device, or for "cpu" by name.
    """

    MAKERS = ("empty", "empty_strided", "zeros", "ones", "full", "arange")

    def __init__(self):
        self.host = {}  # where its memory is → a tensor, which keeps it
        self.reads = _Reads(self.host)

    def _refuse(self, name):
        def read(*args, **options):
            raise AssertionError(f"the host waits for the device: {name}")

        return read

    def _to(self, original):
        def to(x, *args, **options):
            given = (*args, *options.values())
            moves = any(isinstance(one, torch.device | str) for one in given)
            if "cpu" in [one for one in given if isinstance(one, str)]:
                raise AssertionError("the host waits for the device: to")
            if moves and _store(x) in self.host:
                raise AssertionError("the host waits for the device: to, of a tensor of its own")
            return original(x, *args, **options)

        return to

    def _maker(self, original):
        def make(*args, **options):
            x, device = original(*args, **options), options.get("device")
            if device is None or isinstance(device, str):
                self.host[_store(x)] = x
            return x

        return make

    def _inside(self, original):
        """An op of the project, which torch calls with the modes off."""

        def call(*args, **options):
            with self.reads:
                return original(*args, **options)

        return call

    def __enter__(self):
        self.patches = ExitStack()

        def patch(where, name, value):
            self.patches.enter_context(mock.patch.object(where, name, value))

        for name in ("item", "tolist", "numpy", "cpu", "new_tensor", "__bool__"):
            patch(torch.Tensor, name, self._refuse(name))
        for name in ("tensor", "as_tensor", "from_numpy"):
            patch(torch, name, self._refuse(name))
        patch(torch.Tensor, "to", self._to(torch.Tensor.to))
        for name in self.MAKERS:
            patch(torch, name, self._maker(getattr(torch, name)))
        for name, op in OPDEFS.items():
            if name.startswith("autodeco_fast::"):
                inside = {key: self._inside(f) for key, f in op._backend_fns.items()}
                self.patches.enter_context(mock.patch.dict(op._backend_fns, inside))
        self.patches.enter_context(self.reads)
        return self

    def __exit__(self, *raised):
        return self.patches.__exit__(*raised)


def pretend() -> None:
    """From here on every tensor says that it is on a card, and a graph is being captured."""
    driver.set_active(_Driver())
    # `bench/resources.py` assembles; here, of every variant, that took a fifth of the time. The
    # hash keeps what is made here out of the way of real binaries in Triton's cache.
    CUDABackend.make_cubin = lambda *_: b""
    CUDABackend.hash = lambda _: "not assembled"
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


@torch.library.custom_op("autodeco_fast::waits", mutates_args=())
def _waits(x: torch.Tensor) -> torch.Tensor:
    return x.nonzero().clone()


def waits() -> dict[str, Callable[[], object]]:
    """Calls that make the host wait, each in a way of its own."""
    x, counts = torch.ones(3), torch.tensor([1, 2, 3])
    return {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.sum() > 0),
        "mask": lambda: x[x > 0],
        "nonzero": lambda: (x > 0).nonzero(),
        "tensor": lambda: torch.tensor([1.0]),
        "numpy": lambda: x.numpy(),
        "unique": lambda: x.unique(),
        "unique along an axis": lambda: x.unique(dim=0),
        "runs": lambda: x.unique_consecutive(),
        "repeats": lambda: x.repeat_interleave(counts),
        "bincount": lambda: counts.bincount(),
        "allclose": lambda: x.allclose(x),
        "to": lambda: x.to("cpu"),
        "to by name": lambda: x.to(device="cpu", non_blocking=True),
        "copy to the host": lambda: torch.empty(3).copy_(x),
        "part of the host's": lambda: torch.zeros(2, 3)[1].copy_(x),
        "copy from the host": lambda: x.copy_(torch.ones(3, device="cpu")),
        "to the device": lambda: torch.arange(3).to(x.device),
        "in an op": lambda: _waits(x),
    }


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
    for name, look in waits().items():
        one(name, look, kind="control")
    x, counts = torch.ones(3), torch.tensor([1, 2, 3])
    for name, call in (
        ("a dtype", lambda: x.to(torch.bfloat16)),
        ("a device", lambda: x.to(counts.device, torch.float64)),
        ("repeats", lambda: x.repeat_interleave(counts, output_size=6)),
        ("copy", lambda: torch.empty(3, device=x.device).copy_(x)),
    ):
        one(name, call, kind="no wait")


if __name__ == "__main__":
    sys.exit(main())
