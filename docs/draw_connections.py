"""Draws what each kind of connection does, as Figure 2 of Hyper-Connections does: docs/figures/NAME.svg.

    python docs/draw_connections.py --root data

Left the coefficients at the start of training, right those of the same sub-layer after a short training of a tiny ViT
on Fashion-MNIST (means over the tokens of 64 images). The width of a line is the size of a coefficient, and red is
negative. The training is too short to be evidence of anything.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import hcvision
from hcvision.data import ImageData

NAMES = ("residual", "shc2", "dhc2", "dhc4", "sfc2", "dfc2", "mhc4", "ihc4", "ghc2x3")
MODEL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
SHOWN = 1  # the attention of the second block, the first sub-layer of it
HERE = Path(__file__).parent / "figures"
POSITIVE, NEGATIVE, INK = "#00798c", "#d1495b", "#444444"
COLUMN, TOP, BOTTOM = 64, 62, 250  # pixels: from stream to stream, and where streams begin and end
BRANCH = 150  # where the branch is


def coefficients(model: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """alpha (S, V+S) and beta (S, V) of the sub-layer that is shown, means over images and tokens."""
    block = model.blocks[SHOWN]
    if not hasattr(block, "connection1"):
        return torch.ones(1, 2), torch.ones(1, 1)  # the residual add
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
        handle.remove()
        alpha, beta = block.connection1.weights(seen[0])
    alpha, beta = (part.flatten(0, alpha.ndim - 3).mean(0) for part in (alpha, beta))  # over images, tokens, channels
    views = alpha.shape[1] - alpha.shape[0]
    if beta.ndim == 1:  # one view for all streams, or a view for each
        beta = beta[:, None] if views == 1 else torch.diag(beta)
    return alpha, beta


def draw(name: str, panels: dict[str, tuple[Tensor, Tensor]]) -> str:
    """The SVG of a connection, a panel for each pair of alpha and beta."""
    streams = next(iter(panels.values()))[0].shape[0]
    views = next(iter(panels.values()))[1].shape[1]
    width = COLUMN * (streams + views) + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(panels)}" height="300" '
        f'viewBox="0 0 {width * len(panels)} 300" font-family="sans-serif" '
        f'font-size="13" role="img" aria-label="{name}: streams, branch and coefficients">',
        f'<rect width="{width * len(panels)}" height="300" fill="white"/>',
    ]
    for number, (title, (alpha, beta)) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({number * width},0)">')
        parts.append(f'<text x="20" y="22" fill="{INK}">{name}, {title}</text>')
        at = [40 + COLUMN * stream for stream in range(streams)]
        view_at = [40 + COLUMN * (streams + view) for view in range(views)]
        for i in range(streams):
            for j in range(streams):
                parts += line(at[i], TOP, at[j], BOTTOM, float(alpha[i, views + j]), i == j)
            for view in range(views):
                parts += line(at[i], TOP, view_at[view], BRANCH - 18, float(alpha[i, view]), False)
                parts += line(view_at[view], BRANCH + 18, at[i], BOTTOM, float(beta[i, view]), False)
        box = f'x="{view_at[0] - 22}" y="{BRANCH - 18}" width="{COLUMN * (views - 1) + 44}" height="36" rx="5"'
        parts.append(f'<rect {box} fill="#f3efe6" stroke="{INK}"/>')
        middle = (view_at[0] + view_at[-1]) / 2
        parts.append(f'<text x="{middle}" y="{BRANCH + 5}" text-anchor="middle" fill="{INK}">branch</text>')
        for stream, x in enumerate(at):
            for y in (TOP, BOTTOM):
                parts.append(f'<circle cx="{x}" cy="{y}" r="11" fill="white" stroke="{INK}"/>')
                parts.append(f'<text x="{x}" y="{y + 4}" text-anchor="middle" fill="{INK}">{stream + 1}</text>')
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def line(x1: float, y1: float, x2: float, y2: float, value: float, labelled: bool) -> list[str]:
    if abs(value) < 0.005:
        return []
    color, width = (POSITIVE if value > 0 else NEGATIVE), min(0.6 + 3.4 * abs(value), 7)
    ends = f'x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
    parts = [f'<line {ends} stroke="{color}" stroke-width="{width:.2f}" stroke-opacity="0.75"/>']
    if labelled:
        parts.append(f'<text x="{x1 + 5}" y="{(y1 + y2) / 2 + 62}" font-size="10" fill="{color}">{value:.2f}</text>')
    return parts


def train(model: torch.nn.Module, loader, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for step, batch in zip(range(steps), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20)
        loss = F.cross_entropy(model(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where Fashion-MNIST is")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--names", nargs="+", default=NAMES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = ImageData(dataset="fashion_mnist", root=options.root, batch_size=64, num_workers=0)
    loader = data.plain_loader("train", (1, 28, 28), number=64 * options.steps)
    images = next(iter(data.plain_loader("val", (1, 28, 28), number=64))).images
    HERE.mkdir(exist_ok=True)
    for name in options.names:
        torch.manual_seed(0)
        model = hcvision.create_model("vit_tiny_patch16_224", connection=name, **MODEL).eval()
        panels = {"at the start": coefficients(model, images)}
        if name != "residual":
            train(model, loader, options.steps)
            panels["after training"] = coefficients(model, images)
        (HERE / f"{name}.svg").write_text(draw(name, panels))
        print(f"written to {HERE / f'{name}.svg'}")


if __name__ == "__main__":
    main()
