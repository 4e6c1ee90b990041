"""Attention residuals (arXiv 2603.15031): sub-layers read all earlier outputs by a softmax over them."""

from typing import List, Optional

import torch
from torch import Tensor, nn

from hcvision.connections import entries as log
from hcvision.connections.history import HistoryConnection, Place, Read


class AttentionRead(Read):
    """S times the softmax over the entries, from a learned query and the entries' RMSNorm; at the start all are 1."""

    def __init__(self, dim: int, like: Tensor):
        super().__init__()
        self.query = nn.Parameter(like.new_empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero, which takes as much of every entry."""
        self.query.zero_()

    def forward(self, entries: List[Tensor], time: Optional[Tensor]) -> Tensor:
        """See ``Read``."""
        return log.attend(log.score_entries(entries, self.query))


class TimedRead(AttentionRead):
    """The same by a query of the image: the learned one, and its time's embedding times a number that starts at 0."""

    def __init__(self, dim: int, like: Tensor):
        super().__init__(dim, like)
        self.time_scale = nn.Parameter(like.new_zeros(1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero, both of them."""
        self.query.zero_()
        if hasattr(self, "time_scale"):
            self.time_scale.zero_()

    def forward(self, entries: List[Tensor], time: Optional[Tensor]) -> Tensor:
        """See ``Read``; time is (B, D), of images (B, N, D)."""
        query: Tensor = self.query
        if time is not None:
            query = log.add_time(query, self.time_scale, time, entries)
        return log.attend(log.score_entries(entries, query))


class AttentionConnection(HistoryConnection):
    """Attention residuals: a sub-layer reads all earlier outputs by a softmax over them (arXiv 2603.15031).

    With v_0 the embedding, v_j the output of sub-layer j, and a learned query q_l for each sub-layer l and the
    read-out::

        x_l = S sum_j softmax_j(q_l . RMSNorm(v_j) / sqrt(D)) v_j         (S entries)

    ``attnres4`` takes four sub-layers as one entry, the sum of their outputs, which others read while it grows (the
    paper's blocks). Queries start at zero, as the paper's, where the weights of a softmax are all 1 / S. The paper has
    neither the factor S nor 1 / sqrt(D): the norm in front of each branch makes the first one equal up to its eps,
    and with it the start is the residual model, x_l = sum_j v_j, to the bit in float32; the other is that of
    depth attention in diffusion (arXiv 2605.20708), and keeps a step of the query from turning the softmax over.
    RMSNorm has no weight, which the query would only multiply.

    Args:
        rate: sub-layers that make one entry.
    """

    @property
    def name(self) -> str:
        """``attnres``, ``attnres4``, ..."""
        return f"attnres{self.rate}" if self.rate > 1 else "attnres"

    def count_entries(self, place: Place) -> int:
        """See ``HistoryConnection``: the embedding, and each group of sub-layers that is begun."""
        return 1 + -(-place.layer // self.rate)

    def opens_entry(self, place: Place) -> bool:
        """See ``HistoryConnection``: the first sub-layer of a group."""
        return place.layer % self.rate == 0

    def make_read(self, entries: int) -> Read:
        """See ``HistoryConnection``."""
        return AttentionRead(self.dim, self.like)


class TimedConnection(AttentionConnection):
    """DAR, attention residuals of a diffusion model whose queries see the time (arXiv 2605.20708).

    As ``AttentionConnection``, with the query w_l + s_l e(t) of each image, where e(t) (B, D) is the embedding of its
    time that the model makes. The paper has no number s_l, or always 1; ours is learned and starts at 0, so that the
    start is the residual model. The read-out behind the last sub-layer does not see the time. In the paper four
    sub-layers make one entry: ``dar4``.

    Args:
        rate: sub-layers that make one entry.
    """

    undecayed = (*AttentionConnection.undecayed, "read.time_scale")

    @property
    def name(self) -> str:
        """``dar``, ``dar4``, ..."""
        return f"dar{self.rate}" if self.rate > 1 else "dar"

    def make_read(self, entries: int) -> Read:
        """See ``HistoryConnection``."""
        return TimedRead(self.dim, self.like)

    def make_exit(self, entries: int) -> Read:
        """See ``HistoryConnection``."""
        return AttentionRead(self.dim, self.like)
