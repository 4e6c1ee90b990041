"""MUDD (arXiv 2502.12170): queries, keys, values and what goes on read all earlier outputs, each by its own weights."""

from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

from hcvision.connections import entries as log
from hcvision.connections.dense import DenseConnection
from hcvision.connections.history import Carried, Read


class MultiwayRead(Read):
    """Weights of the token, W mixtures of S entries, from the newest one (MUDDFormer, arXiv 2502.12170, eq. 5 to 7)::

    static + GELU(RMSNorm(v) @ dynamic_down) @ dynamic_up         (W S numbers, hidden layer of as many)
    """

    def __init__(self, dim: int, entries: int, ways: int, like: Tensor):
        super().__init__()
        count = ways * entries
        self.static = nn.Parameter(like.new_empty(ways, entries))
        self.dynamic_down = nn.Parameter(like.new_empty(dim, count))
        self.dynamic_up = nn.Parameter(like.new_empty(count, count))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All of the newest entry, whatever it is: the dynamic part is zero; its first matrix always the same."""
        self.static.zero_()
        self.static[:, -1] = 1
        generator = torch.Generator().manual_seed(self.static.numel())
        start = torch.randn(self.dynamic_down.shape, generator=generator) * len(self.dynamic_down) ** -0.5
        self.dynamic_down.copy_(start)
        self.dynamic_up.zero_()

    def forward(self, entries: List[Tensor], time: Optional[Tensor]) -> Tensor:
        """See ``Read``; (..., W, S), or (..., S) of one way."""
        return log.weigh(entries, self.static, self.dynamic_down, self.dynamic_up)


class MultiwayConnection(DenseConnection):
    """MUDD: a block reads the outputs of all earlier blocks by four mixtures that depend on the token.

    ``DenseConnection``, with weights of each token, made from the output of the block before, and a mixture each for
    the queries, the keys and the values of the block's attention, and for what its output is added to
    (arXiv 2502.12170, section 2.3); behind the last block there is one mixture. The dynamic part starts at zero, the
    static one as all of the newest output: the residual model to the bit. Its blocks have to be those of a ViT, whose
    attention has one linear map for queries, keys and values; see ``hcvision.models``. The MLP adds to what the
    attention did, as in the paper. Where ``inspect`` has one matrix, queries, keys and values are averaged.
    """

    __jit_unused_properties__ = ["name", "ways"]  # noqa: RUF012
    needs_ways = True
    undecayed = ("read.static", "exit.static")

    @property
    def name(self) -> str:
        """``mudd``"""
        return "mudd"

    @property
    def ways(self) -> int:  # type: ignore[override]
        """How many mixtures the branch is given: 3, or 1 in front of the first block and of an MLP."""
        return 3 if self.reads else 1

    def make_read(self, entries: int) -> Read:
        """See ``HistoryConnection``."""
        return MultiwayRead(self.dim, entries, 4, self.like)

    def make_exit(self, entries: int) -> Read:
        """See ``HistoryConnection``."""
        return MultiwayRead(self.dim, entries, 1, self.like)

    def read_entries(self, entries: List[Tensor], time: Optional[Tensor]) -> Tuple[Tensor, Carried]:
        """See ``HistoryConnection``; the branch input is that of queries, keys and values side by side, (..., 3 D)."""
        weights = self.read(entries, time)
        if self.reads:
            views = log.mix_ways(entries, weights)
            return log.join_ways(views), (entries, weights, log.newest(views))
        view = log.newest(entries)
        return view, (entries, weights, view)

    @torch.jit.ignore
    def show_weights(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """See ``HistoryConnection``."""
        return (weights[..., :3, :].mean(-2), weights[..., 3, :]) if self.reads else (weights, weights)
