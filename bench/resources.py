"""Compiles every kernel ahead of time and tabulates what the compiler says. Needs no GPU.

    python -m bench.resources --output bench/results/resources.json

Each file of `kernels/` lists its kernels in `AOT`: (function, argument types, constexpr values,
warps, stages), and the targets, where it is a variant for some of them; None stages are the
compiler's own for the target, where launches name none.

A result has the hash of all that it was made from (`source`): the kernel and what it calls, its
arguments and options, the compiler, and this file. `--known RECORD` takes the results of those that
did not change since, and compiles the others.
"""

import argparse
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from bench.records import markdown, write

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # bytes of a multiprocessor
_COPIES = {"bulk": "cp.async.bulk.tensor", "asynchronous": "cp.async"}
_PRODUCTS = re.compile(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)[\w.]*")
_DIVISIBLE = re.compile(r"\*|^i32$")


def kernels() -> list[tuple]:
    """(file, entry) for every kernel of the project."""
    modules = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    entries = []
    for name in modules:
        entries += [
            (name, entry)
            for entry in getattr(
                importlib.import_module(f"autodeco_fast.kernels.{name}"), "AOT", ()
            )
        ]
    return entries


def find_entry(kernel: Callable, target: str = "sm_90", **wanted: object) -> tuple:
    """The one entry of a kernel's file that is compiled for a target with these constexpr values or
    argument types.

    Raises:
        LookupError: if there is none, or more than one.
    """
    entries = sys.modules[kernel.fn.__module__].AOT
    found = [
        entry
        for entry in entries
        if entry[0] is kernel
        and target in (entry[5:] or TARGETS)
        and all({**entry[1], **entry[2]}.get(name, ...) == value for name, value in wanted.items())
    ]
    if len(found) != 1:
        raise LookupError(f"{len(found)} entries of {kernel.__name__} for {target} with {wanted}")
    return found[0]


def _products(assembly: str) -> str:
    """The instructions of the matrix unit."""
    return ", ".join(sorted(set(_PRODUCTS.findall(assembly)))) or "-"


def _before_memory(ptx: str) -> str:
    """What a kernel says about those before and behind it, where it does so before its first look
    at memory."""
    memory = re.search(r"\b(?:ld|st|atom|red|cp)\.(?!param)", ptx)
    before = re.findall(r"griddepcontrol\.(\w+)", ptx[: memory.start()] if memory else "")
    return " and ".join(before) or "-"


def _nvidia(cubin: bytes, ptx: str) -> dict:
    """Registers, spilled bytes a thread and shared memory from cuobjdump; the instruction families
    from the PTX."""
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    matrix = next((word for word in ("tcgen05", "wgmma", "mma.sync") if word in ptx), "-")
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    widest = max((int(v or 1) * int(bits) for v, bits in loads), default=0)
    copies = next((name for name, word in _COPIES.items() if word in ptx), "-")
    return {
        "before_memory": _before_memory(ptx),
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "matrix": matrix,
        "products": _products(ptx),
        "widest_load_bits": widest,
        "copies": copies + (", own warps" if "setmaxnreg" in ptx else ""),
    }


def _amd(assembly: str) -> dict:
    """The same from the metadata of the assembly. Scalars that spill into lanes of vector registers
    touch no memory."""

    def find(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly).group(1))

    matrix = "mfma" if "v_mfma" in assembly else "-"
    loads = [int(w) for w in re.findall(r"(?:global|buffer)_load_dwordx(\d)", assembly)]
    return {
        "registers": find("vgpr_count"),
        "spills": find("private_segment_fixed_size"),
        "matrix": matrix,
        "products": _products(assembly),
        "widest_load_bits": 32 * max(loads, default=1),
        "copies": "-",
        "before_memory": "-",
    }


def resident_warps(target: str, registers: int, shared: int, warps: int) -> int:
    """Warps of a kernel that a multiprocessor holds at once, of 64.

    Limits: 65,536 registers, dealt out by 256 a warp; shared memory, and 1 KiB of it for every
        block; 32 blocks.
    """
    own = -(-32 * registers // 256) * 256 * warps
    return warps * min(65_536 // own, _SHARED[target] // (shared + 1024), 64 // warps, 32)


def _asked(entry: tuple, divisible: Collection[str] | None = None) -> tuple[ASTSource, dict]:
    """What the compiler is given of a kernel, and with which options; `compiled` says what
    `divisible` is."""
    function, signature, constants, warps, stages, *_ = entry
    names = [*function.arg_names]
    signature = {name: signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items()}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (
            name in divisible
            if divisible is not None
            else _DIVISIBLE.search(signature[name]) and not function.params[i].do_not_specialize
        )
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return source, {name: value for name, value in options.items() if value is not None}


def compiled(entry: tuple, target: str, divisible: Collection[str] | None = None) -> CompiledKernel:
    """One kernel as launches compile it: the arguments `divisible` are taken as multiples of 16; by
    default pointers, and sizes that the dispatcher looks at, as they are in most launches."""
    source, options = _asked(entry, divisible)
    return triton.compile(source, target=TARGETS[target], options=options)


def source_hash(entry: tuple, target: str) -> str:
    """Of all that `compile_one` depends on."""
    source, options = _asked(entry)
    this = Path(__file__).read_bytes()
    parts = (source.hash(), options, str(TARGETS[target]), triton.__version__)
    return hashlib.sha256(repr(parts).encode() + this).hexdigest()


def compile_one(entry: tuple, target: str) -> dict:
    """What the compiler says of one kernel."""
    kernel = compiled(entry, target)
    if target.startswith("sm_"):
        facts = _nvidia(kernel.asm["cubin"], kernel.asm["ptx"])
        shared = kernel.metadata.shared
        warps = kernel.metadata.num_warps
        return {
            **facts,
            "shared_bytes": shared,
            "resident_warps": resident_warps(target, facts["registers"], shared, warps),
        }
    return {**_amd(kernel.asm["amdgcn"]), "shared_bytes": kernel.metadata.shared}


def survey(known: dict[str, dict] | None = None) -> list[dict]:
    """What the compiler says of every kernel and target.

    Args:
        known: results by their source, which are taken as they are.
    """
    results = []
    keys = ("block", "rows", "units", "described", "flatten", "specialize", "dependent")
    options = {"list_ptr": "list", "bias_ptr": "bias", "softcap": "softcap"}
    options |= {"full_logprob_ptr": "logprob"}
    for file, entry in kernels():
        config = ", ".join(f"{key}={entry[2][key]}" for key in keys if entry[2].get(key))
        if entry[1].get("x_ptr") == "*fp32":
            config += ", fp32"
        config += "".join(f", {word}" for name, word in options.items() if name in entry[1])
        name = f"{file}.{entry[0].__name__.lstrip('_')}"
        for target in entry[5:] or TARGETS:
            facts = {"kernel": name, "config": config, "target": target, "warps": entry[3]}
            source = source_hash(entry, target)
            found = (known or {}).get(source) or {**compile_one(entry, target), "source": source}
            results.append({**facts, **found})
    return results


def known_results(record: Path) -> dict[str, dict]:
    """Results of a record by their source."""
    benchmarks = json.loads(record.read_text(encoding="utf-8"))["benchmarks"]
    return {one["extra_info"]["source"]: one["extra_info"] for one in benchmarks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, help="where to write the record (JSON); printed only, if left out"
    )
    parser.add_argument(
        "--known", type=Path, help="a record whose results hold where nothing has changed since"
    )
    args = parser.parse_args()
    results = survey(known_results(args.known) if args.known else None)
    print(markdown([{k: v for k, v in one.items() if k != "source"} for one in results]))
    if args.output:
        write(args.output, "resources", results)


if __name__ == "__main__":
    main()
