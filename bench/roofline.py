"""Predicted times of the samplers and of the statistics on an H200, for the first run there to
refute.

    python -m bench.roofline [--model FOLDER]

    time = max(bytes / bandwidth, warp instructions / issue rate) + what kernels behind it wait

Bandwidth, clock and waits are assumptions (`CARD`), the rest is counted: bytes from the shapes,
instructions in the sm_90 code of the loops, and on logits how often the rare one is gone round.
Needs no GPU.

The kernel behind `sample`'s first, and the head's, is there when that ends
(`kernels/dependent_launch.py`) and waits for its last stores: as long as a way to the memory takes.
`launched_us` is the time if it were launched then.

`sample`: the maxima, then the draw,

    draw = max(issue, chain)       chain = a program's instructions one after the other, two clocks
                                   each, and its reads of the cache

`token_stats`, streaming: a multiprocessor works on one tile at a time (registers allow no second),
in waves;

    tile = max(matrix, cache) + epilogue
    cache = (rows + block)·H elements over the second level's bandwidth for one multiprocessor

or max(matrix + epilogue, cache), where its loops are flattened and copies go on during the sums.

Chunked: the vendor's product, and a write and a read of every logit.

`linear_sample`: `bench/linear_sample_tiles.py`.
"""

import argparse
import math
from pathlib import Path

import torch

from autodeco_fast.kernels import (
    logit_stats,
    sample,
    subtile_maxima,
    temperature_head,
    token_stats,
)
from autodeco_fast.kernels.logit_tiles import TILE
from autodeco_fast.sampling import SUBTILE
from bench.linear_sample_tiles import chosen, seconds
from bench.machine import CARD, RESULTS, ROOT
from bench.records import add_model_option, markdown, model_of, write
from bench.resources import find_entry
from bench.sass import fast_path, instruction_count, loop_lengths, sass

WARPS = 4
TEMPERATURE, MIN_P = 0.7, 0.1
# Ways to the cache, one after the other, in a program that draws: for maxima, for the count of its
# row twice (what it wrote must be seen first), for candidates.
_READS = 4


def sample_instructions() -> dict[str, int]:
    """SASS instructions a warp issues: for a tile of bf16 logits in the pass for the maxima; for a
    sub-tile that draws noise; for the rest of that program, the last of its row, no NaN seen."""
    pointers = "z_ptr", "max_ptr", "V", "stride"
    text = sass(find_entry(sample._draw, dependent=True), pointers)
    rare, noise = sorted(loop_lengths(text))
    return {
        "tile": fast_path(sass(find_entry(subtile_maxima._maxima, dependent=True), pointers)),
        "noise": noise,
        "program": instruction_count(text) - noise - rare,
    }


def head_instructions() -> dict[str, int]:
    """SASS instructions a warp issues in the head's kernels for few rows: for a row, for the rest
    of that program, for the kernel behind it."""
    names = "h_ptr", "w1_ptr", "layer_ptr", "H", "F", "stride_h"
    text = sass(find_entry(temperature_head._slab, dependent=True), names)
    row = max(loop_lengths(text))
    join = find_entry(temperature_head._join, dependent=True)
    behind = sass(join, ("layer_ptr", "b1_ptr", "w2_ptr", "t_ptr", "F"))
    return {
        "row": row,
        "program": instruction_count(text) - row,
        "behind": instruction_count(behind),
    }


def epilogue_instructions(entry: tuple, *pointers: str) -> int:
    """What a warp issues for a tile of a product, its loop along H left out: the longest loop less
    the next."""
    loops = sorted(
        loop_lengths(
            sass(
                entry,
                (
                    "x_ptr",
                    "w_ptr",
                    "float_ptr",
                    "int_ptr",
                    "V",
                    "H",
                    "x_stride",
                    "w_stride",
                    *pointers,
                ),
            )
        )
    )
    return loops[-1] - loops[-2]


def reached_share(z: torch.Tensor) -> float:
    """Sub-tiles of logits `[B, V]` that hold a token of the kept set, of all."""
    z = torch.nn.functional.pad(z.float(), (0, -z.shape[1] % SUBTILE), value=-float("inf"))
    top = z.unflatten(1, (-1, SUBTILE)).amax(-1)
    return (top >= top.amax(1, keepdim=True) + TEMPERATURE * math.log(MIN_P)).double().mean().item()


def model_logits(name: str) -> torch.Tensor:
    """A model's logits at every position of some text."""
    from autodeco_fast.training import base_model

    tokenizer = base_model.load_tokenizer(name)
    model = base_model.load_causal_lm(name, dtype=torch.float32)
    text = (ROOT / "docs/concepts.md").read_text()
    with torch.inference_mode():
        return model(torch.tensor([tokenizer(text).input_ids[:1024]])).logits[0]


def shares(model: str | None) -> dict[str, float]:
    """Which share of sub-tiles draws noise, for several kinds of logits."""
    generator, V = torch.Generator().manual_seed(0), 151_936
    normal = torch.randn(16, V, generator=generator)
    rank = torch.rand(16, V, generator=generator).argsort(1) + 1
    found = {f"normal, deviation {d}": reached_share(d * normal) for d in (3, 2, 1)}
    found["Zipf, exponent 1, shuffled"] = reached_share(-rank.log())
    if model is not None:
        found[f"{Path(model).name}, on docs/concepts.md"] = reached_share(model_logits(model))
    return found


def predict_sample(B: int, V: int, instructions: dict[str, int], share: float) -> dict:
    """Two kernels; `share` of the sub-tiles draw noise."""
    n = -(-V // SUBTILE)
    read, written = 2 * B * V, 4 * B * n
    memory = (read + written) / CARD["bytes_per_second"]
    rate = CARD["multiprocessors"] * CARD["warp_instructions_per_clock"] * CARD["clock"]
    maxima = B * -(-V // TILE) * WARPS * instructions["tile"] / rate
    D = sample.programs_of(B, n)
    noise, program = instructions["noise"], instructions["program"]
    drawing = B * sample.WARPS * (D * program + share * n * noise) / rate
    most = math.ceil(share * n / D)  # sub-tiles of one program: they are dealt out
    chain = 2 * (program + most * noise) / CARD["clock"]
    chain += (_READS + most) * CARD["cache_latency_seconds"]
    busy = max(memory, maxima) + max(drawing, chain)
    total = busy + CARD["memory_latency_seconds"]
    return {
        "op": "sample",
        "B": B,
        "V": V,
        "H": None,
        "MB": (read + written) / 1e6,
        "memory_us": 1e6 * memory,
        "issue_us": 1e6 * maxima,
        "draw_us": 1e6 * max(drawing, chain),
        "predicted_us": 1e6 * total,
        "launched_us": 1e6 * (busy + CARD["second_launch_seconds"]),
        "share_of_one_read": read / CARD["bytes_per_second"] / total,
    }


def predict_linear_sample(
    B: int, H: int, V: int, seconds: float, how: tuple[dict[str, int], float]
) -> dict:
    """Against a product that writes bf16 logits, and `predict_sample` of them with `how`."""
    weight = 2 * H * V
    matrix = 2.0 * B * H * V / CARD["tflops"]
    apart = (
        max((weight + 2 * B * V) / CARD["bytes_per_second"], matrix)
        + predict_sample(B, V, *how)["predicted_us"] / 1e6
    )
    return {
        "op": "linear_sample",
        "B": B,
        "V": V,
        "H": H,
        "MB": weight / 1e6,
        "memory_us": 1e6 * weight / CARD["bytes_per_second"],
        "predicted_us": 1e6 * seconds,
        "product_and_sample_us": 1e6 * apart,
    }


def predict_logit_stats(N: int, V: int, instructions: int) -> dict:
    """One read of bf16 logits, and the sums of its tiles."""
    memory = 2 * N * V / CARD["bytes_per_second"]
    rate = CARD["multiprocessors"] * CARD["warp_instructions_per_clock"] * CARD["clock"]
    issue = N * -(-V // logit_stats.BLOCK) * logit_stats.WARPS * instructions / rate
    return {
        "op": "logit_stats",
        "B": N,
        "V": V,
        "H": None,
        "MB": 2 * N * V / 1e6,
        "memory_us": 1e6 * memory,
        "issue_us": 1e6 * issue,
        "predicted_us": 1e6 * max(memory, issue),
        "share_of_one_read": memory / max(memory, issue),
    }


def predict_head(N: int, H: int, instructions: dict[str, int], F: int = 256) -> dict:
    """Few bf16 rows, weights in fp32: two kernels. A chain is a program's instructions one after
    the other, two clocks each, behind its reads: W1 and rows from memory, twice as far as the
    cache, then sums from the cache."""
    slab = temperature_head.SLAB
    rows = min(N, slab["rows"])
    programs = -(-F // slab["units"]) * -(-H // slab["chunk"]) * -(-N // slab["rows"])
    n_bytes = 4 * F * H + 2 * N * H
    rate = CARD["multiprocessors"] * CARD["warp_instructions_per_clock"] * CARD["clock"]
    own = instructions["program"] + rows * instructions["row"]
    issue = programs * WARPS * own / rate
    chain = 2 * own / CARD["clock"] + 3 * CARD["cache_latency_seconds"]
    memory = n_bytes / CARD["bytes_per_second"]
    groups = -(-H // slab["chunk"] // temperature_head.SPLITS)
    behind = 2 * instructions["behind"] / CARD["clock"]
    behind += (groups + 1) * CARD["cache_latency_seconds"]
    # The last bytes are only then multiplied.
    busy = max(memory + chain, issue) + behind
    return {
        "op": "temperature_head",
        "B": N,
        "V": None,
        "H": H,
        "MB": n_bytes / 1e6,
        "memory_us": 1e6 * memory,
        "issue_us": 1e6 * max(issue, chain),
        "predicted_us": 1e6 * (busy + CARD["memory_latency_seconds"]),
        "launched_us": 1e6 * (busy + CARD["second_launch_seconds"]),
    }


def streaming_seconds(
    variant: token_stats.Variant, N: int, H: int, V: int, instructions: int
) -> float:
    """Waves of splits, tile by tile."""
    rows, block = variant.tile(scaled=False)
    units = CARD["multiprocessors"]
    matrix = 2.0 * rows * block * H / (CARD["tflops"] / units)
    cache = 2 * (rows + block) * H / (CARD["cache_bytes_per_second"] / units)
    size = rows * block / (token_stats.POINTERS.rows * token_stats.POINTERS.block)
    epilogue = (
        size
        * token_stats.WARPS
        * instructions
        / (CARD["warp_instructions_per_clock"] * CARD["clock"])
    )
    tiles, blocks = -(-V // block), -(-N // rows)
    depth = -(-tiles // min(tiles, -(-token_stats.PROGRAMS // blocks)))
    waves = -(-blocks * -(-tiles // depth) // units)
    return (
        waves
        * depth
        * (max(matrix + epilogue, cache) if variant.flatten else max(matrix, cache) + epilogue)
    )


def predict_statistics(N: int, H: int, V: int, instructions: int) -> dict:
    """Both designs of `token_stats`, bf16; streaming by pointers, and in the variant for this
    card."""
    product = 2.0 * N * H * V / CARD["tflops"]
    chunked = product + 4 * N * V / CARD["bytes_per_second"]
    return {
        "op": "token_stats",
        "B": N,
        "V": V,
        "H": H,
        "MB": 4 * N * V / 1e6,
        "issue_us": 1e6 * product,
        "predicted_us": 1e6 * chunked,
        "streaming_us": 1e6 * streaming_seconds(token_stats.POINTERS, N, H, V, instructions),
        "hopper_us": 1e6 * streaming_seconds(token_stats.HOPPER, N, H, V, instructions),
        "over_product": chunked / product,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_model_option(parser)
    counted = shares(model_of(parser.parse_args(arguments)))
    how = sample_instructions(), counted["normal, deviation 3"]
    predictions = [
        predict_sample(B, V, *how) for V in (151_936, 262_208) for B in (1, 8, 64, 128, 512)
    ]
    products = {B: chosen(B) for B in (1, 8, 64)}
    predictions += [
        predict_linear_sample(B, H, V, seconds(tile, (B, H, V)), how)
        for (B, tile), H, V in ((one, 4096, 151_936) for one in products.items())
    ]
    statistics = [
        fast_path(sass(entry, ("x_ptr", "column_ptr", "float_ptr", "int_ptr", "V", "stride")))
        for entry in (
            find_entry(logit_stats._logit_stats, cut=False, inverse_ptr=inverse)
            for inverse in (None, "*fp32")
        )
    ]
    predictions += [predict_logit_stats(2048, V, statistics[0]) for V in (128_256, 151_936)]
    head = head_instructions()
    predictions += [predict_head(N, H, head) for H in (896, 4096) for N in (1, 8, 64)]
    by_pointers = find_entry(token_stats._tiles, x_ptr="*bf16", inverse_ptr=None)
    epilogue = epilogue_instructions(by_pointers, "column_ptr", "threshold_ptr")
    shapes = (
        (8192, 256, 128_256),
        (8192, 896, 151_936),
        (8192, 4096, 128_256),
        (32_768, 3840, 262_208),
    )
    predictions += [predict_statistics(*shape, epilogue) for shape in shapes]
    print(markdown(predictions))
    facts = {
        "card": CARD,
        "sample_instructions": how[0],
        "logits_per_tile_and_warp": TILE // WARPS,
        "temperature": TEMPERATURE,
        "min_p": MIN_P,
        "share_of_subtiles_with_noise": counted,
    }
    facts["linear_sample_tiles"] = {B: tile._asdict() for B, tile in products.items()}
    facts["logit_stats_instructions_per_tile_and_warp"] = statistics
    facts["temperature_head_instructions"] = head
    facts["token_stats_epilogue_instructions_per_tile_and_warp"] = epilogue
    print(f"sample, instructions a warp: {how[0]}")
    print(markdown([{"logits": name, "share of sub-tiles": x} for name, x in counted.items()]))
    write(RESULTS / "predictions.json", "predictions", predictions, **facts)


if __name__ == "__main__":
    main()
