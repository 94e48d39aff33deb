"""Instructions of compiled kernels: their sm_90 code, and what of it a loop goes through."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

from bench.resources import compiled

_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/")


def sass(entry: tuple, divisible: tuple[str, ...]) -> str:
    """The sm_90 code of a kernel, with these arguments as multiples of 16."""
    kernel = compiled(entry, "sm_90", divisible)
    tool = next(Path(triton.__file__).parent.rglob("nvdisasm*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [str(tool), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def instruction_count(text: str) -> int:
    """Of a whole kernel."""
    return sum(bool(_INSTRUCTION.match(line)) for line in text.splitlines())


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
        elif _INSTRUCTION.match(line):
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
