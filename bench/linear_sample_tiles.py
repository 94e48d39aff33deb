"""Tiles for `linear_sample`'s product: compiled for sm_90, counted, and put into a model of the
card in `bench.roofline`. Needs no GPU.

    python -m bench.linear_sample_tiles

    time = max(memory, cache, matrix, pace)
    memory  the weight once, over the bandwidth
    cache   (rows + block)·H elements for every tile, over the second level's
    matrix  the products over the matrix units' rate
    pace    waves · tiles of a split · max(c·issue, chain) for c programs on a multiprocessor, as
            registers, shared memory and the grid allow
    issue   the instructions of a tile over a multiprocessor's rate
    chain   a first read, then ⌈H / step⌉ steps of a read each, stages − 1 of them at a time, then
            the epilogue, two clocks an instruction

Noise is drawn in every tile, and none is multiplied again.
"""

from typing import NamedTuple

from autodeco_fast.kernels import linear_sample
from bench.machine import CARD
from bench.records import markdown
from bench.resources import compile_one
from bench.sass import loop_lengths, sass

H, V = 4096, 151_936
ALIGNED = ("x_ptr", "w_ptr", "float_ptr", "code_ptr", "V", "H", "x_stride", "w_stride")
# Rows, columns, step along H, warps, stages; programs in all.
OTHERS = (
    *((16, 64, 64, 4, 4, 264), (16, 128, 128, 4, 3, 264), (16, 128, 64, 4, 4, 528)),
    *((32, 64, 64, 4, 4, 264), (32, 128, 64, 4, 4, 264), (32, 128, 128, 8, 3, 264)),
    *((64, 64, 64, 4, 4, 264), (64, 64, 64, 8, 4, 264), (64, 64, 128, 4, 3, 264)),
    *((64, 128, 64, 8, 4, 264), (64, 128, 128, 8, 3, 264), (64, 128, 64, 8, 3, 132)),
)


class Tile(NamedTuple):
    """Of `kernels/linear_sample.py`'s `_tiles`, and what was counted."""

    rows: int
    block: int
    step: int
    warps: int
    stages: int
    registers: int
    spills: int  # bytes a thread
    shared_bytes: int
    resident: int  # programs that a multiprocessor holds
    step_instructions: int  # a warp, for a step along H
    epilogue_instructions: int  # a warp, for the rest of a tile


def compiled(entry: tuple, aligned: tuple[str, ...] = ALIGNED) -> Tile:
    """What the compiler makes of an entry of the kernel's `AOT`."""
    facts, loops = compile_one(entry, "sm_90"), sorted(loop_lengths(sass(entry, aligned)))
    constants, warps, stages = entry[2:5]
    return Tile(
        *(constants[name] for name in ("rows", "block", "step")),
        warps,
        stages,
        facts["registers"],
        facts["spills"],
        facts["shared_bytes"],
        facts["resident_warps"] // warps,
        loops[-2],
        loops[-1] - loops[-2],
    )


def entry(rows: int, block: int, step: int, warps: int, stages: int) -> tuple:
    """The first kernel in other tiles."""
    kernel, signature, constants, *_ = linear_sample.aot_entry(linear_sample._tiles, 1)
    return (
        kernel,
        signature,
        constants | {"rows": rows, "block": block, "step": step},
        warps,
        stages,
    )


def chosen(B: int) -> Tile:
    """That of a call with B rows."""
    rows, warps, stages = linear_sample.tile_shape(B)
    return compiled(entry(rows, linear_sample.BLOCK, linear_sample.DEPTH_H, warps, stages))


def bounds(tile: Tile, shape: tuple[int, int, int], programs: int) -> dict[str, float]:
    """Seconds of a call with B rows, width H and vocabulary V, by what may be short."""
    (B, H, V), units, clock = shape, CARD["multiprocessors"], CARD["clock"]
    grid, depth, c = launched(tile, B, V, programs)
    steps, made = -(-H // tile.step), grid * depth
    issued = tile.warps * (steps * tile.step_instructions + tile.epilogue_instructions)
    issue = issued / (CARD["warp_instructions_per_clock"] * clock)
    chain = CARD["memory_latency_seconds"] * (1 + steps / (tile.stages - 1))
    chain += 2 * tile.epilogue_instructions / clock
    return {
        "memory": 2 * H * V / CARD["bytes_per_second"],
        "cache": 2 * made * (tile.rows + tile.block) * H / CARD["cache_bytes_per_second"],
        "matrix": 2 * made * tile.rows * tile.block * H / CARD["tflops"],
        "pace": -(-grid // (c * units)) * depth * max(c * issue, chain),
    }


def launched(tile: Tile, B: int, V: int, programs: int) -> tuple[int, int, int]:
    """Programs, tiles of each, and how many share a multiprocessor."""
    blocks, tiles = -(-B // tile.rows), -(-V // tile.block)
    depth = -(-tiles // min(tiles, max(8, programs // blocks)))
    grid = blocks * -(-tiles // depth)
    return grid, depth, min(tile.resident, -(-grid // CARD["multiprocessors"]))


def seconds(
    tile: Tile, shape: tuple[int, int, int], programs: int = linear_sample.PROGRAMS
) -> float:
    """Both kernels."""
    return max(bounds(tile, shape, programs).values()) + CARD["second_launch_seconds"]


def row_of(tile: Tile, programs: int, mark: str = "") -> dict:
    """Of the table: a call with as many rows as the tile has."""
    shape = tile.rows, H, V
    limits, (grid, _, c) = bounds(tile, shape, programs), launched(tile, tile.rows, V, programs)
    return {
        **tile._asdict(),
        "programs": grid,
        "sharing": c,
        **{f"{name}_us": 1e6 * limit for name, limit in limits.items() if name != "matrix"},
        "us": 1e6 * seconds(tile, shape, programs),
        "": mark,
    }


def main() -> None:
    rows = [row_of(chosen(B), linear_sample.PROGRAMS, "chosen") for B in (16, 32, 64)]
    rows += [row_of(compiled(entry(*tile)), programs) for *tile, programs in OTHERS]
    rows.sort(key=lambda row: (row["rows"], row["us"]))
    print(f"bf16, H = {H}, V = {V}, {CARD['name']}")
    print(markdown(rows))


if __name__ == "__main__":
    main()
