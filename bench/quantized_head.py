"""How many tokens an 8-bit copy of the LM head cannot rule out, and what is read then.

    python -m bench.quantized_head [--model FOLDER]

On a model's hidden states (SmolLM2's, where it is installed) at every position of
`docs/concepts.md`, and on random ones of the width of a large model, whose logits have a deviation
of 3. `left` is the share of the vocabulary whose exact logit is needed, for the mean row and for
neighbouring rows together; `bytes` those of codes, scales, radii and rows of a 16-bit weight that
are read, over that weight's. `listed` is the share that the kernels of `kernels/quantized_head.py`
list, whose bounds and maxima are coarser, and `tiles` that of the tiles of 128 these fill. Needs no
GPU.
"""

import math
from pathlib import Path

import torch

from autodeco_fast import QuantizedLMHead, linear_sample
from autodeco_fast.kernels import linear_sample as linear_sample_kernel
from autodeco_fast.kernels import quantized_head
from bench import records
from bench.machine import ROOT
from tests.reference.screen import bounds, listed

SETTINGS = ((0.5, 0.1), (0.7, 0.1), (1.0, 0.1), (0.7, 0.02), (1.2, 0.02))  # T, Min-P
TOGETHER = (1, 8, 32, 64)  # rows that are drawn at once


def model_case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of some text and the weight they enter, fp32."""
    from autodeco_fast.training import base_model

    tokenizer = base_model.load_tokenizer(name)
    model = base_model.load_causal_lm(name, dtype=torch.float32)
    ids = tokenizer((ROOT / "docs/concepts.md").read_text()).input_ids[:512]
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    return hidden.clone(), model.get_output_embeddings().weight.detach()


def random_case(rows: int, H: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, H, generator=generator)
    return hidden, torch.randn(V, H, generator=generator) * (3.0 / H**0.5)


def kernel_shares(low: torch.Tensor, high: torch.Tensor, c: float) -> dict[str, float]:
    """What the kernels list of the vocabulary, and of its tiles."""
    shares = {}
    for n in TOGETHER[:3]:
        block = quantized_head.tile_shape(n)[0]["block"]
        left = [
            listed(*both, c, block, quantized_head.PROGRAMS)
            for both in zip(low.split(n), high.split(n))
        ]
        left = torch.stack(left)
        shares[f"listed_{n}"] = left.double().mean().item()
        chunks = torch.nn.functional.pad(left, (0, -left.shape[1] % quantized_head.CHUNK))
        chunks = chunks.unflatten(1, (-1, quantized_head.CHUNK)).sum(2)
        made = (chunks + linear_sample_kernel.BLOCK - 1) // linear_sample_kernel.BLOCK
        tiles = left.shape[1] / linear_sample_kernel.BLOCK
        shares[f"tiles_{n}"] = (made.sum(1).double().mean() / tiles).item()
    return shares


def counted(name: str, hidden: torch.Tensor, weight: torch.Tensor) -> list[dict]:
    """A result for every setting, over all hidden states."""
    head, V, H = QuantizedLMHead(weight), *weight.shape
    z, found = hidden @ weight.T, []
    reach, ends = hidden.norm(dim=1)[:, None] * head.radius, bounds(hidden, head)
    for T, min_p in SETTINGS:
        kept = z >= z.amax(1, keepdim=True) + T * math.log(min_p)
        left = head.possible(hidden, T, min_p)
        assert not (kept & ~left).any(), "the bound does not hold"
        how = {"min_p": min_p, "seed": 1}
        same = (
            linear_sample(hidden, head, T, **how).token
            == linear_sample(hidden, weight, T, **how).token
        )
        shares = {
            n: torch.stack([x.any(0).double().mean() for x in left.split(n)]).mean().item()
            for n in TOGETHER
        }
        found.append(
            {
                "variant": f"{name}, T = {T}, Min-P {min_p}",
                "rows": len(hidden),
                "H": H,
                "V": V,
                "bound": reach.mean().item(),
                "error": (z - hidden @ (head.scale[:, None] * head.codes).T).abs().mean().item(),
                "kept": kept.double().mean().item(),
                **{f"left_{n}": share for n, share in shares.items()},
                **kernel_shares(*ends, T * math.log(min_p)),
                **{f"bytes_{n}": (H + 8 + x * 2 * H) / (2 * H) for n, x in shares.items()},
                "same_tokens": same.double().mean().item(),
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = records.options(__doc__)
    records.add_model_option(parser)
    args = parser.parse_args(arguments)
    found = counted("random", *random_case(*((8, 64, 500) if args.tiny else (64, 4096, 8192))))
    model = None if args.tiny else records.model_of(args)
    if model is not None:
        found += counted(Path(model).name, *model_case(model))
    records.record("quantized_head", found, output=args.output)


if __name__ == "__main__":
    main()
