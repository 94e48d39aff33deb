"""`token_stats` and the hinge, forward and backward, against the bare LM-head product: seconds, TFLOP/s, peak memory.

    python -m bench.token_stats

N = 2,048 hidden states of width 896, V = 151,936. The physical limit is the matrix product alone; it is taken in several
chunkings, each into one reused buffer (or written out whole), and the fastest of them is what everything is compared with.
"""

import torch
import torch.nn.functional as F

from autodeco_fast import min_p_hinge_loss, token_stats
from bench.harness import device, interleave, peak_bytes, record

N, H, V = 2048, 896, 151_936
CHUNKINGS = {"whole": (N, V), "2048 columns": (N, 2048), "8192 columns": (N, 8192), "64 rows": (64, V)}


def product(hidden: torch.Tensor, weight: torch.Tensor, rows: int, columns: int):
    """A call that multiplies in blocks of `rows` × `columns`."""
    out = torch.empty(rows * columns, dtype=hidden.dtype, device=hidden.device)

    def run() -> None:
        for h in hidden.split(rows):
            for w in weight.split(columns):
                torch.mm(h, w.T, out=out[: len(h) * len(w)].view(len(h), len(w)))

    return run


def hinge_step(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """All six statistics, the loss and its gradient with respect to the temperature."""
    loss = min_p_hinge_loss(temperature, token_stats(hidden, weight, target))
    return torch.autograd.grad(loss, temperature)[0]


def eager_step(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, from logits `[N, V]`."""
    with torch.no_grad():
        z = (hidden @ weight.T).float()
        top, argmax = z.max(-1)
        at_target = z.gather(1, target[:, None])[:, 0]
        rank = (z > at_target[:, None]).sum(-1)
        log_p = F.log_softmax(z, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
    need = (top - at_target) / -torch.log(torch.tensor(0.1))
    kept = need <= 2.0
    loss = (((need - temperature).relu() + 0.1 * temperature) * kept).sum() / kept.sum().clamp(min=1)
    del argmax, rank, entropy
    return torch.autograd.grad(loss, temperature)[0]


def measure(dtype: torch.dtype) -> list[dict]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=device()).to(dtype)
    weight = (torch.randn(V, H, device=device()) * 0.1).to(dtype)
    target = torch.randint(0, V, (N,), device=device())
    temperature = torch.rand(N, device=device(), requires_grad=True)
    data = hidden, weight, target, temperature

    bare = {f"product, {name}": product(hidden, weight, *shape) for name, shape in CHUNKINGS.items()}
    times = interleave(bare, samples=5, warmup=1)
    best = min(times, key=lambda name: times[name]["seconds"])
    rivals = {best: bare[best], "token_stats + hinge": lambda: hinge_step(*data), "eager torch": lambda: eager_step(*data)}
    times |= interleave(rivals, samples=20)
    floating = 2.0 * N * H * V
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "variant": name,
            "seconds": t["seconds"],
            "p20": t["p20"],
            "p80": t["p80"],
            "over_product": t["seconds"] / times[best]["seconds"],
            "tflops": floating / t["seconds"] / 1e12,
            "peak_mb": peak_bytes(rivals[name]) / 1e6 if name in rivals and name not in bare else None,
        }
        for name, t in times.items()
    ]


def main() -> None:
    rows = measure(torch.float32) + measure(torch.bfloat16)
    record("token_stats", rows, N=N, H=H, V=V, targets="random", min_p=0.1, samples="20; 5 of the slower chunkings")


if __name__ == "__main__":
    main()
