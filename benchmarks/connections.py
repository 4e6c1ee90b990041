"""Values first, speed second: what a connection costs in a training step of a ViT-S/16 trunk.

    python benchmarks/connections.py
    python benchmarks/connections.py --variants dhc2 textbook-dhc2 peer-dhc2 --rounds 20 --json dhc2.json
    python benchmarks/connections.py --variants dfc4 dhc2 dhc4 --compile
    python benchmarks/connections.py --variants mhc4 ihc4 ghc2x3
    python benchmarks/connections.py --variants sihc4 gr4 oru laurel mhclite2 krom4
    python benchmarks/connections.py --device cuda --dtype bfloat16 --batch 128

What: one step (forward and backward) of 12 timm blocks of width 384 with 6 heads on 8 x 197 tokens,
entry, exit and final norm included, eager, against the same trunk with residual adds. ``dhc2`` is
this library; ``recompute-dhc2`` the same with ``convert(..., recompute=4)``; ``torch-dhc2`` the same without
kernels; ``textbook-dhc2`` the papers' formula, written down with matmul and autograd; ``peer-dhc2`` the package
hyper-connections around the same branches, with an RMSNorm. ``--compile`` adds each trunk through torch.compile: its
step against the compiled residual trunk and against its own eager step, and what the compiled graph keeps for
backward. Compiling takes a minute or more per trunk.

How: first the library's output and gradients are held against the textbook in float64, and those of its kernels in
float32, with random connection parameters; where they differ the script says so and exits with 1. Then the
variants take turns in one process, a step each per round, in an order that changes. A ratio is a step's time over
that of the residual step of the same round; the table has their quartiles. Saved activations are the
bytes that live at the end of the forward pass and did not before, by whatever means they are kept,
parameters aside: the same on every machine. CUDA adds milliseconds and the peak memory of a step.
"""

import argparse
import copy
import gc
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision import convert
from hcvision.connections import (
    ITERATIONS,
    GeneralizedConnection,
    HyperConnection,
    ManifoldConnection,
    StreamConnection,
    parse_connection,
)
from hcvision.data import markdown
from hcvision.studies import Step, TensorMemory, compare_step, interleaved_times, keep_freed_memory, peak_memory

try:
    import hyper_connections as peer
except ImportError:
    peer = None

DEFAULTS = ["dfc4", "dhc2", "dhc4", "shc2", "recompute-dhc4"]
DEFAULTS += [f"{form}-{name}" for form in ("textbook", "peer") for name in ("dfc4", "dhc2", "dhc4")]
TOLERANCE = 1e-10
MORE_OF_A_TRUNK = 1e-3  # of the largest value, in float32: random connections in a row make much of a small error
RECOMPUTE = 4  # blocks whose streams are computed again together, in the form ``recompute``
COMPILED = ("compiled", "compiled_to_eager")
NO_LIMIT = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}  # or the ninth trunk runs eager, unnoticed
BARS = {  # at most so much of the residual trunk's time, on a CPU, and of its saved activations
    "dfc4": (1.06, 1.28),
    "dhc2": (1.10, 1.40),
    "dhc4": (1.20, 1.68),
    "recompute-dhc4": (None, 1.25),
}


class Size(NamedTuple):
    dim: int
    heads: int
    depth: int
    tokens: int
    batch: int


FULL, SMALL = Size(384, 6, 12, 197, 8), Size(32, 2, 3, 5, 2)


def build_model(size: Size) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(embed_dim=size.dim, depth=size.depth, num_heads=size.heads, num_classes=0)


def branches(model: VisionTransformer) -> list[nn.Module]:
    """The sub-layers without their residual adds: attention, MLP, attention, ..."""
    pairs = [((b.norm1, b.attn, b.ls1, b.drop_path1), (b.norm2, b.mlp, b.ls2, b.drop_path2)) for b in model.blocks]
    return [nn.Sequential(*branch) for pair in pairs for branch in pair]


class Textbook(nn.Module):
    """The trunk of a residual model with the papers' formulas, on the parameters of the converted model."""

    def __init__(self, model: VisionTransformer, converted: nn.Module):
        super().__init__()
        self.norm_pre, self.norm, self.copies = model.norm_pre, model.norm, converted.blocks[0].entry_rate
        self.connections = nn.ModuleList(c for c in converted.modules() if isinstance(c, StreamConnection))
        self.branches = nn.ModuleList(branches(model))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm_pre(tokens).repeat(1, 1, self.copies)[..., : self.connections[0].width]
        for connection, branch in zip(self.connections, self.branches, strict=True):
            x = self.connect(connection, x, branch)
        if self.connections[-1].has_exit:
            return self.norm(self.connections[-1].exit(x))
        return self.norm(x.unflatten(-1, (self.copies, -1)).mean(-2))

    def connect(self, c: StreamConnection, x: Tensor, branch: nn.Module) -> Tensor:
        h = x.unflatten(-1, (c.streams, c.stream_dim))
        rival = RIVALS.get(parse_connection(c.name)[0])
        if rival is not None:
            return rival(c, h, branch).flatten(-2)
        alpha, beta = (manifold_weights if isinstance(c, ManifoldConnection) else mixing_weights)(c, h)
        views, carried = (alpha.mT @ h).split((c.views, c.streams), dim=-2)
        output = branch(views.flatten(-2)).unflatten(-1, (c.views, c.stream_dim))
        written = beta @ output if beta.dim() == h.dim() else beta[..., None] * output
        return (written + carried).flatten(-2)


def mixing_weights(c: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """HC eq. 10-14, FC eq. 8-12, VWN eq. 13-14."""
    alpha, beta = c.static_alpha, c.static_beta
    if c.dynamic:
        shape, general = (c.stream_dim,), isinstance(c, GeneralizedConnection)
        hyper, root = isinstance(c, HyperConnection), c.stream_dim**0.5 if general else 1.0
        normed = F.layer_norm(h, shape, eps=1e-6) if hyper else F.rms_norm(h, shape, c.norm_weight, 1e-6)
        alpha = alpha + c.dynamic_alpha_scale * torch.tanh(normed @ c.dynamic_alpha_fn / root)
        dynamic = torch.tanh(normed @ c.dynamic_beta_fn / root)
        beta = beta + c.dynamic_beta_scale * (dynamic if general else dynamic.squeeze(-1))
    return alpha, beta


def manifold_weights(c: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """mHC eq. 7-9."""
    x = F.rms_norm(h.flatten(-2), (c.width,), eps=1e-6)
    read = torch.sigmoid(c.scale_pre * (x @ c.phi_pre) + c.bias_pre)
    write = 2 * torch.sigmoid(c.scale_post * (x @ c.phi_post) + c.bias_post)
    mixing = torch.eye(c.streams, dtype=h.dtype, device=h.device).expand(*read.shape, -1)
    if c.mixes:
        mixing = MIXINGS[parse_connection(c.name)[0]](c.scale_res * (x @ c.phi_res) + c.bias_res, c.streams)
    return torch.cat([read[..., None], mixing.mT], dim=-1), write


def sinkhorn(logits: Tensor, count: int) -> Tensor:
    mixing = logits.unflatten(-1, (count, count)).exp()
    for _ in range(ITERATIONS):
        for dim in (-2, -1):
            mixing = mixing / mixing.sum(dim, keepdim=True)
    return mixing


def mix_permutations(logits: Tensor, count: int) -> Tensor:
    """mHC-lite."""
    eye = torch.eye(count, dtype=logits.dtype, device=logits.device)
    matrices = torch.stack([eye[list(order)] for order in itertools.permutations(range(count))])
    return torch.einsum("...r,rij->...ij", logits.softmax(-1), matrices)


def mix_factors(logits: Tensor, count: int) -> Tensor:
    """KromHC, eq. 10 and 14."""
    weights = logits.unflatten(-1, (-1, 2)).softmax(-1)
    product = weights.new_ones(*weights.shape[:-2], 1, 1)
    for pair in weights.unbind(-2):
        factor = torch.stack([pair, pair.flip(-1)], dim=-2)
        product = torch.einsum("...ab,...cd->...acbd", product, factor).flatten(-2).flatten(-3, -2)
    return product


MIXINGS = {"mhc": sinkhorn, "mhclite": mix_permutations, "krom": mix_factors}


def channelwise(c: Any, h: Tensor, branch: nn.Module) -> Tensor:
    """SiHC."""
    return h + c.write_weight * branch((c.read_weight * h).sum(-2))[..., None, :]


def gated(c: Any, h: Tensor, branch: nn.Module) -> Tensor:
    """GR, eq. 30-34."""
    normed = F.rms_norm(h, (c.dim,), eps=1e-6).flatten(-2)
    gates = 2 * torch.sigmoid(F.silu(normed @ c.gate_down.mT / c.streams) @ c.gate_up.mT)
    output = branch((c.gain * gates.unflatten(-1, (c.streams, c.dim)) * h).sum(-2))
    return h + 2 * torch.sigmoid(normed @ c.write_fn.mT / c.streams)[..., None] * output[..., None, :]


def orthogonal(c: Any, h: Tensor, branch: nn.Module) -> Tensor:
    """ORU."""
    output = branch(h.squeeze(-2))[..., None, :]
    return h + output - (h * output).sum(-1, keepdim=True) / (h.square().sum(-1, keepdim=True) + 1e-6) * h


def laurel(c: Any, h: Tensor, branch: nn.Module) -> Tensor:
    """LAuReL, eq. 5."""
    alpha, beta = 2 * torch.sigmoid(c.logit_alpha), 2 * torch.sigmoid(c.logit_beta)
    return alpha * branch(h.squeeze(-2))[..., None, :] + beta * (h @ c.low_rank_a.mT @ c.low_rank_b.mT + h)


RIVALS: dict[str, Callable[[Any, Tensor, nn.Module], Tensor]] = {
    "sihc": channelwise,
    "gr": gated,
    "oru": orthogonal,
    "laurel": laurel,
}


def library_trunk(model: VisionTransformer) -> nn.Module:
    return nn.Sequential(model.norm_pre, model.blocks, model.norm)


def build_trunk(variant: str, model: VisionTransformer) -> nn.Module:
    """``residual``, ``dhc2`` or a form of it, such as ``textbook-dhc2``, around copies of the weights."""
    form, _, name = variant.rpartition("-")
    model = copy.deepcopy(model)
    if form == "peer":
        return nn.Sequential(model.norm_pre, peer_blocks(model, name), model.norm)
    backend = {"backend": "torch"} if form == "torch" else {}
    converted = convert(copy.deepcopy(model), name, recompute=RECOMPUTE if form == "recompute" else 0, **backend)
    return Textbook(model, converted) if form == "textbook" else library_trunk(converted)


def peer_blocks(model: VisionTransformer, name: str) -> nn.Sequential:
    """The blocks of a ViT with the connections of the package hyper-connections.

    Raises:
        ValueError: the package is not installed, or has no such connection.
    """
    kind, rate = parse_connection(name)
    if peer is None or kind not in ("dhc", "dfc"):
        missing = "is not installed" if peer is None else f"has dynamic connections only, not {name}"
        raise ValueError(f"hyper-connections {missing}")
    rates = {"num_streams": rate} if kind == "dhc" else {"num_streams": 1, "num_fracs": rate}
    connect, enter, leave = peer.get_init_and_expand_reduce_stream_functions(dim=model.embed_dim, **rates)
    sublayers = [connect(branch=branch, layer_index=k) for k, branch in enumerate(branches(model))]
    return nn.Sequential(enter, *sublayers, leave)


def randomize(parameters: list[nn.Parameter]) -> None:
    """Away from the residual add, where much of what could be wrong is multiplied by zero."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


def connection_parameters(trunk: nn.Module) -> list[nn.Parameter]:
    return [p for module in trunk.modules() if isinstance(module, StreamConnection) for p in module.parameters()]


def results(trunk: nn.Module, tokens: Tensor, direction: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of every connection parameter."""
    output = trunk(tokens)
    return [output, *torch.autograd.grad(output, [tokens, *connection_parameters(trunk)], direction)]


def excess(ours: Tensor, theirs: Tensor, exact: Tensor, more: float) -> float:
    """How wrong ours is beside what is allowed: twice as wrong as theirs, and more, of the largest value."""
    exact = exact.double()
    allowed = 2 * (theirs.double() - exact).abs().max() + more * exact.abs().max()
    return ((ours.double() - exact).abs().max() / allowed).item()


def worse(one: float, other: float) -> float:
    """The larger number, and NaN is larger than any."""
    return one if math.isnan(one) or one >= other else other


def both_trunks(variant: str, size: Size, dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    """``results`` of the library and of the textbook, randomised, the same in every dtype.

    Recomputation goes two blocks far here, which makes two runs of them in a small trunk.
    """
    form, _, name = variant.rpartition("-")
    model = build_model(size).double()
    backend = {"backend": "torch"} if form == "torch" else {}
    converted = convert(copy.deepcopy(model), name, recompute=2 if form == "recompute" else 0, **backend)
    randomize(connection_parameters(converted))
    tokens = torch.randn(size.batch, size.tokens, size.dim, dtype=torch.float64)
    tokens, direction = (t.to(device, dtype) for t in (tokens, torch.randn_like(tokens)))
    trunks = library_trunk(converted), Textbook(model, converted)
    return [results(trunk.to(device, dtype), tokens.clone().requires_grad_(), direction) for trunk in trunks]


def check_float32(variant: str, size: Size, device: str) -> float:
    """How wrong the library is in float32, where it may run as kernels; 1 is as much as is allowed."""
    exact = both_trunks(variant, size, torch.float64, device)[1]
    found = 0.0
    for tensors in zip(*both_trunks(variant, size, torch.float32, device), exact, strict=True):
        if not tensors[-1].abs().max() < 1e-6:  # gradients of zero in mHC
            found = worse(found, excess(*tensors, MORE_OF_A_TRUNK))
    return found


def check_values(variant: str, size: Size) -> float:
    """The largest relative difference of the library's ``results`` from the textbook's, in float64."""
    ours, theirs = both_trunks(variant, size, torch.float64, "cpu")
    # mixing equal streams, or the mean of mixed ones, has gradients of zero in mHC
    scales = [b.abs().max().clamp(min=1e-6) for b in theirs]
    return max(((a - b).abs().max() / s).item() for a, b, s in zip(ours, theirs, scales, strict=True))


def saved_bytes(trunk: nn.Module, tokens: Tensor) -> int:
    """Bytes that live at the end of the forward pass for the sake of backward, without parameters and output.

    The input counts where it is kept. Nothing is asked of autograd: what a closure or a module holds counts too.
    """
    with TensorMemory() as memory:
        for tensor in (tokens, *trunk.parameters()):
            tensor.detach()  # seen
        before = memory.now
        graph = trunk(tokens.clone()).grad_fn
        kept = memory.now - before
        del graph
    return kept


def compiled_bytes(run: Callable[[Tensor], Tensor], trunk: nn.Module, tokens: Tensor) -> int | None:
    """``saved_bytes`` of a compiled trunk, from the graph itself; None where it is not one graph."""
    output = run(tokens.clone())
    function: Any = output.grad_fn
    if {type(node).__name__ for node, _ in function.next_functions if node} - {"AccumulateGrad", "CloneBackward0"}:
        return None
    others = {tensor.untyped_storage().data_ptr() for tensor in (output, *trunk.parameters())}
    storages = {storage.data_ptr(): storage for storage in (t.untyped_storage() for t in function.saved_tensors)}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in others)


def training_step(run: Callable[[Tensor], Tensor], trunk: nn.Module, tokens: Tensor, direction: Tensor) -> Step:
    """Forward and backward through ``run``, which has the parameters of the trunk, as a function."""

    def step() -> None:
        run(tokens).backward(direction)
        trunk.zero_grad()
        tokens.grad = None

    return step


def measure(
    variants: list[str], rounds: int, size: Size, device: str, dtype: torch.dtype, compiler: str | None = None
) -> list[dict[str, Any]]:
    """One row per variant, the residual first; with a compiler, of the compiled trunks too."""
    model = build_model(size)
    trunks = {variant: build_trunk(variant, model).to(device, dtype) for variant in ("residual", *variants)}
    tokens, direction = (torch.randn(size.batch, size.tokens, size.dim).to(device, dtype) for _ in range(2))
    tokens.requires_grad_()
    saved = {variant: saved_bytes(trunk, tokens) for variant, trunk in trunks.items()}
    parameters = {variant: sum(p.numel() for p in trunk.parameters()) for variant, trunk in trunks.items()}
    steps = {(variant, False): training_step(trunk, trunk, tokens, direction) for variant, trunk in trunks.items()}
    kept: dict[str, int | None] = {}
    for variant, trunk in trunks.items() if compiler else ():
        compiled = torch.compile(trunk, dynamic=False, backend=compiler)
        kept[variant] = compiled_bytes(compiled, trunk, tokens)
        steps[variant, True] = training_step(compiled, trunk, tokens, direction)
    peaks = {}
    if device == "cuda":
        for key, step in steps.items():
            step()  # libraries allocate, the compiler works
            before = torch.cuda.memory_allocated()
            peaks[key] = peak_memory(step, device) - before
    gc.collect()
    gc.freeze()  # so that garbage is collected between steps, and in no time
    times = interleaved_times(steps, rounds, device, gc.collect)
    gc.unfreeze()

    rows = []
    for variant in trunks:
        row = {"variant": variant, **beside(times, (variant, False), ("residual", False))}
        row["saved"] = saved[variant] / saved["residual"]
        row["parameters"] = parameters[variant] - parameters["residual"]
        if (variant, True) in steps:
            row["compiled"] = beside(times, (variant, True), ("residual", True))
            row["compiled_to_eager"] = beside(times, (variant, True), (variant, False))
            whole = kept["residual"] and kept[variant]
            row["compiled_saved"] = whole and whole / kept["residual"]
        if device == "cuda":
            row["ms"] = statistics.median(times[variant, False]) * 1e3
            row["peak_mib"] = peaks[variant, False] / 2**20
        rows.append(row)
    return rows


def beside(times: dict[Any, list[float]], one: Any, other: Any) -> dict[str, Any]:
    """The ratio of two of the steps that took turns, and its quartiles."""
    return {
        key: value for key, value in compare_step(times[one], times[other], None, None).items() if value is not None
    }


def spread(row: dict[str, Any]) -> str:
    """1.07 x (1.06 - 1.08)"""
    return "{ratio:.2f} x ({ratio_q1:.2f} - {ratio_q3:.2f})".format_map(row)


def bar(most: float | None) -> str:
    return "" if most is None else f"≤ {most:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    cuda, compiled = "ms" in rows[0], "compiled" in rows[0]
    header = ["variant", "step time (quartiles)", "saved activations", "extra parameters"]
    header[2:2], header[4:4] = ([] if cuda else ["bar"]), ["bar"]
    header += ["compiled (quartiles)", "compiled / eager", "compiled, saved"] if compiled else []
    header += ["ms", "peak MiB"] if cuda else []
    lines = [header]
    for row in rows:
        time_bar, saved_bar = map(bar, BARS.get(row["variant"], (None, None)))
        line = [row["variant"], spread(row), *([] if cuda else [time_bar])]
        line += [f"{row['saved']:.2f} x", saved_bar, f"{row['parameters']:,}"]
        if compiled:
            line += [spread(row[key]) for key in COMPILED]
            line.append(f"{row['compiled_saved']:.2f} x" if row["compiled_saved"] else "")
        line += [f"{row['ms']:.2f}", f"{row['peak_mib']:.0f}"] if cuda else []
        lines.append(line)
    return "\n".join(markdown(lines))


def variant_name(text: str) -> str:
    form, _, name = text.rpartition("-")
    kind, _ = parse_connection(name)
    if kind == "residual" or form not in ("", "torch", "textbook", "recompute", "peer"):
        raise ValueError(text)
    if form == "peer" and kind not in ("dhc", "dfc"):
        raise ValueError(text)
    return text


def library_form(variant: str) -> str:
    """What of the library goes with a variant: ``recompute-dhc4`` itself, ``dhc4`` for every other form of it."""
    return variant if variant.startswith(("recompute-", "torch-")) else variant.rpartition("-")[2]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", type=variant_name, default=DEFAULTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=FULL.batch)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="measure compiled trunks too (by inductor)"
    )
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        keep_freed_memory()

    for name in dict.fromkeys(map(library_form, args.variants)):
        difference = check_values(name, SMALL)
        if not difference <= TOLERANCE:
            sys.exit(f"{name} is wrong: {difference:.1e} from the textbook in float64, {TOLERANCE:.0e} is allowed")
        wrong = check_float32(name, SMALL, args.device)
        if not wrong <= 1:
            sys.exit(f"{name} is wrong: in float32 {wrong:.2g} times as far from float64 as is allowed")
        print(f"{name} equals the textbook in float64: {difference:.0e}; float32 at {wrong:.2f} of what is allowed")
    if peer is None:
        print("hyper-connections is not installed, so that no peer is measured")
    variants = [variant for variant in args.variants if peer or not variant.startswith("peer-")]
    size = FULL._replace(batch=args.batch)
    with torch._dynamo.config.patch(NO_LIMIT):
        rows = measure(variants, args.rounds, size, args.device, getattr(torch, args.dtype), args.compile)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": str(args.json), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
