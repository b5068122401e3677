"""What the Triton kernels take of an H100, read from machine code; needs no GPU.

Compiles every launch of a compaction of an 8B-shaped model (head size 128, 8 KV heads, 4 query
heads each, blocks of 16 tokens, bf16) for sm_90 and prints registers, spilled bytes, shared memory,
instructions per warp in all and in each innermost loop, and how many programs fit on one
multiprocessor.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton
from kernel_tables import print_table

# The checkout's root.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.kernels import compile_for_gpu

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of an H100's multiprocessor.
REGISTERS, SHARED_BYTES, MOST_WARPS, MOST_PROGRAMS = 65536, 233472, 64, 32
# Every program takes this much shared memory more than it asks for.
RESERVED_BYTES = 1024


@dataclass
class Resources:
    """One kernel.

    Attributes:
        kernel: its name and variant.
        warps: of a program.
        registers: of a thread.
        spilled_bytes: of a thread, in local memory.
        shared_bytes: of a program.
        programs: that fit on one multiprocessor.
        instructions: of a warp, every loop counted once.
        loops: instructions of each innermost loop, in the order of the code.
        opcodes: how often the most frequent opcodes occur.
    """

    kernel: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs: int
    instructions: int
    loops: list[int] = field(default_factory=list)
    opcodes: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Print the table and, on the last line, the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    dtypes = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"]
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes)
    parser.add_argument("--sass", type=Path, help="folder for the machine code")
    args = parser.parse_args()
    found = list(measured(args.only, getattr(torch, args.dtype), args.sass))
    rows = [["kernel", "warps", "regs", "spill B", "smem B", "programs/SM", "instr", "loops"]]
    for r in found:
        loops = " ".join(map(str, r.loops)) or "-"
        numbers = (r.warps, r.registers, r.spilled_bytes, r.shared_bytes, r.programs)
        rows.append([r.kernel, *map(str, numbers), str(r.instructions), loops])
    print(f"triton {triton.__version__}, sm_90, {args.dtype}")
    print_table(rows)
    print(json.dumps([asdict(r) for r in found]))


def measured(only: str, dtype: torch.dtype, sass: Path | None) -> Iterator[Resources]:
    """Compile what a compaction launches, each kernel once."""
    for name, compiled in compile_for_gpu.compiled_launches(dtype, only):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            usage = _output("cuobjdump", "--dump-resource-usage", str(cubin))
            code = _output("nvdisasm", "-c", str(cubin))
        if sass is not None:
            sass.mkdir(parents=True, exist_ok=True)
            (sass / f"{name}.sass").write_text(code)
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        instructions, loops, opcodes = _counted(code)
        yield Resources(
            kernel=name,
            warps=warps,
            registers=registers,
            spilled_bytes=stack,
            shared_bytes=shared,
            programs=_programs(warps, registers, shared),
            instructions=instructions,
            loops=loops,
            opcodes=opcodes,
        )


def _output(tool: str, *args: str) -> str:
    command = [str(TOOLS / tool), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _programs(warps: int, registers: int, shared: int) -> int:
    # Registers are handed out per warp in units of 256.
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        REGISTERS // (per_warp * warps),
        SHARED_BYTES // (shared + RESERVED_BYTES),
        MOST_WARPS // warps,
        MOST_PROGRAMS,
    )


def _counted(code: str) -> tuple[int, list[int], dict[str, int]]:
    """Instructions, those of each innermost loop, and the most frequent opcodes."""
    places: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    counts: dict[str, int] = {}
    number = 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = number
        found = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", line)
        if found is None:
            continue
        opcode = found[1].split(".")[0]
        if opcode == "BRA" and (target := re.search(r"`\((\.L_x_\d+)\)", found[2])):
            branches.append((number, target[1]))
        number += 1
        counts[opcode] = counts.get(opcode, 0) + 1
    backward = [(places[t], at) for at, t in branches if t in places and places[t] < at]
    innermost = [
        (first, last)
        for first, last in sorted(set(backward))
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in backward)
    ]
    opcodes = dict(sorted(counts.items(), key=lambda item: -item[1])[:14])
    total = number - counts.get("NOP", 0)
    return total, [last - first + 1 for first, last in innermost], opcodes


if __name__ == "__main__":
    main()
