"""benchmarks/kernel_code.py counts what is there, and the kernels keep its bars. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import kernel_code  # noqa: E402

HEAD = """
        Function : _forward_kernel
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;     /* 0x0 */
        /*0020*/              @!P0 FFMA R8, R4, R5, R8 ;                /* 0x0 */
        /*0030*/                   IADD3 R6, P0, R6, {step}, RZ ;       /* 0x0 */
        /*0040*/                   IADD3 R9, R9, 0x1, RZ ;              /* 0x0 */
        /*0050*/                   ISETP.GE.AND P1, PT, R9, 0x2, PT ;   /* 0x0 */
        /*0060*/                   ISETP.GE.U32.AND P0, PT, R6, 0x2c0, PT ; /* 0x0 */
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R8 ;     /* 0x0 */
        /*0080*/              @!P0 BRA 0x10 ;                           /* 0x0 */
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;        /* 0x0 */
        /*00a0*/                   EXIT ;                               /* 0x0 */
        /*00b0*/                   BRA 0xb0;                            /* 0x0 */
        /*00c0*/                   NOP;                                 /* 0x0 */
"""


@pytest.mark.parametrize(("step", "rounds"), [(0x40, 12), (0x80, 6)])
def test_loops(step, rounds):
    """A loop over 768 columns runs as often as its step says, whatever else in it is counted."""
    code = kernel_code.parse(HEAD.format(step=hex(step)))
    assert [one.name for one in code[:3]] == ["LDC", "LDG", "FFMA"]
    assert len(code) == 12  # NOP does nothing
    assert kernel_code.find_loops(code) == [(0x10, 0x80)]
    times = {one.address: number for one, number in kernel_code.rounds(code, 768, 64, persistent=False)}
    assert times[0x00] == times[0x90] == 1
    assert {times[address] for address in range(0x10, 0x90, 0x10)} == {rounds}


def test_persistent():
    """What a program does once, before and after its tiles of tokens, is left out."""
    text = HEAD.format(step="0x40").replace("EXIT ; ", "BRA 0x10 ;")
    code = kernel_code.parse(text)
    times = {one.address: number for one, number in kernel_code.rounds(code, 768, 64, persistent=True)}
    assert min(times) == 0x10
    assert max(times) == 0xA0
    assert times[0x20] == 12
    assert times[0x90] == 1


def test_bytes():
    sizes = [kernel_code.bytes_a_lane(one) for one in kernel_code.parse(HEAD.format(step="0x40")) if "G" in one.name]
    assert sizes[0] == 16
    assert 2 in sizes
    one = kernel_code.Instruction(0, "LDG", "E.LTC128B.64", "")
    assert kernel_code.bytes_a_lane(one) == 8
    assert kernel_code.bytes_a_lane(one._replace(suffix="E")) == 4


def test_summary():
    """Counted by hand: 12 rounds of 8 instructions and 4 more, for a warp's share of a tile of 16 tokens by 4 warps."""
    code = kernel_code.parse(HEAD.format(step="0x40"))
    case = kernel_code.Case("width_forward", "dhc2", 768, "bfloat16")
    found = kernel_code.summary(case, code, {"BT": 16, "BC": 64, "num_warps": 4}, registers=128, shared=0)
    assert found["instructions_per_token"] == (12 * 8 + 4) // 4
    assert found["barriers_per_tile"] == 1
    assert found["loads_over_least"] == 12 * 16 * 32 / 4 / (2 * 768 * 2)
    assert found["stores_over_least"] == round(12 * 2 * 32 / 4 / (768 * 2), 2)
    assert found["warps_per_sm"] == 65536 // 128 // 32


@pytest.mark.parametrize("kernel", kernel_code.KERNELS)
@pytest.mark.parametrize("connection", ["dhc2", "dfc4"])
def test_launches(kernel, connection):
    """What is compiled is what a training step launches, with every tensor in its place."""
    case = kernel_code.Case(kernel, connection, 384, "bfloat16")
    S, V, E = case.sizes
    assert ((2, 1, 384) if connection == "dhc2" else (4, 4, 96)) == (S, V, E)
    way = kernel.partition("_")[2]
    expected = [f"_{way}_kernel"]
    if not kernel.startswith("depth"):
        expected = ["_pack_kernel", *expected] if way == "forward" else [*expected, "_sums_kernel", "_unpack_kernel"]
    launched = {one[0].__name__: one for one in kernel_code.launches(case)}
    assert list(launched) == expected
    launched, tensors, numbers, options = launched[f"_{way}_kernel"]
    arguments = dict(zip(launched.arg_names, [*tensors, *numbers], strict=False))
    assert options["DEPTH"] == (not kernel.startswith("width"))
    assert options["WIDTH"] == (not kernel.startswith("depth"))
    streams = "streams" if "forward" in kernel else "grad_carried"
    assert arguments[streams].shape == (kernel_code.TOKENS, S, E)
    assert arguments[streams].dtype == torch.bfloat16
    assert arguments["T"] == kernel_code.TOKENS
    if options["WIDTH"]:
        assert options["DYNAMIC"]
        assert arguments["rows"].shape == (V + S + 1, E)
        assert arguments["views" if "forward" in kernel else "grad_views"].shape == (kernel_code.TOKENS, V, E)
        assert options["CENTER"] == (connection == "dhc2")


COMPILE = """
import sys
sys.path.append("benchmarks")
import kernel_code
for connection in ("dhc2", "dfc4"):
    for kernel in ("width_forward", "width_backward"):
        for one in kernel_code.launches(kernel_code.Case(kernel, connection, 384, "bfloat16")):
            if "pack" in one[0].__name__:
                _, usage = kernel_code.disassemble(kernel_code.compile_kernel(*one).asm["cubin"])
                print(one[0].__name__, "STACK:0 " in usage)
"""


@pytest.mark.slow
def test_kernels_for_parameters():
    """They compile for a GPU, which takes less than the interpreter does, and keep what they hold in registers."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == 2 * ["_pack_kernel True", "_unpack_kernel True"]


BARS = [  # kernel, connection, width, type, instructions a token, barriers a tile
    ("join_backward", "dhc4", 768, "bfloat16", 4200, 80),
    ("join_backward", "dfc4", 768, "bfloat16", 2000, 80),
    ("join_forward", "dhc4", 768, "bfloat16", 2400, 20),
    ("join_forward", "dfc4", 768, "bfloat16", 1000, 20),
    ("width_forward", "dfc4", 384, "bfloat16", 400, 20),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "connection", "width", "dtype", "instructions", "barriers"), BARS)
def test_bars(kernel, connection, width, dtype, instructions, barriers, tmp_path):
    """Few enough instructions that memory is what a kernel waits for, on an H100, and nothing spilled."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "kernel_code.py"), f"--json={tmp_path}/json"]
    command += [f"--kernels={kernel}", f"--connections={connection}", f"--widths={width}", f"--dtypes={dtype}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads((tmp_path / "json").read_text())
    asked = {"kernel": kernel, "connection": connection, "width": width, "dtype": dtype}
    assert {key: found[key] for key in asked} == asked
    assert found["spill_bytes"] == 0
    assert 0 < found["registers"] <= 255
    assert found["instructions_per_token"] <= instructions
    assert found["barriers_per_tile"] <= barriers
    assert found["issue_over_dram_h100"] <= kernel_code.ISSUE_BAR
    assert 1 <= found["stores_over_least"] < 1.5  # or loops are counted wrongly
