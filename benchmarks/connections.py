"""Values first, speed second: what a connection costs in a training step of a ViT-S/16 trunk.

    python benchmarks/connections.py
    python benchmarks/connections.py --variants dhc2 textbook-dhc2 peer-dhc2 --rounds 20 --json dhc2.json
    python benchmarks/connections.py --device cuda --dtype bfloat16 --batch 128

What: one step (forward and backward) of 12 timm blocks of width 384 with 6 heads on 8 x 197 tokens,
entry, exit and final norm included, eager, against the same trunk with residual adds. ``dhc2`` is
this library; ``textbook-dhc2`` the papers' formula, written down with matmul and autograd;
``peer-dhc2`` the package hyper-connections around the same branches, with an RMSNorm.

How: first the library's output and gradients are held against the textbook in float64, with random
connection parameters; where they differ the script says so and exits with 1. Then the variants take
turns in one process, a step each per round, in an order that changes. A ratio is a step's time over
that of the residual step of the same round; the table has their quartiles. Saved activations are the
bytes that autograd keeps for backward, parameters aside: the same on every machine. CUDA adds
milliseconds and the peak memory of a step.
"""

import argparse
import copy
import gc
import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision import convert
from hcvision.connections import HyperConnection, StreamConnection, parse_connection

try:
    import hyper_connections as peer
except ImportError:
    peer = None

DEFAULTS = ["dfc4", "dhc2", "dhc4", "shc2"]
DEFAULTS += [f"{form}-{name}" for form in ("textbook", "peer") for name in ("dfc4", "dhc2", "dhc4")]
TOLERANCE = 1e-10


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
        x = self.norm_pre(tokens).repeat(1, 1, self.copies)
        for connection, branch in zip(self.connections, self.branches, strict=True):
            x = self.connect(connection, x, branch)
        return self.norm(x.unflatten(-1, (self.copies, -1)).mean(-2))

    def connect(self, c: StreamConnection, x: Tensor, branch: nn.Module) -> Tensor:
        h = x.unflatten(-1, (c.streams, c.stream_dim))
        alpha, beta = c.static_alpha, c.static_beta
        if c.dynamic:
            shape, hyper = (c.stream_dim,), isinstance(c, HyperConnection)
            normed = F.layer_norm(h, shape, eps=1e-6) if hyper else F.rms_norm(h, shape, c.norm_weight, 1e-6)
            alpha = alpha + c.dynamic_alpha_scale * torch.tanh(normed @ c.dynamic_alpha_fn)
            beta = beta + c.dynamic_beta_scale * torch.tanh(normed @ c.dynamic_beta_fn).squeeze(-1)
        views, carried = (alpha.mT @ h).split((c.views, c.streams), dim=-2)
        output = branch(views.flatten(-2)).unflatten(-1, (c.views, c.stream_dim))
        return (beta[..., None] * output + carried).flatten(-2)


def library_trunk(model: VisionTransformer) -> nn.Module:
    return nn.Sequential(model.norm_pre, model.blocks, model.norm)


def build_trunk(variant: str, model: VisionTransformer) -> nn.Module:
    """``residual``, ``dhc2``, ``textbook-dhc2`` or ``peer-dhc2`` around copies of the model's weights."""
    form, _, name = variant.rpartition("-")
    model = copy.deepcopy(model)
    if form != "peer":
        converted = convert(copy.deepcopy(model), name)
        return Textbook(model, converted) if form == "textbook" else library_trunk(converted)
    return nn.Sequential(model.norm_pre, peer_blocks(model, name), model.norm)


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


def check_values(name: str, size: Size) -> float:
    """The library's largest relative difference from the textbook, in float64 with random connections.

    Compared are the output and the gradients of the input and of every connection parameter.
    """
    model = build_model(size).double()
    converted = convert(copy.deepcopy(model), name)
    textbook = Textbook(model, converted)
    parameters = list(textbook.connections.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randn(size.batch, size.tokens, size.dim, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(tokens)
    outputs = library_trunk(converted)(tokens), textbook(tokens)
    ours, theirs = ((y, *torch.autograd.grad(y, [tokens, *parameters], direction)) for y in outputs)
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]).max().item()


def saved_bytes(trunk: nn.Module, tokens: Tensor) -> int:
    """Bytes of the storages that autograd keeps for backward, each once, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in trunk.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trunk(tokens)
    return sum(storage.nbytes() for storage in kept.values())


def step(trunk: nn.Module, tokens: Tensor, direction: Tensor) -> tuple[float, int]:
    """Seconds of one forward and backward, and on CUDA the bytes it allocates at its peak."""
    gc.collect()
    if not tokens.is_cuda:
        began = time.perf_counter()
        trunk(tokens).backward(direction)
        return time.perf_counter() - began, 0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start.record()
    trunk(tokens).backward(direction)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def measure(variants: list[str], rounds: int, size: Size, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per variant, the residual first."""
    model = build_model(size)
    trunks = {variant: build_trunk(variant, model).to(device, dtype) for variant in ("residual", *variants)}
    tokens, direction = (torch.randn(size.batch, size.tokens, size.dim).to(device, dtype) for _ in range(2))
    tokens.requires_grad_()
    saved = {variant: saved_bytes(trunk, tokens) for variant, trunk in trunks.items()}
    parameters = {variant: sum(p.numel() for p in trunk.parameters()) for variant, trunk in trunks.items()}

    order, steps = list(trunks), {variant: [] for variant in trunks}
    for number in range(1 + rounds):  # the first one warms up
        for variant in order if number % 2 else reversed(order):
            taken = step(trunks[variant], tokens, direction)
            trunks[variant].zero_grad()
            tokens.grad = None
            if number > 0:
                steps[variant].append(taken)
        order = order[3:] + order[:3]

    rows = []
    for variant in trunks:
        ratios = [s / r for (s, _), (r, _) in zip(steps[variant], steps["residual"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
        row = {"variant": variant, "time": median, "low": low, "high": high}
        row["saved"] = saved[variant] / saved["residual"]
        row["parameters"] = parameters[variant] - parameters["residual"]
        if device == "cuda":
            row["ms"] = statistics.median(s for s, _ in steps[variant]) * 1e3
            row["peak_mib"] = max(peak for _, peak in steps[variant]) / 2**20
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    cuda = "ms" in rows[0]
    lines = [f"{'variant':<14}{'step time':>10}   {'quartiles':<12}{'saved activations':>18}{'extra parameters':>18}"]
    lines[0] += f"{'ms':>10}{'peak MiB':>10}" if cuda else ""
    for row in rows:
        line = "{variant:<14}{time:>9.2f}x   {low:.2f} - {high:.2f} {saved:>17.2f}x{parameters:>18,}".format(**row)
        lines.append(line + ("{ms:>10.2f}{peak_mib:>10.0f}".format(**row) if cuda else ""))
    return "\n".join(lines)


def variant_name(text: str) -> str:
    if not re.fullmatch(r"((textbook-)?[sd]|peer-d)[hf]c[1-9]\d*", text):
        raise ValueError(text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", type=variant_name, default=DEFAULTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=FULL.batch)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    for name in dict.fromkeys(variant.rpartition("-")[2] for variant in args.variants):
        difference = check_values(name, SMALL)
        if not difference <= TOLERANCE:
            sys.exit(f"{name} is wrong: {difference:.1e} from the textbook in float64, {TOLERANCE:.0e} is allowed")
        print(f"{name} equals the textbook in float64: {difference:.0e}")
    if peer is None:
        print("hyper-connections is not installed, so that no peer is measured")
    variants = [variant for variant in args.variants if peer or not variant.startswith("peer-")]
    rows = measure(variants, args.rounds, FULL._replace(batch=args.batch), args.device, getattr(torch, args.dtype))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({**vars(args), "json": str(args.json), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
