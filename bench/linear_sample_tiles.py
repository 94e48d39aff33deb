"""Tiles for `linear_sample`'s product: compiled for sm_90, counted, and put into a model of the card
in `bench.roofline`. Needs no GPU.

    python -m bench.linear_sample_tiles

    time = waves · tiles of a split · one tile of each of c programs, which share a multiprocessor
           as registers, shared memory and the grid allow
    one  = max(memory, cache, matrix, issue, chain)
    memory  c·block·H elements over device memory's bandwidth for one multiprocessor
    cache   c·(rows + block)·H elements over the second level's
    issue   the instructions of c tiles over its rate
    chain   a program's own pace: a first read, then ⌈H / step⌉ steps of a read each, stages − 1 of
            them at a time, then the epilogue, two clocks an instruction

Noise is drawn in every sub-tile, and no split is multiplied again.
"""

import argparse
from typing import NamedTuple

from autodeco_fast.kernels import linear_sample
from bench.records import markdown
from bench.resources import compile_one
from bench.roofline import CARD, loop_lengths, sass

H, V = 4096, 151_936
_ALIGNED = ("x_ptr", "w_ptr", "float_ptr", "int_ptr", "V", "H", "x_stride", "w_stride")


class Tile(NamedTuple):
    """Of `kernels/linear_sample.py`'s `_tiles`, and what was counted."""

    rows: int
    block: int
    step: int
    warps: int
    stages: int
    registers: int
    shared_bytes: int
    resident: int  # programs that a multiprocessor holds
    step_instructions: int  # a warp, for a step along H
    epilogue_instructions: int  # a warp, for the rest of a tile


def compiled(entry: tuple) -> Tile:
    """What the compiler makes of an entry of the kernel's `AOT`."""
    facts, loops = compile_one(entry, "sm_90"), sorted(loop_lengths(sass(entry, _ALIGNED)))
    constants, warps, stages = entry[2:5]
    return Tile(
        *(constants[name] for name in ("rows", "block", "step")),
        warps,
        stages,
        facts["registers"],
        facts["shared_bytes"],
        facts["resident_warps"] // warps,
        loops[-2],
        loops[-1] - loops[-2],
    )


def chosen(B: int) -> Tile:
    """That of a call with B rows."""
    return compiled(linear_sample.tiles_entry(B))


def bounds(tile: Tile, H: int, c: int) -> dict[str, float]:
    """Seconds that c programs of a multiprocessor take for a tile each, by what may be short."""
    units, clock, steps = CARD["multiprocessors"], CARD["clock"], -(-H // tile.step)
    issued = tile.warps * (steps * tile.step_instructions + tile.epilogue_instructions)
    pace = CARD["memory_latency_seconds"] * (1 + steps / (tile.stages - 1))
    return {
        "memory": 2 * c * tile.block * H / (CARD["bytes_per_second"] / units),
        "cache": 2 * c * (tile.rows + tile.block) * H / (CARD["cache_bytes_per_second"] / units),
        "matrix": 2 * c * tile.rows * tile.block * H / (CARD["tflops"] / units),
        "issue": c * issued / (CARD["warp_instructions_per_clock"] * clock),
        "chain": pace + 2 * tile.epilogue_instructions / clock,
    }


def seconds(tile: Tile, shape: tuple[int, int, int]) -> float:
    """Of a call with B rows, width H and vocabulary V."""
    (B, H, V), units = shape, CARD["multiprocessors"]
    splits, depth = linear_sample.splits_of(B, V, tile.rows, tile.block)
    launched = -(-B // tile.rows) * splits
    c = min(tile.resident, -(-launched // units))
    # A wave that is not full leaves its bandwidth to the programs that are there.
    waves = max(1.0, launched / (c * units))
    return waves * depth * max(bounds(tile, H, c).values()) + CARD["second_launch_seconds"]
