"""What is noted of a stage while images pass through it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hcvision.models import connections_of
from hcvision.studies.insight.diversity import effective_rank, mean_cosine
from hcvision.studies.insight.unfolding import (
    Mixing,
    Passage,
    by_image,
    join_fractions,
    name_sublayers,
    unfold,
)

QUANTILES = (0.05, 0.5, 0.95)


class StageNotes:
    """What passes through one stage, condensed batch by batch. ``names`` are those of its L sub-layers."""

    def __init__(self, blocks: list[Any]):
        self.blocks, self.names = blocks, name_sublayers(blocks)
        own = [connection for block in blocks for connection in connections_of(block)]
        self.part = "fraction" if any(connection.views > 1 for connection in own) else "stream"
        self.dynamic = any(getattr(connection, "dynamic", False) for connection in own)
        self.mixings: list[Mixing] = []
        self.last_input: Tensor | None = None
        self.matrices: list[Tensor] = []  # (B, L+1, V, L+1, V) each
        self.cosines: list[list[Tensor]] = [[] for _ in self.names[1:]]  # of the inputs of sub-layers k and k + 1
        self.norms: list[list[Tensor]] = [[] for _ in [*self.names, "end"]]  # (B, S) each
        self.likeness: list[list[Tensor]] = [[] for _ in [*self.names, "end"]]  # (B,) each, cosine between two streams
        self.ranks: list[list[Tensor]] = [[] for _ in [*self.names, "end"]]  # (B,) each, effective rank of the streams
        self.alphas: list[list[Tensor]] = [[] for _ in self.names]  # (B, S, V+S) each
        self.betas: list[list[Tensor]] = [[] for _ in self.names]  # (B, S) or (B, S, V) each
        self.product = torch.empty(0)
        self.products: list[list[Tensor]] = [[] for _ in self.names]  # (B, S, S) each, of the mixing matrices so far
        self.gains: list[list[Tensor]] = [[] for _ in self.names]  # (B, 4) each; see ``note_mixing``

    def note(self, passage: Passage) -> None:
        k, mixing = len(self.mixings), passage.mixing
        self.mixings.append(mixing)
        view = passage.view.flatten(-2).float()
        if k:
            self.cosines[k - 1].append(F.cosine_similarity(self.last_input, view, dim=-1).flatten().cpu())  # type: ignore[arg-type]
        self.last_input = view
        self.note_streams(k, passage.streams)
        tokens = tuple(range(1, mixing.alpha.dim() - 2))
        self.alphas[k].append(mean_over(mixing.alpha, tokens).float().cpu())
        self.betas[k].append(mean_over(mixing.beta, tokens).float().cpu())
        self.note_mixing(k, mixing)
        if k + 1 == len(self.names):
            self.note_streams(k + 1, passage.after)
            self.matrices.append(unfold(self.mixings, by_image).cpu())
            self.mixings, self.last_input = [], None

    def note_mixing(self, k: int, mixing: Mixing) -> None:
        """The product of the mixing matrices of every token, and what both can gain.

        As mHC (fig. 3) counts it: the largest absolute row sum of H_res, which bounds what a stream can grow on its way
        forward, and column sum, for gradients on their way back.
        """
        own = mixing.mixing_matrix.float()
        tokens = tuple(range(1, own.dim() - 2))
        self.product = own if k == 0 or mixing.enters else own @ self.product
        sums = [part.abs().sum(dim).amax(-1) for part in (own, self.product) for dim in (-1, -2)]
        self.products[k].append(mean_over(self.product, tokens).cpu())
        self.gains[k].append(mean_over(torch.stack(sums, dim=-1), tokens).cpu())

    @property
    def mixes(self) -> bool:
        """Whether there are several streams, as many in all sub-layers."""
        counts = {alphas[0].shape[1] for alphas in self.alphas}
        return len(counts) == 1 and counts != {1}

    def note_streams(self, k: int, streams: Tensor) -> None:
        streams = streams.float().flatten(1, -3)
        self.norms[k].append(streams.norm(dim=-1).mean(1).cpu())
        if streams.shape[-2] > 1:
            self.likeness[k].append(mean_cosine(streams).mean(1).cpu())
            self.ranks[k].append(effective_rank(streams).mean(1).cpu())

    @property
    def fractions(self) -> Tensor:
        """The matrix with its fractions, the mean over images: (L+1, V, L+1, V)."""
        return torch.cat(self.matrices).double().mean(0)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """The unfolded connection matrix, mean over images and their standard deviation, both (L+1, L+1)."""
        each = join_fractions(torch.cat(self.matrices).double())
        return each.mean(0), each.std(0) if len(each) > 1 else torch.zeros_like(each[0])

    def similarity(self) -> Tensor:
        """5 %, median and 95 % of the cosine between the inputs of successive sub-layers: (L-1, 3)."""
        levels = torch.tensor(QUANTILES)
        return torch.stack([torch.cat(values).quantile(levels) for values in self.cosines])

    def stream_rows(self) -> list[dict[str, Any]]:
        """Per place in depth: the mean norm of each stream, how alike two are (cosine), and their effective rank."""
        rows = []
        places = zip([*self.names, "end"], self.norms, self.likeness, self.ranks, strict=True)
        for place, norms, likeness, ranks in places:
            mean = torch.cat(norms).mean(0)
            alike, rank = (float(torch.cat(part).mean()) if part else None for part in (likeness, ranks))
            about = {f"cosine between {self.part}s": alike, "effective rank": rank}
            rows += [
                {"before": place, self.part: stream, "norm": float(norm)} | about for stream, norm in enumerate(mean)
            ]
        return rows


def mean_over(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.mean(dims) if dims else values
