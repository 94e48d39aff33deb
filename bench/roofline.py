"""Predicted times of the samplers and of the statistics on an H200, for the first run there to
refute.

    python -m bench.roofline

    time = max(bytes / bandwidth, warp instructions / issue rate) + a second launch

Bandwidth, clock and launch are assumptions (`CARD`), the rest is counted: bytes from the shapes,
instructions in the sm_90 code of the loop that every logit goes through. Needs no GPU.

`token_stats`, streaming: a multiprocessor works on one tile at a time (registers allow no second),
in waves;

    tile = max(matrix, cache) + epilogue
    cache = (rows + block)·H elements over the second level's bandwidth for one multiprocessor

or max(matrix + epilogue, cache), where its loops are flattened and copies go on during the sums.

Chunked: the vendor's product, and a write and a read of every logit.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.compiler import ASTSource

from autodeco_fast.kernels import linear_sample, sample, token_stats
from autodeco_fast.kernels.logit_tiles import TILE, splits_of
from bench.machine import RESULTS
from bench.records import markdown, write
from bench.resources import TARGETS

CARD = {
    "name": "H200, assumed",
    "bytes_per_second": 0.9 * 4.8e12,  # of the vendor's figure
    "multiprocessors": 132,
    "clock": 1.75e9,
    "warp_instructions_per_clock": 4,
    "second_launch_seconds": 2.5e-6,
    "cache_bytes_per_second": 5.5e12,  # second level, all multiprocessors together
    "tflops": 0.8 * 989e12,  # bf16, of the vendor's figure
}
WARPS = 4


def sass(entry: tuple, divisible: tuple[str, ...], **fixed) -> str:
    """The sm_90 code of a kernel."""
    function, signature, constants, warps, stages = entry
    names = [*function.arg_names]
    signature = {name: signature.get(name, "constexpr") for name in names}
    constants = {(names.index(k),): v for k, v in {**constants, **fixed}.items()}
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    compiled = triton.compile(
        source, target=TARGETS["sm_90"], options={"num_warps": warps, "num_stages": stages}
    )
    tool = next(Path(triton.__file__).parent.rglob("nvdisasm*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run(
            [str(tool), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def loop_instructions() -> int:
    """SASS instructions a warp issues for a tile of bf16 logits where no noise is drawn: the loop
    of the scan."""
    return fast_path(
        sass(sample.AOT[0], ("z_ptr", "float_ptr", "int_ptr", "V", "stride"), with_noise=False)
    )


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


def loop_lengths(text: str) -> list[int]:
    """Instructions between the target of every backward branch and the branch."""
    labels, jumps = positions(text)
    return [end - labels[target] for end, (target, _) in jumps.items() if labels[target] < end]


def positions(sass: str) -> tuple[dict[str, int], dict[int, tuple[str, bool]]]:
    """Labels, and branches as (target, conditional), by the number of the instruction."""
    labels, jumps, at = {}, {}, 0
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = at
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            target = re.search(r"(@!?U?P\d+ )?BRA.*`\((\.L_x_\d+)\)", line)
            if target:
                jumps[at] = target[2], target[1] is not None
            at += 1
    return labels, jumps


def fast_path(sass: str) -> int:
    """Instructions of the longest loop on its shortest way round: full tiles, nothing rare.

    Every forward branch in the loop skips what few tiles need: the masked load of the last one, the
    search for NaN.
    """
    labels, jumps = positions(sass)
    loops = [(labels[target], end) for end, (target, _) in jumps.items() if labels[target] < end]
    start, end = max(loops, key=lambda loop: loop[1] - loop[0])
    steps = {start: 1}
    for here in range(start, end):  # all other branches go forward
        if here not in steps:
            continue
        target, conditional = jumps.get(here, (None, True))
        after = [here + 1] if conditional else []
        after += [labels[target]] if target is not None and labels[target] > here else []
        for there in after:
            steps[there] = min(steps.get(there, 1 << 30), steps[here] + 1)
    return steps[end]


def predict_sample(B: int, V: int, instructions: int) -> dict:
    S, _ = splits_of(B, V, TILE)
    read = 2 * B * V
    partials = B * S * (4 * 4 + 2 * 4)
    memory = (read + 2 * partials) / CARD["bytes_per_second"]
    warps = B * -(-V // TILE) * WARPS * instructions
    issue = warps / (CARD["multiprocessors"] * CARD["warp_instructions_per_clock"] * CARD["clock"])
    total = max(memory, issue) + CARD["second_launch_seconds"]
    return {
        "op": "sample",
        "B": B,
        "V": V,
        "H": None,
        "MB": (read + 2 * partials) / 1e6,
        "memory_us": 1e6 * memory,
        "issue_us": 1e6 * issue,
        "predicted_us": 1e6 * total,
        "share_of_one_read": read / CARD["bytes_per_second"] / total,
    }


def predict_linear_sample(B: int, H: int, V: int, instructions: int) -> dict:
    """The weight once for every 64 rows, from device memory the first time; against a product that
    writes bf16 logits."""
    weight = 2 * H * V
    memory = weight / CARD["bytes_per_second"]
    rows, warps = linear_sample.tile_shape(B)
    tiles = -(-B // rows) * -(-V // linear_sample.BLOCK)
    epilogue = (
        tiles
        * warps
        * instructions
        / (CARD["multiprocessors"] * CARD["warp_instructions_per_clock"] * CARD["clock"])
    )
    matrix = 2.0 * B * H * V / CARD["tflops"]
    total = max(memory, matrix + epilogue) + CARD["second_launch_seconds"]
    apart = (
        max((weight + 2 * B * V) / CARD["bytes_per_second"], matrix)
        + predict_sample(B, V, 0)["predicted_us"] / 1e6
    )
    return {
        "op": "linear_sample",
        "B": B,
        "V": V,
        "H": H,
        "MB": weight / 1e6,
        "memory_us": 1e6 * memory,
        "issue_us": 1e6 * (matrix + epilogue),
        "predicted_us": 1e6 * total,
        "product_and_sample_us": 1e6 * apart,
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


def main() -> None:
    instructions = loop_instructions()
    predictions = [
        predict_sample(B, V, instructions) for V in (151_936, 262_208) for B in (1, 8, 64, 128, 512)
    ]
    # Of tiles of few rows, and of 64.
    epilogues = [epilogue_instructions(entry) for entry in linear_sample.AOT[:2]]
    predictions += [predict_linear_sample(B, 4096, 151_936, epilogues[B > 32]) for B in (1, 8, 64)]
    epilogue = epilogue_instructions(token_stats.AOT[0], "column_ptr", "threshold_ptr")
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
        "instructions_per_tile_and_warp": instructions,
        "logits_per_tile_and_warp": TILE // WARPS,
    }
    facts["linear_sample_epilogue_instructions_per_tile_and_warp"] = epilogues
    facts["token_stats_epilogue_instructions_per_tile_and_warp"] = epilogue
    print(f"{instructions} instructions a warp for {TILE // WARPS} logits")
    write(RESULTS / "predictions.json", "predictions", predictions, **facts)


if __name__ == "__main__":
    main()
