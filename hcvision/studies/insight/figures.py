"""Pictures of an inspection."""

from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hcvision.studies.evaluation import plain
from hcvision.studies.insight.notes import StageNotes
from hcvision.studies.insight.tables import GAINS, class_means, mixing_matrices

OURS, TWIN = "#00798c", "#444444"
COLORS = ("#00798c", "#d1495b", "#edae49", "#66a182", "#8d5b9e", "#2e4057", "#e07a1f", "#5fa8d3")
STYLE: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def color_labels(axes: Any, which: str, names: list[str]) -> None:
    """Tell attention from MLP by colour."""
    for label, name in zip(getattr(axes, f"get_{which}ticklabels")(), names, strict=True):
        label.set_color("#d1495b" if name.startswith("attention") else "#00798c" if name.startswith("MLP") else "black")


def draw_matrix(mean: Tensor, spread: Tensor | None, names: list[str]) -> Figure:
    """The unfolded connection matrix, and how it varies over images: rows are inputs, columns outputs."""
    size = len(mean)
    panels = [(mean, "mean over tokens and images", True)]
    if spread is not None:
        panels.append((spread, "standard deviation over images", False))
    with matplotlib.rc_context({**STYLE, "font.size": 11 if size <= 26 else 8}):
        side = min(3.2 + 0.22 * size, 9)
        figure = Figure(figsize=(side * len(panels), side), layout="constrained")
        for axes, (values, title, signed) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw_heat(figure, axes, values, signed)
            axes.set_title(title, fontsize=11)
            inputs, sources = [*names, "read-out"], ["embedding", *names]
            small = {"fontsize": 11 if size <= 26 else 5}
            axes.set_xticks(range(size), sources, rotation=90, **small)
            axes.set_yticks(range(size), inputs, **small)
            color_labels(axes, "x", sources)
            color_labels(axes, "y", inputs)
            axes.set_xlabel("output of")
        figure.axes[0].set_ylabel("input of")
        return figure


def draw_heat(figure: Figure, axes: Any, values: Tensor, signed: bool, block: int = 1) -> None:
    """A lower triangle; the rest stays white. Signed values are red below and blue above zero."""
    size = len(values) // block
    below = torch.ones(size, size).tril().repeat_interleave(block, 0).repeat_interleave(block, 1).bool()
    top = max(float(values[below].abs().max()), 1e-12)
    shown = values.masked_fill(~below, float("nan")).numpy()
    scale = {"cmap": "RdBu", "vmin": -top, "vmax": top} if signed else {"cmap": "Greys", "vmin": 0, "vmax": top}
    picture = axes.imshow(shown, **scale, interpolation="none")
    axes.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, shrink=0.6)
    digits = 2 if top >= 0.1 else 3
    if len(values) <= 18:  # there is room to read them
        for row, column in below.nonzero().tolist():
            value = float(values[row, column])
            color = "white" if abs(value) > 0.6 * top else "black"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=color, fontsize=7)


def draw_fractions(fractions: Tensor, names: list[str]) -> Figure:
    """The matrix with every entry cut into its fractions: input fractions down, output fractions across."""
    rows, parts = fractions.shape[:2]
    with matplotlib.rc_context({**STYLE, "font.size": 11 if rows <= 26 else 8}):
        side = min(3.6 + 0.3 * rows, 11)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        draw_heat(figure, axes, fractions.reshape(rows * parts, rows * parts), signed=True, block=parts)
        middles = [parts * k + (parts - 1) / 2 for k in range(rows)]
        axes.set_xticks(middles, ["embedding", *names], rotation=90)
        axes.set_yticks(middles, [*names, "read-out"])
        color_labels(axes, "x", ["embedding", *names])
        color_labels(axes, "y", [*names, "read-out"])
        for k in range(1, rows):
            axes.axhline(parts * k - 0.5, color="white", linewidth=1.2)
            axes.axvline(parts * k - 0.5, color="white", linewidth=1.2)
        axes.set_xlabel(f"output of, {parts} fractions each")
        axes.set_ylabel("input of")
        return figure


def draw_similarity(stage: StageNotes, twin: StageNotes | None) -> Figure:
    """Median and 5 to 95 % of the cosine between the inputs of successive sub-layers (HC fig. 3)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(8, 1.5 + 0.24 * len(stage.names)), 4), layout="constrained")
        axes = figure.subplots()
        looked = [(stage, OURS, "with connections")] + ([(twin, TWIN, "residual twin")] if twin else [])
        for notes, color, label in looked:
            low, median, high = notes.similarity().T.tolist()
            axes.plot(range(1, len(median) + 1), median, color=color, marker="o", label=label)
            axes.fill_between(range(1, len(median) + 1), low, high, color=color, alpha=0.15)
        axes.set_xticks(range(1, len(stage.names)), stage.names[1:], rotation=90)
        color_labels(axes, "x", stage.names[1:])
        axes.set_ylabel("cosine to the input before")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return figure


def draw_streams(stage: StageNotes) -> Figure:
    """The norm of each stream over depth, how alike two streams are, and how many directions all point to."""
    rows = stage.stream_rows()
    places = [*stage.names, "end"]
    part = stage.part
    shared = {
        f"mean cosine between two {part}s": {row["before"]: row[f"cosine between {part}s"] for row in rows},
        f"effective rank of the {part}s": {row["before"]: row["effective rank"] for row in rows},
    }
    shared = {label: values for label, values in shared.items() if any(v is not None for v in values.values())}
    panels = 1 + len(shared)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5, 1.5 + 0.24 * len(places)) * panels, 4), layout="constrained")
        norms, *rest = figure.subplots(1, panels, squeeze=False)[0]
        count = 1 + max(row[part] for row in rows)
        many = matplotlib.colormaps["viridis"].resampled(count)  # a history has an entry for each sub-layer
        for stream in range(count):
            points = [(places.index(r["before"]), r["norm"]) for r in rows if r[part] == stream]
            color = COLORS[stream] if count <= len(COLORS) else many(stream)
            norms.plot(*zip(*points, strict=True), marker=".", color=color, label=f"{part} {stream}")
        norms.set_ylabel(f"mean norm of a {part}")
        norms.set_ylim(bottom=0)
        norms.legend(frameon=False, ncols=-(-count // 8), fontsize="xx-small" if count > 8 else None)
        for axes, (label, values) in zip(rest, shared.items(), strict=True):
            known = [(places.index(place), value) for place, value in values.items() if value is not None]
            axes.plot(*zip(*known, strict=True), marker=".", color=OURS)
            axes.set_ylabel(label)
            if "cosine" in label:
                axes.set_ylim(min(0.0, *(value for _, value in known)) - 0.02, 1.02)
            else:
                axes.set_ylim(0.95, len({row[part] for row in rows}) + 0.05)
        for axes in (norms, *rest):
            axes.set_xticks(range(len(places)), places, rotation=90)
            color_labels(axes, "x", places)
            axes.grid(alpha=0.25)
        return figure


def draw_mixing(stage: StageNotes) -> Figure:
    """The mixing matrix of each sub-layer, the product of those so far, and what both can gain."""
    own = [mixing_matrices(stage, k).mean(0) for k in range(len(stage.names))]
    products = [torch.cat(parts).mean(0) for parts in stage.products]
    size, count = len(own[0]), len(own)
    with matplotlib.rc_context(STYLE):
        width = min(max(7.0, 2.0 + 0.16 * (size + 1) * count), 16)
        figure = Figure(figsize=(width, 7), layout="constrained")
        *strips, lines = figure.subplots(3, 1, height_ratios=(1, 1, 1.2))
        titles = (
            f"mixing matrix of each sub-layer: rows are the next {stage.part}s",
            "their product from the first on",
        )
        middles = [k * (size + 1) + (size - 1) / 2 for k in range(count)]
        for axes, title, matrices in zip(strips, titles, (own, products), strict=True):
            gap = torch.full((size, 1), float("nan"))
            strip = torch.cat([part for matrix in matrices for part in (matrix, gap)], dim=1)[:, :-1]
            top = float(strip[~strip.isnan()].abs().max())
            picture = axes.imshow(strip.numpy(), cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="none")
            figure.colorbar(picture, ax=axes, shrink=0.9)
            axes.set_title(title, fontsize=11)
            axes.set_xticks(middles, [""] * count)
            axes.set_yticks(range(size))
            axes.spines[:].set_visible(False)
        values = torch.stack([torch.cat(gains).mean(0) for gains in stage.gains]).T.tolist()
        for (name, points), color, style in zip(
            zip(GAINS, values, strict=True), (OURS, "#d1495b") * 2, ("--", "--", "-", "-"), strict=True
        ):
            lines.plot(middles, points, style, color=color, marker=".", label=name)
        lines.set_xlim(strips[0].get_xlim())
        lines.set_ylabel("largest row or column sum")
        lines.set_xticks(middles, stage.names, rotation=90)
        color_labels(lines, "x", stage.names)
        lines.grid(alpha=0.25)
        lines.legend(frameon=False, ncols=2)
        return figure


def draw_classes(stage: StageNotes, labels: Tensor, classes: list[str]) -> Figure:
    """How the weights of each class differ from the mean over classes: what is written, and what is read."""
    panels: dict[str, list[Tensor]] = {"what streams take of an output (beta)": [], "what a branch reads (alpha)": []}
    places: list[str] = []
    for k, name in enumerate(stage.names):
        alpha = stage.alphas[k][0]
        streams, mixtures = alpha.shape[1:]
        means = class_means(stage, k, labels)
        deviation = (means - means.mean(0)).float()
        reads = deviation[:, : streams * mixtures].unflatten(1, (streams, mixtures))[..., : mixtures - streams]
        views = range(mixtures - streams)
        own = torch.stack([reads[:, s, s % len(views)] for s in range(streams)], dim=1)  # FC: of its own fraction
        written = deviation[:, streams * mixtures :]
        if stage.betas[k][0].dim() == alpha.dim():
            written = torch.stack([written[:, s * len(views) + s % len(views)] for s in range(streams)], dim=1)
        for panel, values in zip(panels.values(), (written, own), strict=True):
            panel.append(values)
        places += [name if stream == 0 else "" for stream in range(streams)]
    with matplotlib.rc_context(STYLE):
        height = min(max(0.24 * len(classes), 1.6), 5.0)
        figure = Figure(figsize=(min(4 + 0.22 * len(places), 14), 2 * height + 2.2), layout="constrained")
        for axes, (title, parts) in zip(figure.subplots(2, 1), panels.items(), strict=True):
            values = torch.cat(parts, dim=1)
            top = max(float(values.abs().max()), 1e-12)
            picture = axes.imshow(values.numpy(), cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="none")
            figure.colorbar(picture, ax=axes, shrink=0.8)
            axes.set_title(f"{title}, class minus mean", fontsize=11)
            axes.set_xticks([])
            axes.spines[:].set_visible(False)
            if len(classes) <= 40:
                axes.set_yticks(range(len(classes)), [plain(name) for name in classes])
            else:
                axes.set_ylabel(f"{len(classes)} classes")
        starts = [place for place, name in enumerate(places) if name]
        axes.set_xticks(starts, [places[place] for place in starts], rotation=90)
        color_labels(axes, "x", [places[place] for place in starts])
        return figure
