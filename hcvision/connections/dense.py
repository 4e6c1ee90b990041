"""DenseFormer (arXiv 2402.02622): blocks read a weighted sum of the outputs of all earlier blocks."""

from typing import List, Optional

import torch
from torch import Tensor, nn

from hcvision.connections import entries as log
from hcvision.connections.history import HistoryConnection, Place, Read


class StaticRead(Read):
    """A parameter for each entry; at the start all of the newest one (DenseFormer, arXiv 2402.02622, eq. 1)."""

    def __init__(self, entries: int, like: Tensor):
        super().__init__()
        self.weights = nn.Parameter(like.new_empty(entries))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """1 for the newest entry, 0 for the others."""
        self.weights.zero_()
        self.weights[-1] = 1

    def forward(self, entries: List[Tensor], time: Optional[Tensor]) -> Tensor:
        """See ``Read``."""
        return log.widen(self.weights)


class DenseConnection(HistoryConnection):
    """DenseFormer: a block reads a weighted sum of the outputs of all blocks before it (arXiv 2402.02622, eq. 1).

    With v_0 the embedding and v_j the output of block j, block i + 1 is given y_i, and what follows the last one too::

        y_i = sum_{j <= i} a_ij v_j

    a is static and starts as 1 at j = i, 0 elsewhere: the residual model to the bit. Within a block the adds stay
    residual adds, so it is the first sub-layer that reads, and takes what it read on. L blocks have L (L + 3) / 2
    parameters: the first one reads the embedding as it is.
    """

    keeps_view = True
    tap = "last"

    @property
    def name(self) -> str:
        """``dense``"""
        return "dense"

    def count_entries(self, place: Place) -> int:
        """See ``HistoryConnection``: the embedding, each block before, and this one's once it is begun."""
        return 1 + place.block + int(place.part > 0)

    def opens_entry(self, place: Place) -> bool:
        """See ``HistoryConnection``: the first sub-layer of a block."""
        return place.part == 0

    def make_read(self, entries: int) -> Read:
        """See ``HistoryConnection``."""
        return StaticRead(entries, self.like)
