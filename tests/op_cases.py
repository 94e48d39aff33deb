"""Every public op as a call of named tensors, for tests that vary one of them."""

import functools
from collections.abc import Callable

import torch

import autodeco_fast as af
from autodeco_fast.ops.temperature_head import temperature_head

H, V, F = 24, 70, 20


def tensors(N: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Arguments of N rows; V is no multiple of 32."""
    g = torch.Generator().manual_seed(N)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    def row(low, high):
        return torch.rand(N, generator=g) * (high - low) + low

    def ids(high):
        return torch.randint(0, high, (N,), generator=g)

    target = ids(V)
    target[1::4] = -100
    logits = {
        "logits": normal(N, V) * 3 + torch.linspace(0, 6, V).to(dtype),
        "hidden": normal(N, H),
        "weight": normal(V, H),
        "bias": normal(V),
        "target": target,
        "target_logit": row(0, 3),
    }
    logits["maxima"] = logits["logits"].float().amax(-1, keepdim=True)
    sampling = {
        "temperature": row(0.3, 2),
        "min_p": row(0, 0.3),
        "top_p": row(0.5, 1),
        "top_k": ids(V),
        "seed": ids(1000),
        "position": ids(50),
        "stream": ids(50),
        "maximum": row(8, 9),
        "token_bitmask": torch.randint(-(2**31), 2**31, (N, 3), generator=g).int(),
    }
    head = {"w1": normal(F, H), "b1": normal(F), "w2": normal(1, F), "b2": normal(1)}
    stats = {
        "max_logit": row(3, 6),
        "stat_logit": row(0, 3),
        "rank": ids(4) - 1,
        "logsumexp": row(6, 7),
        "scaled": row(6, 7),
    }
    losses = {"loss_weight": row(0, 1), "uniform": row(0, 1), "grad": row(0, 1)}
    return {**logits, **sampling, **head, **stats, **losses}


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a store whose others are large, or 0 for
    integers."""
    store = torch.full((*x.shape, 2), 77 if x.is_floating_point() else 0, dtype=x.dtype)
    store[..., 0] = x
    return store[..., 0]


def _stats(t: dict) -> af.TokenStats:
    fields = t["max_logit"], t["rank"], t["stat_logit"], t["logsumexp"], t["rank"], t["max_logit"]
    at = {"scaled_logsumexp": t["scaled"], "scaled_entropy": t["scaled"]}
    return af.TokenStats(*fields, t["temperature"], **at, scaled_log_mass=t["scaled"])


def _partial(t: dict, **options) -> af.SamplePartial:
    given = {
        name: t[name]
        for name in ("min_p", "seed", "position", "stream", "token_bitmask", "maximum")
    }
    return af.sample_partial(t["logits"], t["temperature"], first_id=0, **given, **options)


def _stats_partial(t: dict, **options) -> af.TokenStatsPartial:
    given = t["hidden"], t["weight"], t["target"], t["target_logit"]
    return af.token_stats_partial(
        *given, first_id=0, bias=t["bias"], temperature=t["temperature"], **options
    )


def _head(t: dict, **options) -> tuple[torch.Tensor, ...]:
    given = [t[name].detach().requires_grad_() for name in ("hidden", "w1", "b1", "w2", "b2")]
    T = temperature_head(*given, **options)
    return T, *torch.autograd.grad(T, given, t["grad"].to(T.dtype))


def _hinge(t: dict, reduction: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    T = t["temperature"].detach().requires_grad_()
    given = {"weight": t["loss_weight"], "reduction": reduction, "unreachable": "clip"}
    loss = af.min_p_hinge_loss(T, _stats(t), **given, **options)
    return loss, *torch.autograd.grad(loss, T, t["grad"] if reduction == "none" else None)


def _width(t: dict, loss: Callable, names: tuple[str, ...], reduction: str, **options) -> tuple:
    T = t["temperature"].detach().requires_grad_()
    given = {"row_weight": t["loss_weight"], "reduction": reduction, "softcap": 20.0}
    value = loss(T, *(t[name] for name in names), **given, **options)
    return value, *torch.autograd.grad(value, T, t["grad"] if reduction == "none" else None)


def _logit_width(t: dict, **options) -> tuple:
    return _width(t, af.nucleus_width_loss, ("logits",), "none", **options)


def _linear_width(t: dict, **options) -> tuple:
    given = {"bias": t["bias"], "chunk_bytes": 1000}
    loss = functools.partial(af.linear_nucleus_width_loss, **given)
    return _width(t, loss, ("hidden", "weight"), "mean", **options)


_SAMPLER = ("temperature", "min_p", "seed", "position", "stream")
_PRODUCT = ("hidden", "weight", "bias", "target")
_STATS = ("max_logit", "stat_logit", "rank", "logsumexp")
_ALL = {"return_logprob": True, "return_kept": True, "return_full_logprob": True}


def _picked(t: dict, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: t[name] for name in names}


def _sample(t: dict, **options) -> af.SampleOutput:
    given = _picked(t, (*_SAMPLER, "token_bitmask"))
    return af.sample(t["logits"], **given, **_ALL, **options)


def _sample_from_maxima(t: dict, **options) -> af.SampleOutput:
    return af.sample(t["logits"], t["temperature"], seed=5, maxima=t["maxima"], **options)


def _subtile_maxima(t: dict, **options) -> torch.Tensor:
    return af.subtile_maxima(t["logits"], token_bitmask=t["token_bitmask"], **options)


def _linear_sample(t: dict, **options) -> af.SampleOutput:
    given = _picked(t, ("bias", *_SAMPLER))
    asked = {"return_full_logprob": True, "fused": True}
    return af.linear_sample(t["hidden"], t["weight"], **given, **asked, **options)


def _quantized(t: dict, **options) -> af.SampleOutput:
    given = _picked(t, ("hidden", "weight"))
    if t["weight"].dtype == torch.float16:  # which a head refuses
        given = {name: x.bfloat16() for name, x in given.items()}
    head = af.QuantizedLMHead(given["weight"])
    return af.linear_sample(given["hidden"], head, **_picked(t, _SAMPLER), **options)


def _logit_stats(t: dict, **options) -> af.TokenStats:
    given = {"temperature": t["temperature"], "min_p": 0.1, "softcap": 20.0}
    return af.logit_stats(t["logits"], t["target"], **given, **options)


def _token_stats(t: dict, **options) -> af.TokenStats:
    given = _picked(t, ("bias", "temperature"))
    return af.token_stats(t["hidden"], t["weight"], t["target"], **given, min_p=0.1, **options)


def _target_logits(t: dict, **options) -> torch.Tensor:
    given = t["hidden"], t["weight"], t["target"]
    return af.target_logits(*given, first_id=0, bias=t["bias"], **options)


def _prob_stats(t: dict, **options) -> af.ProbStats:
    return af.prob_stats(t["logits"], t["temperature"], **options)


# name → the tensors it takes, and the call, whose results are tensors, tuples of them, or None
CASES: dict[str, tuple[tuple[str, ...], Callable]] = {
    "sample": (("logits", *_SAMPLER, "token_bitmask"), _sample),
    "sample, maxima": (("logits", "temperature"), _sample_from_maxima),
    "subtile_maxima": (("logits", "token_bitmask"), _subtile_maxima),
    "linear_sample": (("hidden", "weight", "bias", *_SAMPLER), _linear_sample),
    "linear_sample, quantized": (("hidden", "weight", *_SAMPLER), _quantized),
    "sample_partial": (("logits", *_SAMPLER, "token_bitmask", "maximum"), _partial),
    "logit_stats": (("logits", "target", "temperature"), _logit_stats),
    "logit_stats, cut": (
        ("logits", "target", "temperature"),
        functools.partial(_logit_stats, cut=True),
    ),
    **{
        f"token_stats, fused={fused}": (
            (*_PRODUCT, "temperature"),
            functools.partial(_token_stats, fused=fused),
        )
        for fused in (True, False)
    },
    "token_stats, cut": (
        (*_PRODUCT, "temperature"),
        functools.partial(_token_stats, cut=True, fused=True),
    ),
    "target_logits": (_PRODUCT, _target_logits),
    "token_stats_partial": ((*_PRODUCT, "target_logit", "temperature"), _stats_partial),
    "prob_stats": (("logits", "temperature"), _prob_stats),
    "temperature_head": (("hidden", "w1", "b1", "w2", "b2", "grad"), _head),
    "min_p_hinge_loss": (
        (*_STATS, "temperature", "loss_weight"),
        functools.partial(_hinge, reduction="mean"),
    ),
    "min_p_hinge_loss, rows": (
        (*_STATS, "temperature", "loss_weight", "grad"),
        functools.partial(_hinge, reduction="none"),
    ),
    "nucleus_width_loss": (("logits", "temperature", "loss_weight", "grad"), _logit_width),
    "linear_nucleus_width_loss": (
        ("hidden", "weight", "bias", "temperature", "loss_weight"),
        _linear_width,
    ),
}
TORCH_ONLY: dict[str, tuple[tuple[str, ...], Callable]] = {
    "sample, top-k and top-p": (  # slow in Triton's interpreter
        ("top_k", "top_p"),
        lambda t: af.sample(
            t["logits"], 0.9, seed=1, top_k=t["top_k"], top_p=t["top_p"], backend="torch"
        ),
    ),
    "merge_samples": (
        ("temperature", "min_p"),
        lambda t: af.merge_samples([_partial(t)], t["temperature"], min_p=t["min_p"]),
    ),
    "merge_token_stats": (
        ("target", "temperature"),
        lambda t: af.merge_token_stats(
            [_stats_partial(t)], t["target"], temperature=t["temperature"]
        ),
    ),
    "required_temperature": (_STATS, lambda t: af.required_temperature(_stats(t), 0.1)),
    "goldilocks_mask": (
        (*_STATS, "uniform"),
        lambda t: af.goldilocks_mask(_stats(t), uniform=t["uniform"]),
    ),
    "autodeco_temperature_loss": (
        (*_STATS, "scaled", "temperature"),
        lambda t: af.autodeco_temperature_loss(t["temperature"], _stats(t), easy_drop=0.0),
    ),
    "reward_loss": (
        (*_STATS, "scaled", "temperature", "grad", "loss_weight"),
        lambda t: af.reward_loss(
            t["temperature"], _stats(t), t["grad"], entropy_weight=0.1, weight=t["loss_weight"]
        ),
    ),
    "soft_top_p_loss": (
        (*_PRODUCT, "temperature", "top_p"),
        lambda t: af.soft_top_p_loss(
            t["hidden"],
            t["weight"],
            t["target"],
            t["temperature"],
            t["top_p"],
            bias=t["bias"],
            reduction="none",
        ),
    ),
}


CAPTURABLE = (
    "merge_samples",
    "merge_token_stats",
    "required_temperature",
    "goldilocks_mask",
    "autodeco_temperature_loss",
    "reward_loss",
)

# the same with numbers for all rows, which kernels take as arguments
NUMBERS: dict[str, Callable] = {
    "sample": lambda t: af.sample(t["logits"], 0.7, min_p=0.1, seed=3),
    "sample, all cuts": lambda t: af.sample(
        t["logits"], 0.7, min_p=0.1, top_k=5, top_p=0.9, seed=2**63, position=2**31, **_ALL
    ),
    "sample, cuts by row": lambda t: af.sample(
        t["logits"], 0.7, top_k=t["top_k"], top_p=t["top_p"], seed=t["seed"]
    ),
    "linear_sample": lambda t: af.linear_sample(
        t["hidden"], t["weight"], 0.7, min_p=0.1, softcap=20.0, seed=3, fused=True
    ),
    "linear_sample, quantized": lambda t: af.linear_sample(
        t["hidden"], af.QuantizedLMHead(t["weight"]), 0.7, min_p=0.1, seed=3
    ),
    "linear_sample, quantized, no cut": lambda t: af.linear_sample(
        t["hidden"], af.QuantizedLMHead(t["weight"]), 0.7, seed=3
    ),
    "linear_sample, with logits": lambda t: af.linear_sample(
        t["hidden"], t["weight"], 0.7, softcap=20.0, seed=3, fused=False
    ),
    "sample_partial": lambda t: af.sample_partial(t["logits"], 0.7, first_id=8, seed=-1),
    "merge_samples": lambda t: af.merge_samples([_partial(t)] * 2, 0.7, min_p=0.1),
    "token_stats": lambda t: af.token_stats(t["hidden"], t["weight"], t["target"]),
}

# how many rows a call has
BATCHES = (1, 2, 3, 8, 13, 16, 64, 512)


def series() -> dict[str, list[Callable]]:
    """Calls that differ in what must not make another variant of a kernel: the number of rows,
    integers' types and sizes, values of numbers. Large tensors, whose values are never read."""
    vocab, width = 50_000, 256
    weight = torch.empty(vocab, width, dtype=torch.bfloat16)
    quantized = af.QuantizedLMHead(weight[:5000])
    head = torch.empty(F, width), torch.empty(F), torch.empty(1, F), torch.empty(1)
    numbers = [
        {"temperature": T, "min_p": min_p, "seed": seed, "position": position}
        for T, min_p, seed, position in ((0.7, 0.1, 3, 0), (1, 1, 2**40, 2**31), (0, 0.5, 1, 16))
    ]
    calls: dict[str, list[Callable]] = {}

    def add(name: str, op: Callable, *given: torch.Tensor, **options) -> None:
        calls.setdefault(name, []).append(functools.partial(op, *given, **options))

    for B in BATCHES:
        t = tensors(B)
        logits, hidden = (torch.empty(B, n, dtype=torch.bfloat16) for n in (vocab, width))
        for given in numbers:
            add("sample", af.sample, logits, **given)
            add("sample, all cuts", af.sample, logits, top_k=5, top_p=0.9, **given, **_ALL)
        add("linear_sample", af.linear_sample, hidden, weight, fused=True, **numbers[0])
        if B <= 32:
            name = "linear_sample, quantized"
            add(name, af.linear_sample, hidden, quantized, **numbers[0])
        for first in (0, 1):  # the second is not aligned
            view = torch.empty(B, vocab + 16, dtype=torch.bfloat16)[:, first : vocab + first]
            add("sample, views", af.sample, view, **numbers[0])
        for dtype in (torch.int32, torch.int64):
            names = "seed", "position", "stream"
            by_row = {n: t[n].to(dtype) for n in names}
            by_row |= {"temperature": t["temperature"], "min_p": t["min_p"].double()}
            add("sample, by row", af.sample, logits, **by_row)
            one = {"temperature": torch.ones(()), "min_p": torch.ones(1)}
            add("sample, by row", af.sample, logits, **by_row | one)
            mixed = {"temperature": 1.0, "seed": by_row["seed"]}
            add("sample, a seed a row", af.sample, logits, **mixed)
        add("logit_stats", af.logit_stats, logits, t["target"])
        add("logit_stats, scaled", af.logit_stats, logits, t["target"], temperature=t["grad"])
        add("token_stats", af.token_stats, hidden, weight, t["target"], fused=True)
        add("prob_stats", af.prob_stats, logits, t["temperature"])
        add("nucleus_width_loss", af.nucleus_width_loss, t["temperature"], logits)
        add("temperature_head", temperature_head, hidden, *head)
        add("min_p_hinge_loss", af.min_p_hinge_loss, t["temperature"], _stats(t))
    return calls


def flat(results) -> list[torch.Tensor]:
    """The tensors among results."""
    if isinstance(results, torch.Tensor):
        return [results.detach()]
    return [x for r in results or () for x in flat(r)]
