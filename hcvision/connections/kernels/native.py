"""The kernels of ``native.c``: compiled for this CPU when they are first wanted, and kept in a cache.

A C compiler with OpenMP is needed (``CC`` in the environment names another than gcc, cc or clang), and is looked for
once; what it makes lies in ``$XDG_CACHE_HOME/hcvision`` or ``~/.cache/hcvision``, a file for each number of streams
and views. Compiling one takes about a second. Where nothing can be kept there, every process compiles its own.
Without a compiler PyTorch does the work.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
OPTIONS = {  # for what torch.backends.cpu.get_cpu_capability() says: options of the compiler, and the lanes of a vector
    "AVX512": (["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"], 16),
    "AVX2": (["-mavx2", "-mfma"], 8),
}
PROGRAMS = 32  # that share the tokens in backward; each has sums of its own, so that threads don't change any


class Sizes(ctypes.Structure):
    """``Sizes`` of native.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("tokens", "width", "programs", "threads")),
        *((name, ctypes.c_int) for name in ("norm", "center", "tanh")),
    )


def cache_folder() -> Path:
    """Where compiled kernels are kept.

    Raises:
        OSError: there is no home folder.
    """
    place = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if place.startswith("~"):
        raise OSError("there is no home folder")
    return Path(place) / "hcvision"


@functools.cache
def compiler() -> list[str]:
    """The command of a C compiler; empty where there is none."""
    chosen = shlex.split(os.environ.get("CC", ""))
    return chosen or next(([name] for name in ("gcc", "cc", "clang") if shutil.which(name)), [])


class CompilerError(Exception):
    """The compiler did not do it."""


def build(command: list[str], library: Path) -> Path:
    """Compile into a file.

    Raises:
        CompilerError: there is no such compiler, or it failed.
    """
    try:
        run = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} failed: {error}") from error
    if run.returncode:
        raise CompilerError(f"{command[0]} failed: {(run.stderr.strip() or 'no message').splitlines()[0]}")
    return library


def open_kept(command: list[str], name: str) -> ctypes.CDLL:
    """The library in the cache, which is compiled if it is not there, and is there whole or not at all.

    Raises:
        OSError: the cache cannot be written, or nothing in it can be loaded.
        CompilerError: from ``build``.
    """
    library = cache_folder() / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            build(command, Path(folder) / name).replace(library)
    return ctypes.CDLL(str(library))


def open_once(command: list[str], name: str) -> ctypes.CDLL:
    """The same of this process alone, in the folder for temporary files, which keeps nothing of it."""
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(build(command, Path(folder) / name)))


@functools.cache
def load(streams: int, views: int, lanes: int, tail: bool, capability: str) -> "ctypes.CDLL | str":
    """The functions of native.c for so many streams and views, or why there are none."""
    if not compiler():
        return "there is no C compiler (gcc, cc, clang or the one that CC names)"
    options = ["-std=gnu11", "-O3", "-fopenmp", "-shared", "-fPIC", *OPTIONS.get(capability, ([], 4))[0]]
    numbers = [f"-DS={streams}", f"-DV={views}", f"-DLANES={lanes}", f"-DTAIL={int(tail)}"]
    command = [*compiler(), *options, *numbers]
    what = repr((SOURCE.read_text(), command, platform.machine(), platform.system()))
    name = f"{streams}x{views}-{hashlib.sha256(what.encode()).hexdigest()[:20]}.so"
    command += [str(SOURCE), "-lm"]
    try:
        try:
            functions = open_kept(command, name)
        except OSError as error:
            functions = open_once(command, name)
            warnings.warn(f"compiled kernels cannot be kept, and every process compiles its own: {error}")  # noqa: B028
    except (OSError, CompilerError) as error:
        return str(error)
    for function, tensors in ((functions.forward, 11), (functions.backward, 16)):
        function.argtypes = [ctypes.c_void_p] * tensors + [ctypes.POINTER(Sizes)]
        function.restype = None
    return functions


def functions_for(streams: int, views: int, width: int) -> "ctypes.CDLL | str":
    """``load`` for streams so wide: with the longest vectors that divide it, or some that do not."""
    capability = torch.backends.cpu.get_cpu_capability()
    longest = OPTIONS.get(capability, ([], 4))[1]
    lanes = next((lanes for lanes in (longest, longest // 2) if lanes >= 4 and width % lanes == 0), 0)
    return load(streams, views, lanes or longest, not lanes, capability)


@torch.compiler.assume_constant_result
def find_missing(streams: int, views: int, width: int) -> str | None:
    """Why there are no functions for so many streams and views of this width, or None."""
    found = functions_for(streams, views, width)
    return found if isinstance(found, str) else None


def find_obstacle(streams: Tensor, views: int) -> str | None:
    """Why the functions cannot take these streams (..., S, E), or None."""
    if streams.device.type != "cpu":
        return f"they need a tensor on a CPU, got one on {streams.device.type}"
    if streams.dtype != torch.float32:
        return f"they take float32, got {str(streams.dtype).removeprefix('torch.')}"
    return find_missing(streams.shape[-2], views, streams.shape[-1])


def forward(tensors: list[Optional[Tensor]], sizes: tuple[int, int, int, int], flags: list[bool]) -> None:
    """Run ``forward`` of native.c on its tensors, of T, S, V, E, with norm, center and tanh."""
    streams, output, *rest = tensors
    _call("forward", [streams, None if output is None else output.float(), *rest], sizes, 1, flags)


def backward(
    read: list[Optional[Tensor]], written: list[Optional[Tensor]], sizes: tuple[int, int, int, int], flags: list[bool]
) -> list[Optional[Tensor]]:
    """Run ``backward`` of native.c, which writes the gradients of streams, output and beta.

    Returns those of static, rows and scale.
    """
    T, S, V, E = sizes
    programs, K = min(T, PROGRAMS), V + S + 1
    static, rows = read[5:7]
    sums = [torch.empty(programs, S, K) if static is not None else None]
    sums += [torch.empty(programs, K, E), torch.empty(programs, K)] if rows is not None else [None, None]
    *rest, output, beta = read
    grad_output = found = written[1]
    if output is not None and grad_output is not None and output.dtype != torch.float32:
        output, found = output.float(), grad_output.float()
    _call("backward", [*rest, output, beta, written[0], *sums, found, written[2]], sizes, programs, flags)
    if found is not None and grad_output is not None and found is not grad_output:
        grad_output.copy_(found)
    return [None if part is None else part.sum(0) for part in sums]


def _call(
    name: str, tensors: list[Optional[Tensor]], sizes: tuple[int, int, int, int], programs: int, flags: list[bool]
) -> None:
    """Run a function on contiguous float32 tensors; None where it is to find NULL."""
    tokens, streams, views, width = sizes
    functions = functions_for(streams, views, width)
    if isinstance(functions, str):
        raise RuntimeError(functions)
    numbers = Sizes(tokens, width, programs, torch.get_num_threads(), *flags)
    assert all(tensor is None or (tensor.is_contiguous() and tensor.dtype == torch.float32) for tensor in tensors)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    getattr(functions, name)(*pointers, ctypes.byref(numbers))
