"""A history instead of streams: a sub-layer reads a mixture of all earlier outputs, and writes one more.

What goes from block to block is x (..., S*D): the S **entries** of the history, side by side on the last axis like
streams, oldest first. The first one is the embedding. A sub-layer adds an entry, or adds its output to the newest one;
nothing else that has been written is changed. So each read keeps the entries themselves for its backward, which exist
once, and the tensors that hold them side by side are let go: see ``recall_entries``.
"""

from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from hcvision.connections import entries as log
from hcvision.connections.base import Connection, check_count

Carried = Tuple[List[Tensor], Tensor, Tensor]  # the entries, the weights (..., S) or (S,) of their mixture, and that


class Place(NamedTuple):
    """Where a sub-layer stands in its run of blocks, counted from 0."""

    layer: int  # of the run
    block: int  # of the run
    part: int  # of its block


class Read(nn.Module):
    """How much of each entry a mixture takes."""

    def forward(self, entries: List[Tensor], time: Optional[Tensor]) -> Tensor:
        """S entries (..., D) -> (S,) or (..., S), in float32 at least."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""


class Newest(Read):
    """All of the newest entry, and nothing of the others."""

    def forward(self, entries: List[Tensor], time: Optional[Tensor]) -> Tensor:
        """See ``Read``."""
        return log.take_newest(entries)


class HistoryConnection(Connection):
    """What all connections with a history have in common: which entries there are, the mixture, one more entry.

    Subclasses say how many entries there are (``count_entries``), how much of each is read (``make_read``), whether
    a sub-layer begins an entry or adds to the newest one (``opens_entry``), and whether an entry begins with what was
    read (``keeps_view``), as the output of a block does, or is the output of the sub-layer alone.

    Behind the last sub-layer of a run of blocks x is read once more, by ``exit``, which has parameters of its own.
    Arithmetic is in float32 at least, whatever autocast says.

    Args:
        dim: width D of the model.
        layer_index: of the sub-layer, where no place is given: blocks of two sub-layers.
        place: where it stands in its run.
        backend: ``torch`` or ``auto``, which is the same here; there is no kernel.

    Raises:
        ValueError: layer_index < 0, backend ``triton`` or ``native``.
    """

    __constants__ = ["keeps_view"]  # noqa: RUF012 - TorchScript
    __jit_unused_properties__ = ["name"]  # noqa: RUF012
    has_exit = True
    takes_scaled = False
    keeps_view = False
    parts = {"width": ("read", "exit"), "depth": ()}  # noqa: RUF012 - as of StreamConnection
    like: Tensor  # of the type and on the device of the parameters
    tap = "sum"  # what of the entries is the state of the model behind a block: their sum, or the last
    undecayed: Tuple[str, ...] = ("read.weights", "exit.weights", "read.query", "exit.query")

    def __init__(
        self,
        dim: int,
        rate: int = 1,
        layer_index: int = 0,
        *,
        place: Optional[Place] = None,
        backend: str = "auto",
        device: Any = None,
        dtype: Optional[torch.dtype] = None,
    ):
        check_count("layer_index", layer_index, 0)
        self.choose_backend(backend)
        self.place = place or Place(layer_index, layer_index // 2, layer_index % 2)
        self.rate = rate
        super().__init__(dim, self.count_entries(self.place), 1)
        self.stream_dim = dim
        self.copies = 2  # x is not its own history: that is entered, and left
        self.following = self.streams + int(self.opens_entry(self.place))  # entries behind the sub-layer
        self.reads = self.streams > 1 and (self.place.part == 0 or not self.keeps_view)
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)  # of parameters
        self.read = self.make_read(self.streams) if self.reads else Newest()
        self.exit: nn.Module = Newest()
        self.reset_parameters()

    @property
    def name(self) -> str:
        """The name that ``build_connection`` makes such a connection from."""
        raise NotImplementedError

    def count_entries(self, place: Place) -> int:
        """How many entries there are in front of a sub-layer."""
        raise NotImplementedError

    def opens_entry(self, place: Place) -> bool:
        """Whether the sub-layer begins an entry."""
        raise NotImplementedError

    def make_read(self, entries: int) -> Read:
        """What reads so many entries."""
        raise NotImplementedError

    def make_exit(self, entries: int) -> Read:
        """What reads so many entries behind the last sub-layer."""
        return self.make_read(entries)

    @torch.jit.ignore
    def choose_backend(self, backend: str) -> None:
        """``auto`` and ``torch`` are the same here.

        Raises:
            ValueError: another one.
        """
        if backend not in ("auto", "torch"):
            raise ValueError(f"backend={backend!r} has no kernels for a history; backend='auto' takes PyTorch")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value, that of the residual add."""
        for part in (self.read, self.exit):
            part.reset_parameters()  # type: ignore[operator]

    @torch.jit.ignore
    def place_exit(self, wanted: bool) -> None:
        """Make what reads x behind the last sub-layer, or take it away; what is there and wanted stays."""
        if not wanted:
            self.exit = Newest()
        elif isinstance(self.exit, Newest):
            self.exit = self.make_exit(self.following)

    @torch.jit.ignore
    def continues(self, before: Connection) -> bool:
        """Whether the history that another connection leaves is the one that this one reads."""
        return (
            type(before) is type(self)
            and (before.name, before.dim, before.place.layer + 1) == (self.name, self.dim, self.place.layer)
        )  # fmt: skip

    def parameter_dtype(self) -> torch.dtype:
        """The type of the parameters, which is that of the model."""
        return self.like.dtype

    def enter(self, x: Tensor, rate: int) -> Tensor:
        """x itself, which is the first entry."""
        return x

    def leave(self, x: Tensor, rate: int) -> Tensor:
        """(..., S*D) -> (..., D), read by ``exit``; x itself at a rate of 1."""
        if rate > 1:
            entries = log.recall_entries(x, self.following, self.dim)
            return log.mix_entries(entries, self.exit(entries, None))
        return x

    @torch.jit.ignore
    def weights(self, x: Tensor, time: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """What the connection does with x, as ``StreamConnection.weights`` says it, for a history that grows.

        Args:
            x: the history, (..., S*D).
            time: as for ``width_connection``.

        Returns:
            alpha (..., S, 1+S'): how much of each entry is read, and what goes into the S' entries that follow. beta
            (..., S'): 1 at the entry that takes the output.

        Raises:
            ValueError: x is not S*D wide.
        """
        _, alpha, beta = self.show_carried(self.width_connection(x, time)[1])
        return alpha, beta

    @torch.jit.ignore
    def show_streams(self, carried: Carried) -> Tensor:
        """The entries (..., S, D) of what goes from step to step, in one type."""
        return torch.stack([entry.to(carried[1].dtype) for entry in carried[0]], dim=-2)

    @torch.jit.ignore
    def show_carried(self, carried: Carried, output: Optional[Tensor] = None) -> Tuple[Tensor, Tensor, Tensor]:
        """The entries (..., S, D), alpha and beta, of what goes from step to step."""
        entries = carried[0]
        places = *entries[0].shape[:-1], len(entries)
        weights, kept = (part.expand(places) for part in self.show_weights(carried[1]))
        same = torch.eye(len(entries), self.following, dtype=weights.dtype, device=weights.device)
        alpha = torch.cat([weights[..., None], same.expand(*weights.shape, -1)], dim=-1)
        if self.keeps_view and self.following > self.streams:
            alpha[..., -1] = kept
        beta = torch.zeros_like(alpha[..., 0, 1:])
        beta[..., -1] = 1
        return self.show_streams(carried), alpha, beta

    @torch.jit.ignore
    def show_weights(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """How much of each entry the branch reads, and what its output is added to: the same."""
        return weights, weights

    @torch.jit.ignore
    def show_exit(self, x: Tensor) -> Tensor:
        """How much of each entry is read behind the last sub-layer: (..., S')."""
        entries = log.recall_entries(x, self.following, self.dim)
        return self.exit(entries, None).expand(*x.shape[:-1], self.following)

    def width_connection(self, x: Tensor, time: Optional[Tensor] = None) -> Tuple[Tensor, Carried]:
        """First step: the branch input, a mixture of the entries.

        Args:
            x: the history, (..., S*D).
            time: embeddings of the images' times, (B, D), for connections that see them.

        Returns:
            The branch input, (..., D), in the dtype of x, and what ``depth_connection`` makes the next history of.

        Raises:
            ValueError: x is not S*D wide.
        """
        return self.read_entries(log.recall_entries(x, self.streams, self.dim), time)

    def read_entries(self, entries: List[Tensor], time: Optional[Tensor]) -> Tuple[Tensor, Carried]:
        """``width_connection`` of entries (..., D)."""
        weights = self.read(entries, time)
        view = log.mix_entries(entries, weights) if self.reads else log.newest(entries)
        return view, (entries, weights, view)

    def depth_connection(self, branch_output: Tensor, carried: Carried) -> Tensor:
        """Second step: the history with the branch output, in an entry of its own or in the newest one.

        Args:
            branch_output: (..., D).
            carried: what ``width_connection`` returned beside the branch input.

        Returns:
            The next history, (..., S*D) or (..., (S+1)*D), in the dtype of x.

        Raises:
            ValueError: branch_output is not shaped like the branch input.
        """
        entries, _, view = carried
        return log.join_entries(log.write_entry(entries, branch_output, view, self.following, self.keeps_view))

    def join(self, branch_output: Tensor, carried: Carried, time: Optional[Tensor] = None) -> Tuple[Tensor, Carried]:
        """The second step of the sub-layer before, and the first step of this one, without x between them."""
        entries, _, view = carried
        entries = log.write_entry(entries, branch_output, view, self.streams, self.keeps_view)
        return self.read_entries(entries, time)

    def carry(self, x: Tensor, carried: Carried) -> Carried:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"dim={self.dim}, entries={self.streams}"
