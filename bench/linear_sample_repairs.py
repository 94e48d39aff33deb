"""How often `linear_sample` multiplies a tile again, on normal logits rounded to bf16.

    python -m bench.linear_sample_repairs

By the simulation of the kernels' rule that `tests/test_linear_sample_repairs.py` holds against
them, in the splits of calls with 1 and 128 rows, V = 151,936. Needs no GPU.
"""

import itertools
import math

import torch

from autodeco_fast.kernels import linear_sample
from bench import records
from tests.reference.staircase import repairs

DEVIATIONS, TEMPERATURES, MIN_PS = (1.0, 1.5, 2.0, 3.0), (0.5, 0.8, 1.2), (0.02, 0.1, 0.2)


def main(arguments: list[str] | None = None) -> None:
    parser = records.options(__doc__)
    args = parser.parse_args(arguments)
    rows, V = (2, 5000) if args.tiny else (32, 151_936)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, V, generator=generator)
    noise = -torch.empty(rows, V).exponential_(generator=generator).log()
    found = []
    for B, deviation in itertools.product((1, 128), DEVIATIONS):
        shape = {"block": linear_sample.BLOCK, "depth": linear_sample.splits_of(B, V)[1]}
        settings = list(itertools.product(TEMPERATURES, MIN_PS))
        multiplied = torch.zeros(len(settings), rows)
        for k, (T, min_p) in enumerate(settings):
            z, c = (deviation * normal).bfloat16().float(), T * math.log(min_p)
            multiplied[k] = repairs(z, noise, T, c, **shape)[0]
        found.append(
            {
                "variant": f"deviation {deviation:g}, splits of {B} rows",
                "rows": multiplied.numel(),
                "rows_with_a_repair": (multiplied > 0).float().mean().item(),
                "worst_setting": (multiplied > 0).float().mean(1).max().item(),
                "repairs_a_row": multiplied.mean().item(),
            }
        )
    records.record("linear_sample_repairs", found, output=args.output, V=V, settings=len(settings))


if __name__ == "__main__":
    main()
