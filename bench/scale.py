"""What a scan costs, predicted from the records of an H100: tokens an hour on one GPU and on 64,
hours for a trillion tokens.

    python -m bench.scale

    seconds a token = FLOPs of the layers / matrix rate + token_stats

The matrix rate (`limits`) and `token_stats` at the model's own LM head (8,192 tokens, bf16) are
measured; FLOPs are counted from the model's dimensions, attention over half of a sequence of
`LENGTH` tokens included. No forward pass reaches the rate of one large product, so this is what no
scan can beat, and beside it stands what one does that runs its layers at `REACHED` of it, which is
an assumption. An H200 has the multiprocessors of an H100 and more memory; a scan reads no more
memory than either moves in the time of its products, so one line is for both. Needs no GPU.
"""

import json
from dataclasses import dataclass

from autodeco_fast.training.scan_store import token_bytes
from bench.machine import RESULTS
from bench.records import markdown

LENGTH = 1024  # tokens of a sequence
REACHED = 0.4  # of the matrix rate, by the layers: an assumption
ROWS = 8192  # of the record of `token_stats`
_CARD = RESULTS / "h100-80gb-hbm3"


@dataclass(frozen=True)
class Model:
    """A decoder with gated MLPs, by its configuration."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # as in the record of `token_stats`

    def flops(self) -> float:
        """Of a token in all layers, without the LM head."""
        queries, keys = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        weights = self.hidden * (2 * queries + keys + 3 * self.mlp)
        return self.layers * (2 * weights + 4 * queries * LENGTH / 2)


MODELS = (
    Model("Qwen2.5-0.5B", 24, 896, 4864, 14, 2, 64, 151_936),
    Model("Llama-3.1-8B", 32, 4096, 14_336, 32, 8, 128, 128_256),
    Model("Qwen3-8B", 36, 4096, 12_288, 32, 8, 128, 151_936),
    Model("Gemma-3-12B", 48, 3840, 15_360, 16, 8, 256, 262_208),
)


def _benchmarks(name: str) -> list[dict]:
    return json.loads((_CARD / f"{name}.json").read_text())["benchmarks"]


def matrix_rate() -> float:
    """Measured FLOPs a second of a large bf16 product."""
    (found,) = (b for b in _benchmarks("limits") if b["name"] == "product, 8192³, bfloat16")
    return found["extra_info"]["TFLOP/s"] * 1e12


def stats_seconds(model: Model) -> float:
    """Measured, of a token."""
    group = f"token_stats, N={ROWS}, H={model.hidden}, V={model.vocabulary}, bfloat16"
    ours = (b for b in _benchmarks("token_stats") if b["name"] == "token_stats")
    (found,) = (b for b in ours if b["group"] == group)
    return found["stats"]["median"] / ROWS


def tokens_a_second(model: Model, reached: float) -> float:
    """Of a scan whose layers reach so much of the matrix rate."""
    return 1 / (model.flops() / (reached * matrix_rate()) + stats_seconds(model))


def rows() -> list[dict[str, str]]:
    """The table of docs/scale.md."""
    found = []
    for model in MODELS:
        limit, assumed = (tokens_a_second(model, r) * 3600 for r in (1.0, REACHED))
        found.append(
            {
                "model": model.name,
                "10⁶ tokens an hour, one GPU": f"{assumed / 1e6:,.0f} (≤ {limit / 1e6:,.0f})",
                "10⁹ an hour, 64 GPUs": f"{64 * assumed / 1e9:,.1f} (≤ {64 * limit / 1e9:,.1f})",
                "GPU hours for 10¹² tokens": f"{1e12 / assumed:,.0f} (≥ {1e12 / limit:,.0f})",
                "of it in `token_stats`": f"{stats_seconds(model) * assumed / 3600:.0%}",
                "bytes a selected token": f"{token_bytes(model.hidden):,}",
            }
        )
    return found


def main() -> None:
    print(markdown(rows()))


if __name__ == "__main__":
    main()
