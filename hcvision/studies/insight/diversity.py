"""How different the streams of a model are in the end: their effective rank, and the cosine between two of them."""

import contextlib
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from hcvision.models import ConnectedBlock
from hcvision.studies.insight.unfolding import Passage, watch


def effective_rank(streams: Tensor) -> Tensor:
    """How many directions streams (..., S, E) of a token point to, 1 to the smaller of S and E: (...).

    exp of the entropy of the singular values, divided by their sum, of the matrix with a row per stream (Roy &
    Vetterli, 2007, "The effective rank", eq. 1-3). They are the roots of the eigenvalues of the S x S products of
    streams, in float64 where that is to be had. 1 for streams of zeros.
    """
    wide = streams if streams.device.type == "mps" else streams.double()
    values = torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0).sqrt()
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp().to(streams.dtype)


def mean_cosine(streams: Tensor) -> Tensor:
    """The mean cosine between two of the S > 1 streams (..., S, E) of a token: (...)."""
    count = streams.shape[-2]
    together = F.normalize(streams, dim=-1).sum(-2).square().sum(-1)  # of all pairs: the square of the sum
    return (together - count) / (count * (count - 1))


class StreamDiversity(pl.Callback):
    """In an evaluation: the effective rank of the streams behind the last connection of a model, and their mean cosine.

    ``rank`` and ``cosine`` are means over tokens and images, of this process. Of one stream, or none, the rank is 1,
    and there is no cosine.
    """

    def __init__(self) -> None:
        self.rank = 1.0
        self.cosine: float | None = None
        self.last: Tensor | None = None
        self.sums = torch.zeros(3, dtype=torch.float64)  # of ranks, of cosines, of tokens
        self.watching = contextlib.ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)
        blocks = [block for block in pl_module.model.modules() if isinstance(block, ConnectedBlock)]
        self.watching.enter_context(watch(blocks[-1:], self.note))

    def note(self, passage: Passage) -> None:
        self.last = passage.after

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self.last is not None and self.last.shape[-2] > 1:
            streams = self.last.float()
            ranks, cosines = effective_rank(streams), mean_cosine(streams)
            self.sums += torch.tensor([float(ranks.sum()), float(cosines.sum()), ranks.numel()])
        self.last = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.watching.close()
        rank, cosine, tokens = self.sums.tolist()
        if tokens:
            self.rank, self.cosine = rank / tokens, cosine / tokens

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.watching.close()
