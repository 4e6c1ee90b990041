"""The Triton kernels as machine code, counted without a GPU: what limits each of them, and by how much.

    python benchmarks/kernel_code.py
    python benchmarks/kernel_code.py --kernels join_backward --connections dhc4 dfc4 --widths 768 --dtypes bfloat16
    python benchmarks/kernel_code.py --json kernels.json

Nothing here is measured. Every kernel is compiled for an H100 (sm_90) as a training step would launch it, disassembled,
and its instructions are counted: those of a tile of tokens, loops over columns as often as they run, over the tokens of
the tile. What a program does once, before and after its tiles, is left out.

- DRAM: bytes that have to move (each input once, each output once, coefficients aside), at the speed of a copy.
- Issue: cycles in which the busiest unit of an SM is taken (``unit_cycles``). Over the cycles of DRAM it has to be well
  below 1, at most about 0.65, for a kernel to keep up with a copy.
- Share of a copy: an estimate (``share_of_a_copy``) that was never compared with a GPU.
- Loads and stores: to and from memory, over the least. Projections, and a second pass over the streams, which comes
  from caches, are among the loads. A warp counts as a whole, though not all of its lanes may take part.
- Spills: bytes of the stack a thread.

Triton brings the compiler of machine code (ptxas) and the disassembler (cuobjdump, nvdisasm) along; neither a GPU nor
CUDA is needed. It keeps what it compiled (~/.triton/cache).
"""

import argparse
import collections
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported
import torch

from hcvision.connections import parse_connection
from hcvision.connections.kernels import triton as gpu
from hcvision.data import markdown

KERNELS = [f"{step}_{way}" for way in ("forward", "backward") for step in ("width", "depth", "join")]
CONNECTIONS = ["dhc2", "dhc4", "dfc4"]
WIDTHS = [384, 768, 1152]  # ViT-S, ViT-B, DiT-XL
DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
TOKENS = 128 * 197
ARCH = 90
ISSUE_BAR = 0.65  # on an H100, for DRAM to be what a kernel waits for
COPIES = {"h100": 3.0e12, "h200": 4.3e12}  # bytes a second
SMS, CLOCK, REGISTERS, SHARED_MEMORY = 132, 1.98e9, 65536, 227 * 1024
VECTORS = {  # read and written, of E numbers, for S streams and V views
    "width_forward": lambda S, V: (S, V),
    "depth_forward": lambda S, V: (S + V, S),
    "join_forward": lambda S, V: (S + V, S + V),
    "width_backward": lambda S, V: (2 * S + V, S),
    "depth_backward": lambda S, V: (S + V, V),
    "join_backward": lambda S, V: (2 * S + 2 * V, S + V),
}
UNITS = {
    "special": ("MUFU", "F2F"),
    "shuffle": ("SHFL",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "LDGSTS"),
    "tensor": ("HMMA",),
    "multiply": ("FFMA", "FMUL", "FADD", "IMAD"),
    "memory": ("LDG", "STG", "LDL", "STL", "LDGSTS"),
    "none": (
        *("BAR", "WARPSYNC", "BSYNC", "BSSY", "BRA", "EXIT", "CALL", "RET", "DEPBAR", "LDGDEPBAR", "LDC"),
        *("R2UR", "S2UR", "S2R", "UMOV", "ULDC", "UIADD3", "UISETP", "ULEA", "UIMAD", "USHF", "ULOP3"),
    ),
}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;", re.MULTILINE)
COMPARISON = re.compile(r"(?:PT|UPT|U?P\d), (?:PT|UPT|U?P\d), (U?R\d+), 0x([0-9a-f]+), ")


class Instruction(NamedTuple):
    address: int
    name: str  # FFMA
    suffix: str  # of LDG.E.128: E.128
    operands: str


class Case(NamedTuple):
    kernel: str
    connection: str
    width: int  # of the model
    dtype: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """S, V, E."""
        kind, rate = parse_connection(self.connection)
        return (rate, 1, self.width) if kind.endswith("hc") else (rate, rate, self.width // rate)


# Machine code


def parse(text: str) -> list[Instruction]:
    """The instructions of what cuobjdump prints, without those that do nothing."""
    found = []
    for address, _, name, operands in INSTRUCTION.findall(text):
        name, _, suffix = name.partition(".")
        if name != "NOP":
            found.append(Instruction(int(address, 16), name, suffix, operands))
    return found


def find_loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each loop: it ends in a jump back."""
    loops = []
    for one in code:
        target = re.search(r"0x([0-9a-f]+)", one.operands) if one.name == "BRA" else None
        if target and int(target[1], 16) < one.address:
            loops.append((int(target[1], 16), one.address))
    return sorted(loops)


def find_step(body: list[Instruction], default: int) -> int:
    """By how much the columns go up from one round of a loop to the next.

    That is what a register goes up by which is compared with a constant, and ``default`` or a multiple of it: compilers
    may do several rounds in one.
    """
    limits = {match[1] for one in body if one.name in ("ISETP", "UISETP") and (match := COMPARISON.match(one.operands))}
    for one in body:
        operands = [part.strip() for part in one.operands.split(",")]
        numbers = [int(part, 16) for part in operands if part.startswith("0x")]
        counts = "ADD" in one.name and operands[0] in limits and operands[0] in operands[1:]
        if counts and len(numbers) == 1 and numbers[0] % default == 0:
            return numbers[0]
    return default


def bytes_a_lane(one: Instruction) -> int:
    """Loaded or stored by a lane."""
    wide = re.search(r"\b(128|64|[US]16|[US]8)\b", one.suffix)
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[wide[1]] if wide else 4


def rounds(code: list[Instruction], columns: int, tile: int, persistent: bool) -> Iterator[tuple[Instruction, int]]:
    """Each instruction of a tile of tokens, and how often it runs for it.

    Args:
        columns: of a vector; the loops over them are the innermost.
        tile: columns of a tile.
        persistent: whether a program goes through several tiles of tokens, in an outermost loop.
    """
    loops = find_loops(code)
    outermost = [loop for loop in loops if all(loop[0] <= a and b <= loop[1] for a, b in loops)] if persistent else []
    times = {}
    for loop in loops:
        body = [one for one in code if loop[0] <= one.address <= loop[1]]
        times[loop] = 1 if loop in outermost else math.ceil(columns / find_step(body, tile))
    for one in code:
        inside = [loop for loop in loops if loop[0] <= one.address <= loop[1]]
        if not outermost or outermost[0] in inside:
            yield one, math.prod(times[loop] for loop in inside)


# What is compiled


class _Driver:
    """Says that the GPU is an H100, to kernels that ask what it can."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCH, 32)


def launches(case: Case) -> list[tuple[Any, list[torch.Tensor], list[int], dict[str, Any]]]:
    """What ``gpu`` would launch for a training step: kernel, tensors, numbers and options."""
    S, V, E = case.sizes
    step, way = case.kernel.split("_")
    dtype = getattr(torch, case.dtype)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(TOKENS, *shape, dtype=dtype, device="meta")

    streams, views = (lambda: empty(S, E, dtype=dtype)), (lambda: empty(V, E, dtype=dtype))
    alpha, beta = empty(S, V + S), empty(S)
    shapes = ((S, V + S), (S,), (E, V + S), (E, 1), (1,), (1,))
    rule: Any = [*(torch.empty(shape, device="meta") for shape in shapes), None]
    width, depth = step != "depth", step != "width"
    flags = [width, width and V == 1, width]
    packed = torch.empty((E + S + 1) * (V + S + 1), device="meta")
    rule, packed = (rule, packed) if width else ([None] * 7, None)
    found: list[Any] = []

    def record(kernel, programs, tensors, numbers, options) -> None:
        some = next(tensor for tensor in tensors if tensor is not None)
        found.append((kernel, [some if one is None else one for one in tensors], numbers, options))

    launch, gpu._launch = gpu._launch, record
    try:
        if way == "forward":
            read = [streams(), *([views(), alpha, beta] if depth else [None] * 3)]
            written = [streams() if depth else None, *([views(), alpha, beta] if width else [None] * 3), packed]
            gpu.forward(read, written, rule, (TOKENS, S, V, E), flags)
        else:
            read = [*([streams(), views()] if width else [None, None]), streams(), None, beta if width else None]
            read += [packed, *([views(), beta] if depth else [None] * 2)]
            written = [streams() if width else None, *([views(), beta] if depth else [None] * 2)]
            gpu.backward(read, written, rule, list(rule), (TOKENS, S, V, E), flags)
    finally:
        gpu._launch = launch
    return found


def compile_kernel(kernel: Any, tensors: list[torch.Tensor], numbers: list[int], options: dict[str, Any]) -> Any:
    """As Triton would for these arguments on a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.runtime.driver.set_active(_Driver())
    names = kernel.arg_names
    constants = {name: options[name] for name in names if name in options}
    types = dict.fromkeys(names, "constexpr")
    aligned = {}
    for index, (name, value) in enumerate(zip(names, [*tensors, *numbers], strict=False)):
        is_tensor = isinstance(value, torch.Tensor)
        types[name] = f"*{DTYPES[str(value.dtype).removeprefix('torch.')]}" if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    rest = {name: value for name, value in options.items() if name not in names}
    return triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=rest)


def disassemble(binary: bytes) -> tuple[str, str]:
    """Machine code as text, and the line that says what it uses of a GPU."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise SystemExit(f"this Triton comes without cuobjdump, which prints machine code: there is no {tool}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        texts = []
        for option in ("-sass", "--dump-resource-usage"):
            done = subprocess.run([tool, option, file], capture_output=True, text=True, check=False)
            if done.returncode or not done.stdout:
                raise SystemExit(f"cuobjdump {option} failed: {done.stderr.strip() or 'no output'}")
            texts.append(done.stdout)
    return texts[0], texts[1]


# What is counted


def count(case: Case) -> dict[str, Any]:
    """Everything that is said of a kernel."""
    large = gpu._forward_kernel, gpu._backward_kernel  # what else is launched deals with parameters alone
    kernel, tensors, numbers, options = next(one for one in launches(case) if one[0] in large)
    built = compile_kernel(kernel, tensors, numbers, options)
    text, usage = disassemble(built.asm["cubin"])
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {
        **case._asdict(),
        "registers": found["REG"],
        "spill_bytes": found["STACK"],
        "shared_bytes": built.metadata.shared,
        **summary(case, parse(text), options, found["REG"], built.metadata.shared),
    }


def summary(
    case: Case, code: list[Instruction], options: dict[str, Any], registers: int, shared: int
) -> dict[str, Any]:
    """Instructions a token, barriers a tile, loads and stores over the least, and the shares of time."""
    S, V, E = case.sizes
    persistent = case.kernel.endswith("backward")
    tokens = options["BT"] / options["num_warps"]  # of a warp
    units: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    instructions = barriers = 0
    for one, times in rounds(code, E, options["BC"], persistent):
        instructions += times
        barriers += times * (one.name == "BAR")
        named = [unit for unit, names in UNITS.items() if one.name in names] or ["integer"]
        for unit in named:
            units[unit] += times
        if one.name in ("LDG", "LDGSTS", "STG"):
            moved[one.name[:3]] += times * bytes_a_lane(one) * 32
    least = [number * E * torch.finfo(getattr(torch, case.dtype)).bits // 8 for number in VECTORS[case.kernel](S, V)]
    a_token = {unit: number / tokens for unit, number in units.items()}
    cycles = unit_cycles(a_token, instructions / tokens, moved.total() / tokens)
    programs = programs_per_sm(registers, shared, options["num_warps"])
    waits = math.ceil(E / options["BC"]) * (1250 if "width" in case.kernel or "join" in case.kernel else 900)
    latency = (waits + 30 * barriers + 1.6 * instructions) / (options["BT"] * programs)
    dram = {name: sum(least) / (speed / SMS / CLOCK) for name, speed in COPIES.items()}
    issue = max(cycles.values())
    return {
        "instructions_per_token": round(instructions / tokens),
        "barriers_per_tile": barriers,
        "tokens_per_tile": options["BT"],
        "loads_over_least": round(moved["LDG"] / tokens / least[0], 2),
        "stores_over_least": round(moved["STG"] / tokens / least[1], 2),
        "busiest_unit": max(cycles, key=lambda unit: cycles[unit]),
        "warps_per_sm": programs * options["num_warps"],
        **{f"issue_over_dram_{name}": round(issue / time, 2) for name, time in dram.items()},
        **{f"share_of_a_copy_{name}": round(share_of_a_copy(time, issue, latency), 2) for name, time in dram.items()},
    }


def unit_cycles(a_token: dict[str, float], instructions: float, moved: float) -> dict[str, float]:
    """Cycles of an SM that a token takes, unit by unit.

    Args:
        a_token: instructions of a warp, by unit.
        instructions: all of them; four schedulers issue one each in a cycle.
        moved: bytes to and from memory; the first-level cache moves 128 in a cycle.
    """
    number = collections.defaultdict(float, a_token)
    return {
        "issue": instructions / 4,
        "integer": number["integer"] / 2,  # 64 lanes
        "special": number["special"] * 2,  # 16 lanes
        "tensor": number["tensor"] * 2,
        "memory": moved / 128 + number["shuffle"] + number["shared"] * 2,
    }


def programs_per_sm(registers: int, shared: int, warps: int) -> int:
    """How many programs run on an SM at a time."""
    threads = warps * 32
    fit = [REGISTERS // (math.ceil(registers / 8) * 8 * threads), 2048 // threads, 32]
    return min([*fit, SHARED_MEMORY // (shared + 1024)])


def share_of_a_copy(dram: float, issue: float, latency: float) -> float:
    """An estimate: memory is busy 92 % of the time at most, a unit 65 %, and a program waits for what it loads.

    ``latency`` are the cycles of a tile that nothing else hides (900 for each round of loads, 350 for one from caches,
    30 for a barrier), over the tokens that an SM has in flight.
    """
    return dram / max(dram / 0.92, issue / 0.65, latency)


HEADER = ["kernel", "connection", "width", "dtype", "registers", "spills", "warps an SM", "instructions a token"]
HEADER += ["loads", "stores", "barriers a tile", "tile", "issue/DRAM H100", "H200", "est. share of a copy H100", "H200"]
COLUMNS = ["kernel", "connection", "width", "dtype", "registers", "spill_bytes", "warps_per_sm"]
COLUMNS += ["instructions_per_token", "loads_over_least", "stores_over_least", "barriers_per_tile", "tokens_per_tile"]
COLUMNS += [f"{what}_{name}" for what in ("issue_over_dram", "share_of_a_copy") for name in COPIES]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS, metavar="KERNEL")
    parser.add_argument("--connections", nargs="+", default=CONNECTIONS, metavar="CONNECTION")
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, metavar="WIDTH", help="of the model")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the same as a list of objects")
    options = parser.parse_args(argv)
    if gpu.triton is None:
        raise SystemExit("this PyTorch comes without Triton")
    found = []
    for case in itertools.product(options.kernels, options.connections, options.widths, options.dtypes):
        print(f"\r{' '.join(map(str, case)):60}", end="", file=sys.stderr, flush=True)
        found.append(count(Case(*case)))
    print("\r", file=sys.stderr)
    print(*markdown([HEADER, *([str(row[column]) for column in COLUMNS] for row in found)]), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
