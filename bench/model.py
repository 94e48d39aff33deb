"""Predicted times of the samplers on an H200, from bytes and compiled instructions, for the first run there to refute.

    python -m bench.model

    time = max(bytes / bandwidth, warp instructions / issue rate) + a second launch

Bandwidth, clock and launch are assumptions (`CARD`), the rest is counted: bytes from the shapes, instructions in the sm_90
code of the loop that every logit goes through. Needs no GPU.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.compiler import ASTSource

from autodeco_fast.kernels import min_p_sample
from autodeco_fast.kernels.rows import TILE, splits_of
from bench.harness import RESULTS, markdown, write_record
from bench.resources import TARGETS

CARD = {
    "name": "H200, assumed",
    "bytes_per_second": 0.9 * 4.8e12,  # of the vendor's figure
    "multiprocessors": 132,
    "clock": 1.75e9,
    "warp_instructions_per_clock": 4,
    "second_launch_seconds": 2.5e-6,
    "tflops": 0.8 * 989e12,  # bf16, of the vendor's figure
}
WARPS = 4


def loop_instructions() -> int:
    """SASS instructions a warp issues for a tile of bf16 logits where no noise is drawn: the loop of the scan."""
    function, signature, constants, warps, stages = min_p_sample.AOT[0]
    names = [*function.arg_names]
    signature = {name: signature.get(name, "constexpr") for name in names}
    constants = {(names.index(k),): v for k, v in {**constants, "draw": False}.items()}
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n in ("z_ptr", "float_ptr", "int_ptr", "V", "stride")}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=divisible)
    compiled = triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": warps, "num_stages": stages})
    tool = next(Path(triton.__file__).parent.rglob("nvdisasm*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    return fast_path(text)


def fast_path(sass: str) -> int:
    """Instructions of the longest loop on its shortest way round: full tiles, nothing rare.

    Every forward branch in the loop skips what few tiles need: the masked load of the last one, the search for NaN.
    """
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


def sample_row(B: int, V: int, instructions: int) -> dict:
    S, _ = splits_of(B, V, TILE)
    read = 2 * B * V
    partials = B * S * (4 * 4 + 2 * 4)
    memory = (read + 2 * partials) / CARD["bytes_per_second"]
    warps = B * -(-V // TILE) * WARPS * instructions
    issue = warps / (CARD["multiprocessors"] * CARD["warp_instructions_per_clock"] * CARD["clock"])
    total = max(memory, issue) + CARD["second_launch_seconds"]
    return {
        "op": "sample", "B": B, "V": V, "H": None, "MB": (read + 2 * partials) / 1e6, "memory_us": 1e6 * memory,
        "issue_us": 1e6 * issue, "predicted_us": 1e6 * total, "share_of_one_read": read / CARD["bytes_per_second"] / total,
    }  # fmt: skip


def linear_row(B: int, H: int, V: int) -> dict:
    """The weight once for every 64 rows, from device memory the first time; against a product that writes bf16 logits."""
    weight = 2 * H * V
    memory = weight / CARD["bytes_per_second"]
    matrix = 2.0 * B * H * V / CARD["tflops"]
    total = max(memory, matrix) + CARD["second_launch_seconds"]
    apart = max((weight + 2 * B * V) / CARD["bytes_per_second"], matrix) + sample_row(B, V, 0)["predicted_us"] / 1e6
    return {
        "op": "linear_sample", "B": B, "V": V, "H": H, "MB": weight / 1e6, "memory_us": 1e6 * memory, "issue_us": 1e6 * matrix,
        "predicted_us": 1e6 * total, "product_and_sample_us": 1e6 * apart,
    }  # fmt: skip


def main() -> None:
    instructions = loop_instructions()
    rows = [sample_row(B, V, instructions) for V in (151_936, 262_208) for B in (1, 8, 64, 128, 512)]
    rows += [linear_row(B, 4096, 151_936) for B in (1, 8, 64)]
    print(markdown(rows))
    facts = {"card": CARD, "instructions_per_tile_and_warp": instructions, "logits_per_tile_and_warp": TILE // WARPS}
    print(f"{instructions} instructions a warp for {TILE // WARPS} logits")
    write_record(RESULTS / "predictions.json", rows, **facts)


if __name__ == "__main__":
    main()
