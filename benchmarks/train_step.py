"""Values first, speed second: what connections cost on a GPU, kernel by kernel and in whole training steps.

    python benchmarks/train_step.py --out docs/results/performance_gpu.md
    python benchmarks/train_step.py --device cpu --small

The first command is the whole table, in less than nine minutes on an H100 or H200; what the time budget leaves out
is named. The second one runs the same code on tiny models, to see that it does; TRITON_INTERPRET=1 in its
environment takes the kernels along.

1. Values. Each kernel's results and gradients, and those of a trunk of two blocks, at the sizes of ViT-B, against
   float64: at most twice as wrong as PyTorch in the same dtype, and a little more (``MORE``); or the script says what
   is wrong and exits with 1.
2. The bandwidth of a copy: bytes read and written, by the median time.
3. Kernels: the bytes that each has to move, over its median time (CUDA events, the L2 cache flushed before each run),
   beside that of the copy. All that an operator does counts as its time, the sums over tokens in backward too.
4. Training steps: forward, backward and fused AdamW of whole models, their blocks compiled one by one, or four by four
   where streams are computed again (``recompute``): what goes from graph to graph is kept. Variants take turns, a step
   each per round; a ratio is a step's time over that of the residual step of the same round. Peak memory is a model's
   own: weights, gradients, optimizer and activations. Under bf16 autocast, with weights in float32, the residual
   stream of a timm ViT is float32, and so are the streams of connections: the embedding is added to a float32
   parameter. ``bf16-true`` keeps all of it in bfloat16.
"""

import argparse
import gc
import importlib.metadata
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch._dynamo
from connections import (
    MORE_OF_A_TRUNK,
    NO_LIMIT,
    RECOMPUTE,
    SMALL,
    Size,
    Textbook,
    bar,
    build_model,
    connection_parameters,
    excess,
    library_trunk,
    peer,
    peer_blocks,
    randomize,
    results,
    spread,
    worse,
)
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision import (
    build_connection,
    convert,
)
from hcvision.connections.kernels import operators as kernels
from hcvision.connections.kernels import triton as gpu
from hcvision.data import is_out_of_memory, markdown
from hcvision.studies import (
    WARM_UP,
    Setup,
    Step,
    compare_step,
    describe_step,
    interleaved_times,
    keep_freed_memory,
    name_device,
    peak_memory,
    training_step,
)

NAMES = ("dhc2", "dhc4", "dfc4")
DTYPES = (torch.bfloat16, torch.float32)
MORE = {  # how wrong a value may be, of the largest one, beside twice what PyTorch is wrong by
    torch.bfloat16: 2**-7 if gpu.INTERPRETED else 2**-9,  # Triton's interpreter cuts off where a GPU rounds
    torch.float32: 1e-5,
}
COPY = 2**28  # numbers, of float32
FLUSH = 2**28  # bytes, more than any L2 cache holds
LEAST_ROUNDS = 5  # fewer than that are not worth a row
KERNEL_BAR = 0.80  # of the copy's bandwidth
MEMORY_BAR = 1.25  # dhc4
BARS = {
    "vit_base_patch16_224": {"dhc2": 1.05, "dhc4": 1.10, "dfc4": 1.02},
    "dit_xl_patch2_256": {"dhc4": 1.07},
}
TINY = {  # arguments of the small models
    "vit_base_patch16_224": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "dit_xl_patch2_256": {"img_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}


class Budget:
    """Seconds that may be spent. What is to begin has to fit, as far as can be told from what came before."""

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds
        self.longest = 0.0  # of what was built and run once

    def left(self) -> float:
        return self.end - time.perf_counter()

    def has_time(self) -> bool:
        return self.left() > self.longest

    def took(self, began: float) -> None:
        self.longest = max(self.longest, time.perf_counter() - began)


# Kernels


@dataclass(frozen=True)
class Case:
    """A connection's tensors for its kernels: T tokens, S streams, V views, E stream width, K = V + S + 1."""

    name: str
    streams: Tensor  # (T, S, E)
    outputs: tuple[Tensor, Tensor]  # of two branches, (T, V, E)
    weights: tuple[tuple[Tensor, Tensor, Tensor], ...]  # of two connections: static (S, K), rows (K, E), scales (2,)
    center: bool  # LayerNorm before the projection, or RMSNorm

    def prepare(self, weights: tuple[Tensor, Tensor, Tensor]) -> tuple[Any, ...]:
        """The last arguments of a kernel: parameters, norm, center and tanh."""
        static, rows, scale = weights
        fn = rows[:-1].mT, rows[-1:].mT
        return static[:, :-1], static[:, -1], *fn, scale[:1], scale[1:], None, True, self.center, True

    @property
    def inputs(self) -> list[Tensor]:
        return [self.streams, *self.outputs, *self.weights[0], *self.weights[1]]

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers as leaves of a graph of their own; streams and outputs in this dtype."""
        streams, *outputs = (t.detach().to(dtype).requires_grad_() for t in (self.streams, *self.outputs))
        exact = torch.promote_types(dtype, torch.float32)
        weights = (tuple(t.detach().to(exact).requires_grad_() for t in weights) for weights in self.weights)
        return replace(self, streams=streams, outputs=tuple(outputs), weights=tuple(weights))


def build_case(name: str, dim: int, tokens: int, dtype: torch.dtype, device: str) -> Case:
    """Random tensors, that are what they are in this dtype."""
    connection = build_connection(name, dim)
    S, V, E = connection.streams, connection.views, connection.stream_dim
    torch.manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype)

    def weights() -> tuple[Tensor, Tensor, Tensor]:
        static = torch.cat([connection.static_alpha, connection.static_beta[:, None]], dim=1).detach().to(device)
        static = static + 0.3 * torch.randn_like(static)
        return static, torch.randn(V + S + 1, E, device=device) / E**0.5, torch.randn(2, device=device)

    outputs = random(tokens, V, E), random(tokens, V, E)
    return Case(name, random(tokens, S, E), outputs, (weights(), weights()), connection.center_norm)


def run_kernels(case: Case) -> list[Tensor]:
    """Width, join and depth: two sub-layers, what their branches read, their coefficients, and the last streams."""
    first, second = map(case.prepare, case.weights)
    views, alpha, beta, link, _ = kernels.width(case.streams, *first, False)
    joined = kernels.join(link, case.streams.detach(), case.outputs[0], alpha.detach(), beta, *second, False)
    middle, more_views, more_alpha, more_beta, link, _ = joined
    middle = middle.detach()  # its gradient comes by the link
    last = kernels.depth(link, middle, case.outputs[1], more_alpha.detach(), more_beta, False)
    return [last, views, more_views, beta, more_beta, alpha, more_alpha, middle]


def run_formula(case: Case) -> list[Tensor]:
    """The same in plain PyTorch: float32 at least, rounded where the kernels write."""
    dtype = case.streams.dtype
    exact = torch.promote_types(dtype, torch.float32)
    views = case.outputs[0].shape[-2]

    def read(h: Tensor, static: Tensor, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = (F.layer_norm if case.center else F.rms_norm)(h, h.shape[-1:], eps=1e-6)
        scales = torch.cat([scale[:1].expand(len(rows) - 1), scale[1:]])
        coefficients = static + scales * torch.tanh(normed @ rows.mT)
        alpha, beta = coefficients[..., :-1], coefficients[..., -1]
        return (alpha[..., :views].mT @ h).to(dtype), alpha, beta

    def write(h: Tensor, output: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return (beta[..., None] * output.to(exact) + alpha[..., views:].mT @ h).to(dtype)

    h = case.streams.to(exact)
    read_first, alpha, beta = read(h, *case.weights[0])
    middle = write(h, case.outputs[0], alpha, beta)
    h = middle.to(exact)
    read_second, more_alpha, more_beta = read(h, *case.weights[1])
    last = write(h, case.outputs[1], more_alpha, more_beta)
    return [last, read_first, read_second, beta, more_beta, alpha, more_alpha, middle]


RESULTS = ("streams", "views", "views", "beta", "beta", "alpha", "alpha", "streams")
GRADIENTS = ("streams", "output", "output", *("static", "rows", "scale") * 2)


def with_gradients(run: Callable[[Case], list[Tensor]], case: Case) -> list[Tensor]:
    """What a case gives, and the gradients of its inputs for directions that are always the same."""
    outputs = run(case)
    taken = outputs[:3]  # behind the others the kernels have no gradient, or the same one
    generator = torch.Generator(case.streams.device).manual_seed(1)
    directions = [torch.randn(t.shape, generator=generator, device=t.device).bfloat16().to(t.dtype) for t in taken]
    return [*outputs, *torch.autograd.grad(taken, case.inputs, directions)]


def check_kernels(name: str, dim: int, tokens: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """By result: how wrong the kernels are, 1 being as much as is allowed."""
    case = build_case(name, dim, tokens, dtype, device)
    exact = with_gradients(run_formula, case.to(torch.float64))
    theirs = with_gradients(run_formula, case.to(dtype))
    ours = with_gradients(run_kernels, case.to(dtype))
    found: dict[str, float] = {}
    what = [*RESULTS, *(f"gradient of {name}" for name in GRADIENTS)]
    for key, *tensors in zip(what, ours, theirs, exact, strict=True):
        found[key] = worse(found.get(key, 0.0), excess(*tensors, MORE[dtype]))
    return found


def check_trunk(name: str, size: Size, device: str) -> float:
    """How wrong a trunk on kernels is in float32, with and without recomputation; 1 is as much as is allowed."""
    model = build_model(size)
    plain = convert(build_model(size), name, backend="torch")
    randomize(connection_parameters(plain))
    tokens = torch.randn(size.batch, size.tokens, size.dim, device=device, requires_grad=True)
    direction = torch.randn_like(tokens)
    textbook = Textbook(model, plain).double().to(device)
    exact = results(textbook, tokens.detach().double().requires_grad_(), direction.double())
    theirs = results(library_trunk(plain.float().to(device)), tokens, direction)
    found = 0.0
    for recompute in (0, 1):
        fused = convert(build_model(size), name, backend="triton", recompute=recompute)
        fused.load_state_dict(plain.state_dict())
        ours = results(library_trunk(fused.to(device)), tokens, direction)
        for tensors in zip(ours, theirs, exact, strict=True):
            found = worse(found, excess(*tensors, MORE_OF_A_TRUNK))
    return found


def find_errors(name: str, dim: int, tokens: int, size: Size, device: str) -> Iterator[tuple[str, float]]:
    """What was looked at, and how wrong it is; 1 is as much as is allowed."""
    for dtype in DTYPES:
        for part, value in check_kernels(name, dim, tokens, dtype, device).items():
            yield f"{part}, {str(dtype).removeprefix('torch.')}", value
    yield "a trunk, float32", check_trunk(name, size, device)


def check(names: tuple[str, ...], dim: int, tokens: int, size: Size, device: str) -> None:
    """Stop with one line where a value is wrong; else say how far the worst is from that."""
    for name in names:
        worst = 0.0
        for part, value in find_errors(name, dim, tokens, size, device):
            if not value <= 1:
                sys.exit(f"the kernels are wrong: {name}, {part}: {value:.2g} times as far from float64 as is allowed")
            worst = max(worst, value)
        print(f"{name}: kernels are right, the worst at {worst:.2f} of what is allowed", flush=True)


def vectors(kernel: str, S: int, V: int) -> int:
    """Vectors of E numbers per token that a kernel has to move: each input read once, each output written once."""
    return {
        "width": S + V,
        "depth": 2 * S + V,
        "join": 2 * S + 2 * V,
        "width_backward": 3 * S + V,
        "depth_backward": S + 2 * V,
        "join_backward": 3 * S + 3 * V,
    }[kernel]


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """Each kernel on the tensors of a case."""
    streams, (output, grad_views), weights = case.streams, case.outputs, case.prepare(case.weights[0])
    _, alpha, beta, link, packed = kernels.width(streams, *weights, False)
    grad, grad_beta = torch.randn_like(streams), torch.randn_like(beta)
    back = (grad_views, None, grad_beta, grad, streams, packed, *weights, False)
    return {
        "width": lambda: kernels.width(streams, *weights, False),
        "depth": lambda: kernels.depth(link, streams, output, alpha, beta, False),
        "join": lambda: kernels.join(link, streams, output, alpha, beta, *weights, False),
        "width_backward": lambda: kernels.width_backward(*back),
        "depth_backward": lambda: kernels.depth_backward(grad, output, beta, False),
        "join_backward": lambda: kernels.join_backward(*back, output, beta),
    }


def median_seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Of a call that starts work on the device, without the time that Python takes to start it."""
    times = []
    if device == "cpu":
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    cache = torch.empty(FLUSH, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for _ in range(3):
        call()
    for start, end in events:
        cache.zero_()
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the call is put into the queue
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def copy_bandwidth(device: str, numbers: int, repeats: int) -> float:
    """Bytes per second, read and written."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats)


@torch.no_grad()
def measure_kernels(
    name: str, dim: int, tokens: int, dtype: torch.dtype, device: str, repeats: int, copy: float
) -> Iterator[dict[str, Any]]:
    """A row per kernel."""
    case = build_case(name, dim, tokens, dtype, device)
    S, V, E = case.streams.shape[1], case.outputs[0].shape[1], case.streams.shape[2]
    for kernel, call in calls(case).items():
        number = vectors(kernel, S, V)
        size = number * tokens * E * dtype.itemsize
        taken = median_seconds(call, device, repeats)
        yield {
            "connection": name,
            "dtype": str(dtype).removeprefix("torch."),
            "kernel": kernel,
            "vectors": number,
            "bytes": size,
            "ms": 1e3 * taken,
            "gb_per_s": size / taken / 1e9,
            "of_copy": size / taken / copy,
        }


def kernel_table(rows: list[dict[str, Any]]) -> list[str]:
    header = ["connection", "dtype", "kernel", "vectors of E per token", "MB", "ms", "GB/s", "of a copy", "bar"]
    lines = [header]
    for row in rows:
        line = [row["connection"], row["dtype"], row["kernel"].replace("_", " "), str(row["vectors"])]
        line += [f"{row['bytes'] / 1e6:,.1f}", f"{row['ms']:.3f}", f"{row['gb_per_s']:,.0f}", f"{row['of_copy']:.0%}"]
        lines.append([*line, f"≥ {KERNEL_BAR:.0%}"])
    return markdown(lines)


# Training steps


@dataclass(frozen=True)
class Group:
    """Variants that take turns, the residual model first: ``residual``, ``torch-dhc2``, ``recompute-dhc4``, ..."""

    base: str
    batch: int
    precision: str
    compiled: bool
    variants: tuple[str, ...]

    def __str__(self) -> str:
        how = ["compiled" if self.compiled else "eager", self.precision, f"batches of {self.batch}"]
        how += ["the package hyper-connections"] if self.variants[-1].startswith("peer-") else []
        return f"{self.base}: {', '.join(how)}"


def find_groups(vit_batch: int, dit_batch: int, precision: str, has_kernels: bool, has_peer: bool) -> list[Group]:
    """The table, in the order in which it is measured."""
    vit, dit = ("vit_base_patch16_224", vit_batch), ("dit_xl_patch2_256", dit_batch)

    def group(size: tuple[str, int], precision: str, compiled: bool, forms: list[str], *more: str) -> Group:
        variants = [f"{form}-{name}" for form in forms for name in NAMES]
        return Group(*size, precision, compiled, ("residual", *variants, *more))

    fused = ["triton"] if has_kernels else []
    best = (*fused, "torch")[0]
    found = [
        group(vit, precision, True, [*fused, "torch"], "recompute-dhc4"),
        group(vit, precision, False, [*fused, "torch"], "recompute-dhc4"),
        group(dit, precision, True, [], f"{best}-dhc4", "recompute-dhc4"),
    ]
    if has_peer:
        found.append(group(vit, precision, False, ["peer"]))
    if precision != "bf16-true":
        found.append(group(vit, "bf16-true", True, [best]))
    if has_peer:
        found.append(group(vit, precision, True, ["peer"]))
    return found


class Run(nn.Sequential):
    """Blocks one after the other, as one graph of the compiler."""

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        for block in self:
            x = block(x, *condition)
        return x


def build_step(group: Group, variant: str, setup: Setup, has_kernels: bool, compiler: str, whole: bool) -> Step:
    """A training step of a variant: forward, backward, update."""
    module = setup.build(group.base, None, training=True)
    model = module.model
    form, _, name = variant.rpartition("-")
    if form == "peer":
        model.blocks = peer_blocks(model, name)
    elif form:
        backend = "triton" if has_kernels and form != "torch" else "torch"
        convert(model, name, backend=backend, recompute=RECOMPUTE if form == "recompute" else 0)
    module.to(setup.device)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)  # gates and projections that begin closed
    if form == "recompute" and group.compiled and not whole:
        blocks = list(model.blocks)
        model.blocks = nn.Sequential(*(Run(*blocks[i : i + RECOMPUTE]) for i in range(0, len(blocks), RECOMPUTE)))
    if group.compiled:
        for part in [model] if whole else model.blocks:
            part.compile(dynamic=False, backend=compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return training_step(module, setup.batch(module, group.batch, setup.device), group.precision, optimizer)


def measure_group(
    group: Group, build: Callable[[Group, str], Step], rounds: int, device: str, budget: Budget
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per variant, and what there was no time for."""
    cuda = device != "cpu"
    torch.compiler.reset()
    gc.collect()
    steps: dict[str, Step] = {}
    peaks: dict[str, float] = {}
    round_time = 0.0
    for variant in group.variants:
        if not budget.has_time():
            break
        began = time.perf_counter()
        before = torch.cuda.memory_allocated(device) if cuda else 0
        steps[variant] = build(group, variant)
        steps[variant]()
        if cuda:
            torch.cuda.synchronize(device)
        built = time.perf_counter()
        peak = peak_memory(steps[variant], device) - before
        if cuda:
            torch.cuda.synchronize(device)
        round_time += time.perf_counter() - built
        if cuda or not group.compiled:  # a CPU's is counted in the operations of the eager model
            peaks[variant] = peak
        budget.took(began)
        print(f"  {variant}: built and run in {time.perf_counter() - began:.0f} s", flush=True)
    affordable = int(budget.left() / max(round_time, 1e-9)) - WARM_UP
    if len(steps) < 2 or affordable < min(rounds, LEAST_ROUNDS):
        return [], list(group.variants)
    rounds = min(rounds, affordable)
    times = interleaved_times(steps, rounds, device)
    rows = []
    for variant in steps:
        row = {"group": str(group), "variant": variant, "compiled": group.compiled, "batch": group.batch}
        row |= {"rounds": rounds, **describe_step(times[variant], peaks.get(variant), group.batch)}
        row |= compare_step(times[variant], times["residual"], peaks.get(variant), peaks.get("residual"))
        rows.append(row | bars(group, variant))
    return rows, [variant for variant in group.variants if variant not in steps]


def bars(group: Group, variant: str) -> dict[str, float | None]:
    """At most so much of the residual model's time, for kernels in a compiled model, and of its memory."""
    form, _, name = variant.rpartition("-")
    fused = group.compiled and form == "triton"
    found = {"bar": BARS[group.base].get(name) if fused else None}
    found["memory_bar"] = MEMORY_BAR if name == "dhc4" and (fused or form == "recompute") else None
    return found


def fit_memory(
    group: Group, build: Callable[[Group, str], Step], rounds: int, device: str, budget: Budget
) -> tuple[list[dict[str, Any]], list[str]]:
    """``measure_group``, with half the batch as long as it does not fit."""
    while True:
        print(group, flush=True)
        try:
            return measure_group(group, build, rounds, device, budget)
        except RuntimeError as error:
            if not is_out_of_memory(error) or group.batch == 1:
                raise
        print(f"  batches of {group.batch} do not fit", flush=True)
        group = replace(group, batch=group.batch // 2)
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


def step_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [["variant", "ms", "images/s", "step time (quartiles)", "bar", "peak memory, MB", "memory", "bar"]]
    for row in rows:
        peak, ratio = row["peak_memory_mb"], row["memory_ratio"]
        line = [row["variant"], f"{row['step_time']:,.1f}", f"{row['samples_per_sec']:,.0f}"]
        line += [spread(row), bar(row["bar"]), "" if peak is None else f"{peak:,.0f}"]
        lines.append([*line, "" if ratio is None else f"{ratio:.2f} x", bar(row["memory_bar"])])
    return markdown(lines)


# The page


@dataclass
class Report:
    """What was measured, and what was not and why."""

    facts: dict[str, str]
    copy: float = 0.0
    kernels: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Markdown."""
        lines = ["# What connections cost on a GPU", "", *(f"- {key}: {value}" for key, value in self.facts.items())]
        lines += ["", "## Kernels", "", f"A copy moves {self.copy / 1e9:,.1f} GB/s, read and written.", ""]
        lines += kernel_table(self.kernels) if self.kernels else ["No kernel was measured."]
        lines += ["", "## Training steps"]
        for group in dict.fromkeys(row["group"] for row in self.steps):
            lines += ["", f"### {group}", "", *step_table([row for row in self.steps if row["group"] == group])]
        for title, items in (("Skipped", self.skipped), ("Failed", self.failed)):
            lines += ["", f"## {title}", "", *(f"- {item}" for item in items)] if items else []
        return lines

    def write(self, out: Path | None) -> None:
        """The page, and beside it the same as JSON."""
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("\n".join(self.lines()) + "\n")
            out.with_suffix(".json").write_text(json.dumps(vars(self), indent=1) + "\n")


def find_facts(device: str, argv: list[str]) -> dict[str, str]:
    """Hardware and versions."""
    facts = {"hardware": name_device(device)}
    if device != "cpu":
        facts["hardware"] += f", {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
        query = shutil.which("nvidia-smi") and subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        facts["driver"] = (
            f"{query.stdout.split()[0] if query and query.stdout else 'unknown'}, CUDA {torch.version.cuda}"
        )
    packages = {"torch": torch, "timm": timm, "triton": gpu.triton}
    versions = {name: package.__version__ for name, package in packages.items() if package is not None}
    if peer is not None:
        versions["hyper-connections"] = importlib.metadata.version("hyper-connections")
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts["command"] = f"`{shlex.join(['python', 'benchmarks/train_step.py', *argv])}`"
    return facts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the page there, and the same as .json beside it")
    parser.add_argument("--budget", type=float, default=500, help="seconds, after which what remains is skipped")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128, help="images of a ViT; half as many where they do not fit")
    parser.add_argument("--dit-batch", type=int, default=64, help="latents of a DiT, likewise")
    parser.add_argument("--precision", choices=("bf16-mixed", "bf16-true", "32"), default="bf16-mixed")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    parser.add_argument("--whole", action="store_true", help="compile whole models instead of their blocks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that everything runs")
    args = parser.parse_args(argv)
    budget, device = Budget(args.budget), args.device
    if device == "cpu":
        keep_freed_memory()
    elif not torch.cuda.is_available():
        sys.exit("no GPU here: --device cpu --small runs the same code on tiny models")
    report = Report(find_facts(device, sys.argv[1:] if argv is None else argv))
    print("\n".join(f"{key}: {value}" for key, value in report.facts.items()), flush=True)

    missing = gpu.find_obstacle(torch.empty(1, 2, 8, device=device), 1)
    if missing:
        print(f"no kernels here: {missing}", flush=True)
        report.skipped.append(f"kernels: {missing}")
    if peer is None:
        print("hyper-connections is not installed, so that no peer is measured", flush=True)
        report.skipped.append("the peer: hyper-connections is not installed")
    dim, tokens, size = (32, 5, SMALL._replace(depth=2)) if args.small else (768, 128 * 197, Size(768, 12, 2, 197, 2))
    if not missing:
        check(NAMES, dim, tokens, size, device)

    repeats = 1 if args.small else 50
    report.copy = copy_bandwidth(device, 2**12 if args.small else COPY, repeats)
    for dtype in DTYPES if not missing else ():
        for name in NAMES:
            if budget.has_time():
                report.kernels += measure_kernels(name, dim, tokens, dtype, device, repeats, report.copy)
            else:
                report.skipped.append(f"kernels of {name}, {dtype}: no time left")
    report.write(args.out)

    setup = Setup(
        modes=["train"],
        rounds=args.rounds,
        batch_size=args.batch,
        img_size=None,
        num_classes=1000,
        model_args={},
        opt="adamw",
        device=device,
        precision=args.precision,
        compile=False,
        grad_checkpointing=False,
    )

    def build(group: Group, variant: str) -> Step:
        chosen = replace(setup, model_args=TINY[group.base] if args.small else {})
        return build_step(group, variant, chosen, not missing, args.compiler, args.whole)

    batches = (2, 2) if args.small else (args.batch, args.dit_batch)
    for group in find_groups(*batches, args.precision, not missing, peer is not None):
        if not budget.has_time():
            report.skipped.append(f"{group}: no time left")
            continue
        try:
            with torch._dynamo.config.patch(NO_LIMIT):
                rows, left_out = fit_memory(group, build, args.rounds, device, budget)
        except RuntimeError as error:  # the other groups are worth having
            report.failed.append(f"{group}: {str(error).strip().partition(chr(10))[0]}")
            print(report.failed[-1], flush=True)
            continue
        report.steps += rows
        report.skipped += [f"{group}, {variant}: no time left" for variant in left_out]
        report.write(args.out)
    report.facts["took"] = f"{args.budget - budget.left():.0f} s of {args.budget:.0f}"
    report.write(args.out)
    print("\n".join(report.lines()))
    if report.failed:
        sys.exit(f"failed: {len(report.failed)} of the groups of training steps")


if __name__ == "__main__":
    main()
