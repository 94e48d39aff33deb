"""What `linear_sample` from an 8-bit copy of the LM head should take on the card in
`bench.roofline`, for the first run there to refute; and tiles for its screen. Needs no GPU.

    python -m bench.quantized_head_tiles

The kernels are compiled for sm_90, their instructions counted, and put into the model of
`bench/linear_sample_tiles.py`:

    time   = parts + screen + list + tiles + launches behind the first
    screen = max(memory, cache, matrix, pace)    memory: codes, scales, radii, lengths once
                                                 cache:  (2·rows + block)·H bytes a tile
                                                 matrix: two products of 8 bits, as fast as one of
                                                         16 bits: `mma.sync` is half of `wgmma`
    parts, list = reads of memory or cache one after the other, and instructions, two clocks each
    tiles  = max(rows of the weight over the bandwidth, waves · max(c·issue, chain)), and as long as
             programs without a token take to see that

How many tokens are left, and in how many tiles of 128, is counted (`bench/quantized_head.py`).
"""

import json

from autodeco_fast.kernels import linear_sample, quantized_head
from bench import linear_sample_tiles, records
from bench.linear_sample_tiles import H, Tile, V, launched
from bench.machine import CARD, RESULTS
from bench.records import markdown
from bench.resources import find_entry
from bench.sass import instruction_count, sass

_SCREEN = (
    *("part_ptr", "row_ptr", "code_ptr", "scale_ptr", "radius_ptr", "length_ptr", "V", "H"),
    *("high_ptr", "low_ptr", "bit_ptr"),
)
# Rows, columns, step along H, warps, stages.
OTHERS = (
    *((16, 128, 128, 4, 4), (16, 256, 128, 8, 3), (16, 128, 64, 4, 4)),
    *((32, 128, 128, 4, 3), (32, 128, 128, 8, 3), (32, 256, 128, 8, 3)),
)
ISSUE = CARD["multiprocessors"] * CARD["warp_instructions_per_clock"] * CARD["clock"]


def entry(rows: int, block: int, step: int, warps: int, stages: int) -> tuple:
    """The screen in other tiles."""
    kernel, signature, constants, *_ = quantized_head.screen_entry(1)
    shape = {"rows": rows, "block": block, "step": step}
    return kernel, signature, constants | shape, warps, stages


def chosen(B: int) -> Tile:
    """That of a call with B rows."""
    tile, *how = quantized_head.tile_shape(B)
    return linear_sample_tiles.compiled(entry(*tile.values(), *how), _SCREEN)


def screen_bounds(tile: Tile, B: int) -> dict[str, float]:
    """Seconds, by what may be short."""
    grid, depth, c = launched(tile, B, V, quantized_head.PROGRAMS)
    steps, made = -(-H // tile.step), -(-B // tile.rows) * -(-V // tile.block)
    issued = tile.warps * (steps * tile.step_instructions + tile.epilogue_instructions)
    chain = CARD["memory_latency_seconds"] * (1 + steps / (tile.stages - 1))
    chain += 2 * tile.epilogue_instructions / CARD["clock"]
    issue = CARD["multiprocessors"] * issued / ISSUE
    return {
        "memory": V * (H + 12) / CARD["bytes_per_second"],
        "cache": made * (2 * tile.rows + tile.block) * H / CARD["cache_bytes_per_second"],
        "matrix": 4 * made * tile.rows * tile.block * H / CARD["tflops"],
        "pace": -(-grid // (c * CARD["multiprocessors"])) * depth * max(c * issue, chain),
    }


def side_seconds() -> dict[str, float]:
    """Of `_parts` and `_list`."""
    parts = sass(
        find_entry(quantized_head._parts), ("x_ptr", "part_ptr", "row_ptr", "H", "x_stride")
    )
    names = "high_ptr", "low_ptr", "bit_ptr", "list_ptr", "V"
    listing = sass(find_entry(quantized_head._list), names)
    two = 2 / CARD["clock"]
    return {
        "parts": CARD["memory_latency_seconds"] + two * instruction_count(parts),
        "list": 3 * CARD["cache_latency_seconds"] + two * instruction_count(listing),
    }


def tile_seconds(tile: Tile, left: float, tiles: float) -> float:
    """Of `_tiles` on a share of the tokens, in a share of the tiles that all of them would take."""
    slots, steps = -(-V // quantized_head.CHUNK) * 8, -(-H // tile.step)
    made = tiles * V / tile.block
    chain = CARD["memory_latency_seconds"] * (1 + steps / (tile.stages - 1))
    chain += 2 * tile.epilogue_instructions / CARD["clock"]
    issued = tile.warps * (steps * tile.step_instructions + tile.epilogue_instructions)
    places = tile.resident * CARD["multiprocessors"]
    waves = -(-made // places)
    busy = max(made * issued / ISSUE, waves * chain)
    idle = 2 * CARD["cache_latency_seconds"] + tile.epilogue_instructions / CARD["clock"]
    memory = 2 * H * left * V / CARD["bytes_per_second"]
    return max(memory, busy) + max(slots - made, 0) / places * idle


def predict(B: int, name: str, left: float, tiles: float) -> dict:
    """A call with B rows, beside the plain one."""
    screen, side = screen_bounds(chosen(B), B), side_seconds()
    listed = linear_sample.aot_entry(linear_sample._tiles, B, listed=True)
    listed = linear_sample_tiles.compiled(listed, (*linear_sample_tiles.ALIGNED, "list_ptr"))
    exact = tile_seconds(listed, left, tiles)
    total = max(screen.values()) + sum(side.values()) + exact + 4 * CARD["second_launch_seconds"]
    plain = linear_sample_tiles.seconds(linear_sample_tiles.chosen(B), (B, H, V))
    return {
        "variant": f"B = {B}, {name}",
        **{"B": B, "H": H, "V": V, "left": left, "tiles": tiles},
        **{f"screen_{what}_us": 1e6 * limit for what, limit in screen.items()},
        **{f"{what}_us": 1e6 * s for what, s in side.items()},
        "exact_us": 1e6 * exact,
        "predicted_us": 1e6 * total,
        "plain_us": 1e6 * plain,
        "over_plain": plain / total,
    }


def counted() -> list[tuple[int, str, float, float]]:
    """Rows, whose hidden states, share of tokens left and of tiles, at T = 0.7 and Min-P 0.1."""
    record = json.loads((RESULTS / "cpu/quantized_head.json").read_text())
    found = []
    for one in record["benchmarks"]:
        name, facts = one["name"].split(",")[0], one["extra_info"]
        if one["name"].endswith("T = 0.7, Min-P 0.1"):
            found += [(B, name, facts[f"listed_{B}"], facts[f"tiles_{B}"]) for B in (1, 8, 32)]
    return found


def row_of(tile: Tile, mark: str = "") -> dict:
    limits = {f"{what}_us": 1e6 * s for what, s in screen_bounds(tile, tile.rows).items()}
    return {**tile._asdict(), **limits, "": mark}


def main(arguments: list[str] | None = None) -> None:
    parser = records.options(__doc__)
    parser.add_argument("--tiles", action="store_true", help="other tiles of the screen, too")
    args = parser.parse_args(arguments)
    if args.tiles:
        rows = [row_of(chosen(B), "chosen") for B in (16, 32)]
        rows += [row_of(linear_sample_tiles.compiled(entry(*o), _SCREEN)) for o in OTHERS]
        print(markdown(sorted(rows, key=lambda row: row["rows"])))
    predictions = [predict(*one) for one in counted()]
    path = args.output or RESULTS / "quantized_predictions.json"
    records.write(path, "quantized_predictions", predictions, card=CARD)
    print(markdown(predictions))


if __name__ == "__main__":
    main()
