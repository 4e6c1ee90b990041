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

from hcvision.connections.reference import Rule

SOURCES = [Path(__file__).with_name(name) for name in ("native.c", "native_vectors.h")]
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


class Pointers(ctypes.Structure):
    """``Parameters`` and ``Gradients`` of native.c: the parameters in the order of ``Rule``."""

    _fields_ = tuple((f"p{k}", ctypes.c_void_p) for k in range(7))


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
    options = ["-std=gnu11", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]
    options += OPTIONS.get(capability, ([], 4))[0]
    numbers = [f"-DS={streams}", f"-DV={views}", f"-DLANES={lanes}", f"-DTAIL={int(tail)}"]
    command = [*compiler(), *options, *numbers]
    texts = [source.read_text() for source in SOURCES]
    what = repr((texts, command, platform.machine(), platform.system()))
    name = f"{streams}x{views}-{hashlib.sha256(what.encode()).hexdigest()[:20]}.so"
    command += [str(SOURCES[0]), "-lm"]
    try:
        try:
            functions = open_kept(command, name)
        except OSError as error:
            functions = open_once(command, name)
            warnings.warn(f"compiled kernels cannot be kept, and every process compiles its own: {error}")  # noqa: B028
    except (OSError, CompilerError) as error:
        return str(error)
    for function, tensors, structures in ((functions.forward, 9, 2), (functions.backward, 12, 3)):
        function.argtypes = [ctypes.c_void_p] * (tensors + structures)
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


def forward(
    read: list[Optional[Tensor]],
    written: list[Optional[Tensor]],
    rule: Rule,
    sizes: tuple[int, int, int, int],
    flags: list[bool],
) -> None:
    """Run ``forward`` of native.c on its tensors, of T, S, V, E, with norm, center and tanh."""
    streams, output, alpha, beta = read
    following, *outputs, packed = written
    tensors = [streams, _as_float(output), alpha, beta, packed, following, *outputs]
    _call("forward", tensors, [[_as_float(part) for part in rule]], sizes, 1, flags)


def backward(
    read: list[Optional[Tensor]],
    written: list[Optional[Tensor]],
    rule: Rule,
    grads: list[Optional[Tensor]],
    sizes: tuple[int, int, int, int],
    flags: list[bool],
) -> None:
    """Run ``backward`` of native.c, which writes the gradients of streams, output, beta and the parameters."""
    T, S, V, E = sizes
    programs = max(min(T, PROGRAMS), 1)  # without tokens one leaves zeros
    *others, packed, output, beta = read
    grad_streams, grad_output, grad_beta = written
    exact = [_as_float(part) for part in (output, grad_output)]
    sums = torch.empty(programs * length(S, V, E)) if packed is not None else None
    tensors = [*others, packed, exact[0], beta, grad_streams, exact[1], grad_beta, sums]
    found = [_as_float(part) for part in grads]
    _call("backward", tensors, [[_as_float(part) for part in rule], found], sizes, programs, flags)
    for part, other in zip((grad_output, *grads), (exact[1], *found), strict=True):
        if part is not None and other is not None and other is not part:
            part.copy_(other)


def length(S: int, V: int, E: int) -> int:
    """``LENGTH(E)`` of native.c."""
    return ((E + S + 1) * (V + S + 1) + 15) // 16 * 16


def _point(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _as_float(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """Contiguous and in float32; the tensor itself, where it is."""
    return None if tensor is None else tensor.float().contiguous()


def _call(
    name: str,
    tensors: list[Optional[Tensor]],
    structures: list[list[Optional[Tensor]]],
    sizes: tuple[int, int, int, int],
    programs: int,
    flags: list[bool],
) -> None:
    """Run a function on contiguous float32 tensors, and on structures of them; None where it is to find NULL."""
    tokens, streams, views, width = sizes
    functions = functions_for(streams, views, width)
    if isinstance(functions, str):
        raise RuntimeError(functions)
    numbers = Sizes(tokens, width, programs, torch.get_num_threads(), *flags)
    pointers = [_point(tensor) for tensor in tensors]
    parts = [Pointers(*map(_point, structure)) for structure in structures]
    getattr(functions, name)(*pointers, *map(ctypes.addressof, parts), ctypes.addressof(numbers))
