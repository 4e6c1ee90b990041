"""Tables of an inspection."""

from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from hcvision.studies.insight.notes import StageNotes


def matrix_rows(matrix: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """A row per input, a column per output."""
    sources = ["embedding", *names]
    return [
        {"input": name} | {source: f"{value:.6f}" for source, value in zip(sources, row, strict=True)}
        for name, row in zip([*names, "read-out"], matrix.tolist(), strict=True)
    ]


def fraction_rows(fractions: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """A row per input, its fraction, output and its fraction, from the lower triangle of (L+1, m, L+1, m)."""
    inputs, sources = [*names, "read-out"], ["embedding", *names]
    rows = []
    for k, v, j, q in product(*map(range, fractions.shape)):
        if j <= k:
            about = {"input": inputs[k], "fraction": v, "output": sources[j], "of fraction": q}
            rows.append({**about, "weight": f"{fractions[k, v, j, q]:.6f}"})
    return rows


def similarity_rows(stage: StageNotes, twin: StageNotes | None) -> list[dict[str, Any]]:
    rows = []
    looked = [("", stage)] + ([("residual ", twin)] if twin else [])
    levels = [(prefix, notes.similarity().tolist()) for prefix, notes in looked]
    for k, (first, second) in enumerate(pairwise(stage.names)):
        row: dict[str, Any] = {"inputs of": first, "and": second}
        for prefix, values in levels:
            row |= {f"{prefix}{name}": f"{v:.6f}" for name, v in zip(("5 %", "median", "95 %"), values[k], strict=True)}
        rows.append(row)
    return rows


def mixing_rows(stage: StageNotes) -> list[dict[str, Any]]:
    """Per sub-layer, how much of each stream is in each next one, and through all sub-layers up to here."""
    rows = []
    for k, name in enumerate(stage.names):
        own = mixing_matrices(stage, k)
        product = torch.cat(stage.products[k]).mean(0)
        for i, j in product.new_ones(product.shape).nonzero().tolist():
            about = {"sub-layer": name, f"next {stage.part}": i, f"of {stage.part}": j}
            spread = own.std(0)[i, j] if len(own) > 1 else 0.0
            numbers = {"weight": own.mean(0)[i, j], "std": spread, "product": product[i, j]}
            rows.append(about | {key: f"{value:.6f}" for key, value in numbers.items()})
    return rows


def mixing_matrices(stage: StageNotes, k: int) -> Tensor:
    """H_res of sub-layer k, each image's mean over its tokens, (I, S, S): row i is the next stream i."""
    alpha = torch.cat(stage.alphas[k])
    return alpha[..., alpha.shape[2] - alpha.shape[1] :].mT


GAINS = ("forward", "backward", "forward, product", "backward, product")


def gain_rows(stage: StageNotes) -> list[dict[str, Any]]:
    """Per sub-layer, the largest row and column sums of its mixing matrix and of the product up to here."""
    return [
        {"sub-layer": name}
        | {gain: f"{value:.6f}" for gain, value in zip(GAINS, torch.cat(gains).mean(0).tolist(), strict=True)}
        for name, gains in zip(stage.names, stage.gains, strict=True)
    ]


def weight_names(streams: int, views: int, is_general: bool = False, following: int | None = None) -> list[str]:
    """Of the entries of alpha (S, V+S'), row by row, and of beta (S',), or (S', V) row by row; S' streams follow."""
    following = following or streams
    view = ["view"] if views == 1 else [f"view {v}" for v in range(views)]
    into = [*view, *(f"stream {t}" for t in range(following))]
    outputs = [f"output {v}" for v in range(views)] if is_general else ["output"]
    return [f"stream {s} -> {t}" for s in range(streams) for t in into] + [
        f"{output} -> stream {s}" for s in range(following) for output in outputs
    ]


def weights_by_image(stage: StageNotes, k: int) -> Tensor:
    """alpha and beta of sub-layer k, each image's mean over its tokens: (I, S*(V+S) + S), or + S*V."""
    return torch.cat([torch.cat(part[k]).flatten(1) for part in (stage.alphas, stage.betas)], dim=1).double()


def names_of(stage: StageNotes, k: int) -> list[str]:
    alpha, beta = stage.alphas[k][0], stage.betas[k][0]
    views = alpha.shape[2] - beta.shape[1]
    return weight_names(alpha.shape[1], views, beta.dim() == alpha.dim(), beta.shape[1])


def weight_rows(stage: StageNotes) -> list[dict[str, Any]]:
    """Per sub-layer and weight: mean and standard deviation over images."""
    rows = []
    for k, sublayer in enumerate(stage.names):
        rows += [{"sub-layer": sublayer} | row for row in mean_rows(weights_by_image(stage, k), names_of(stage, k))]
    return rows


def class_means(stage: StageNotes, k: int, labels: Tensor) -> Tensor:
    """The weights of sub-layer k by class, for the classes that are there: (K, S*(V+S) + S)."""
    each = weights_by_image(stage, k)
    return torch.stack([each[labels == label].mean(0) for label in labels.unique()])


def class_rows(stage: StageNotes, labels: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """Per class, sub-layer and weight: mean and standard deviation over the class's images, and how many those are."""
    rows = []
    for k, sublayer in enumerate(stage.names):
        for label in labels.unique().tolist():
            each = weights_by_image(stage, k)[labels == label]
            about = {"class": classes[label], "images": len(each), "sub-layer": sublayer}
            rows += [about | row for row in mean_rows(each, names_of(stage, k))]
    return rows


def mean_rows(each: Tensor, names: list[str]) -> list[dict[str, str]]:
    """Mean and standard deviation of each weight over images, (I, weights)."""
    spread = each.std(0) if len(each) > 1 else torch.zeros(each.shape[1])
    return [
        {"weight": name, "mean": f"{mean:.6f}", "std": f"{std:.6f}"}
        for name, mean, std in zip(names, each.mean(0).tolist(), spread.tolist(), strict=True)
    ]
