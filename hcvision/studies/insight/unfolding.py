"""Who reads whom: the weights of all connections multiplied out into one matrix."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from hcvision.connections import Connection
from hcvision.models import ConnectedBlock, connections_of, convert, own_class, stages
from hcvision.training import TimmModule

STEPS = ("width_connection", "depth_connection", "join")


@dataclass
class Mixing:
    """The weights of one sub-layer, and where streams are entered and left."""

    alpha: Tensor  # (B, ..., S, V+S), or (B, ..., E, S, V+S) where every channel has weights of its own
    beta: Tensor  # (B, ..., S), or (B, ..., S, V) where a stream takes of every view of the output, or (B, ..., E, S)
    enters: bool  # streams were entered before it
    leaves: bool  # and are left behind it
    by_channel: bool = False  # every channel has weights of its own
    entry: Tensor | None = None  # (E, S), how much of x each stream has where it was entered, None for all of it
    exit: Tensor | None = None  # how much of each stream is left, (B, ..., S); None for the mean of the copies

    @property
    def streams(self) -> int:
        return self.alpha.shape[-2]

    @property
    def views(self) -> int:
        return self.alpha.shape[-1] - self.following

    @property
    def following(self) -> int:
        """How many streams there are behind it: more of a history."""
        return self.beta.shape[self.alpha.dim() - 2]

    @property
    def is_general(self) -> bool:
        """Whether a stream takes of every view of the output."""
        return self.beta.dim() == self.alpha.dim()

    @property
    def mixing_matrix(self) -> Tensor:
        """(B, ..., S, S), where row i makes the next stream i; the mean over channels that have one each."""
        matrix = self.alpha[..., self.views :].mT
        return matrix.mean(-3) if self.by_channel else matrix

    def with_channels(self) -> "Mixing":
        """The same with an axis for channels, beside others that have one."""
        if self.by_channel:
            return self
        beta = self.beta.unsqueeze(-3 if self.is_general else -2)
        return replace(self, alpha=self.alpha.unsqueeze(-3), beta=beta, by_channel=True)


@dataclass
class Passage:
    """What happened at one sub-layer."""

    mixing: Mixing
    streams: Tensor  # (B, ..., S, E), before it
    view: Tensor  # (B, ..., V, E), the branch input
    output: Tensor  # (B, ..., V, E), the branch output
    after: Tensor  # (B, ..., S, E), the streams behind it


@contextlib.contextmanager
def watch(blocks: Iterable[Any], note: Callable[[Passage], None]) -> Iterator[None]:
    """Call ``note`` for every sub-layer of ``blocks`` that the forward passes come through meanwhile, in order."""
    before: list[tuple[Connection, dict[str, Any]]] = []
    try:
        for block in blocks:
            own = connections_of(block)
            for k, connection in enumerate(own):
                enters, leaves = k == 0 and block.entry_rate > 1, k == len(own) - 1 and block.exit_rate > 1
                before.append((connection, {name: vars(connection).get(name) for name in STEPS}))
                _wrap(connection, own[k - 1] if k else None, note, enters, leaves)
        yield
    finally:
        for connection, steps in reversed(before):
            for name, step in steps.items():
                vars(connection).pop(name, None)
                if step is not None:  # somebody else watches too
                    vars(connection)[name] = step


def _wrap(connection: Any, previous: Any, note: Callable[[Passage], None], enters: bool, leaves: bool) -> None:
    width, depth, size = connection.width_connection, connection.depth_connection, connection.dim // connection.views
    before: list[tuple[Tensor, Tensor]] = []

    def width_connection(x: Tensor, *time: Tensor | None) -> Any:
        view, carried = width(x, *time)
        before.append((connection.show_streams(carried).flatten(-2), view))  # x in the type in which it is stored
        return view, carried

    def depth_connection(branch_output: Tensor, carried: Any) -> Tensor:
        after = depth(branch_output, carried)
        streams, view = before.pop()
        held, alpha, beta = connection.show_carried(carried, branch_output)
        mixed = held.flatten(-2)
        if mixed.data_ptr() != streams.data_ptr() and not torch.equal(mixed, streams):
            raise ValueError("a block that scales its streams itself cannot be looked into")
        if connection.ways > 1:
            view = view.unflatten(-1, (connection.ways, -1)).mean(-2)
        parts = [part.detach().unflatten(-1, (-1, size)) for part in (streams, view, branch_output, after)]
        by_channel = alpha.dim() > held.dim()
        entry = connection.scaled.scale.detach().mT.to(alpha.dtype) if enters and connection.has_entry else None
        out = connection.show_exit(after) if leaves else None
        out = None if out is None else out.detach()
        note(Passage(Mixing(alpha.detach(), beta.detach(), enters, leaves, by_channel, entry, out), *parts))
        return after

    def join(branch_output: Tensor, carried: Any, *time: Tensor | None) -> Any:
        return width_connection(previous.depth_connection(branch_output, carried), *time)

    vars(connection).update(zip(STEPS, (width_connection, depth_connection, join), strict=True))


def unfold(mixings: list[Mixing], reduce: Callable[[Tensor], Tensor] = lambda row: row) -> Tensor:
    """How much of every earlier output is in the input of each sub-layer (HC eq. 20 and 27), token by token.

    Source 0 is the embedding, source j the output of sub-layer j - 1; the last row is the read-out, the mean over
    copies (GHC has a linear map there, which no such matrix holds). The views of a frac-connection are the fractions of
    the hidden state, of sources too; hyper-connections have one view. Where every channel has weights of its own
    (SiHC), or streams are entered with a scale for each, channels are one more axis behind those of the tokens::

        input[k, v] = sum_jq c[k, v, j, q] * source[j, q]

    Args:
        mixings: of the sub-layers of a stage, in order, from one forward pass.
        reduce: done with every row (B, ..., V, L+1, V) as soon as it is there, such as ``by_image``.

    Returns:
        c, (B, ..., L+1, V, L+1, V), in float32 at least.

    Raises:
        ValueError: the sub-layers have different numbers of views.
    """
    views, sources = mixings[0].views, len(mixings) + 1
    if any(mixing.views != views for mixing in mixings):
        counts = sorted({mixing.views for mixing in mixings})
        raise ValueError(f"sub-layers with {' and '.join(map(str, counts))} views have no matrix in common")
    if any(mixing.by_channel or mixing.entry is not None for mixing in mixings):
        mixings = [mixing.with_channels() for mixing in mixings]
    alpha = mixings[0].alpha
    fraction = _fractions(mixings[0])  # that each stream holds
    entries = [mixing.entry.shape[:-1] for mixing in mixings if mixing.entry is not None]
    places = torch.broadcast_shapes(*(mixing.alpha.shape[:-2] for mixing in mixings), *entries)
    state = alpha.new_zeros(*places, len(fraction), sources, views)
    state[..., torch.arange(len(fraction)), 0, fraction] = 1
    rows = []
    for k, mixing in enumerate(mixings):
        if mixing.enters and k:
            state = state[..., _fractions(mixing), :, :]
        if mixing.entry is not None:
            state = state * mixing.entry[..., None, None]
        with torch.autocast(alpha.device.type, enabled=False):
            mixed = torch.einsum("...sm,...sjq->...mjq", mixing.alpha, state)
        rows.append(reduce(mixed[..., :views, :, :]))
        state = mixed[..., views:, :, :].clone()
        if mixing.is_general:
            state[..., k + 1, :] += mixing.beta
        else:
            after = torch.arange(mixing.following)
            state[..., after, k + 1, after % views] += mixing.beta
        if mixing.exit is not None:
            state = torch.einsum("...s,...sjq->...jq", mixing.exit, state).unsqueeze(-3)
        elif mixing.leaves:
            state = _mean_of_copies(state, mixing.views)
    rows.append(reduce(_mean_of_copies(state, views)))
    return torch.stack(rows, dim=-4)


def _mean_of_copies(state: Tensor, views: int) -> Tensor:
    """(..., S, L+1, V) -> (..., V, L+1, V): of the streams that hold the same fraction."""
    return torch.stack([state[..., fraction::views, :, :].mean(-3) for fraction in range(views)], dim=-3)


def _fractions(mixing: Mixing) -> list[int]:
    return [stream % mixing.views for stream in range(mixing.streams)]


def by_image(row: Tensor) -> Tensor:
    """The mean over the tokens of each image, and their channels: (B, ..., V, L+1, V) -> (B, V, L+1, V)."""
    return row.flatten(1, -4).mean(1) if row.dim() > 4 else row


def join_fractions(c: Tensor) -> Tensor:
    """(..., L+1, V, L+1, V) -> (..., L+1, L+1): how much of an output is in an input, if its fractions are alike.

    The sum over the output's fractions, the mean over the input's.
    """
    return c.sum(-1).mean(-2)


@torch.no_grad()
def unfolded_matrix(
    model: nn.Module, images: Tensor | tuple[Tensor, ...], *, stage: int | None = None, per_fraction: bool = False
) -> Tensor:
    """The unfolded connection matrix: which outputs a sub-layer reads, and how much of each (HC eq. 20 and 27).

    Row k is the input of sub-layer k, counted from 0 over attention and MLP alike, and the last row the read-out (the
    mean over streams); column 0 is the embedding and column j the output of sub-layer j - 1. A residual model has ones
    on and below the diagonal. Dynamic weights are averaged over tokens and images, and weights of channels over these,
    after unfolding. For
    frac-connections an entry is the sum over the output's fractions and the mean over the input's.

    Args:
        model: a timm model, with connections or without, or a Lightning module of ours. It is left as it was.
        images: (B, C, H, W), or all arguments of the model as a tuple: (x, t, y) of a DiT.
        stage: which, of a model whose blocks stand in several (Swin, ConvNeXt, ...).
        per_fraction: the fractions apart: input, its fraction, output, its fraction.

    Returns:
        (L+1, L+1) for L sub-layers, or (L+1, m, L+1, m), in float32, or the float64 of the model.

    Raises:
        ValueError: a model that ``convert`` does not take; one with several stages, and none is named; sub-layers with
            different numbers of views, or that scale their streams themselves.
    """
    with look_inside(model) as (inner, columns):
        last = len(columns) - 1
        if last if stage is None else not 0 <= stage <= last:
            name = own_class(inner).__name__
            raise ValueError(f"stage must be one of 0 to {last}, the stages of this {name}, got {stage}")
        mixings: list[Mixing] = []
        with watch(columns[stage or 0], lambda passage: mixings.append(passage.mixing)):
            inner(*images) if isinstance(images, tuple) else inner(images)
    c = unfold(mixings, by_image).mean(0)
    return c if per_fraction else join_fractions(c)


@contextlib.contextmanager
def look_inside(model: Any) -> Iterator[tuple[nn.Module, list[list[Any]]]]:
    """The model, or a copy with the connections that its residual adds are, in evaluation mode, and its stages."""
    inner = model.model if isinstance(model, TimmModule | FeatureGetterNet) else model
    was_training = [(module, module.training) for module in inner.modules()]
    try:
        inner = connect_adds(inner)
        inner.eval()
        yield inner, stages(inner)
    finally:
        for module, training in was_training:
            module.training = training


def connect_adds(model: Any) -> Any:
    """The model, if all its blocks have connections, or a copy with residual adds written as connections."""
    blocks = [block for stage in stages(model) for block in stage]
    fractions = {connection.views for block in blocks for connection in connections_of(block)}
    if all(isinstance(block, ConnectedBlock) for block in blocks):
        return model
    rate = max(fractions, default=1)
    same = f"sfc{rate}" if rate > 1 else "shc1"  # both are the residual add at their initial values
    return convert(copy.deepcopy(model), same, blocks=lambda _, block: not isinstance(block, ConnectedBlock))


def name_sublayers(blocks: list[Any]) -> list[str]:
    """``attention 0``, ``MLP 0``, ``attention 1``, ... with the number of the block in its stage."""
    names = []
    for number, block in enumerate(blocks):
        count = len(connections_of(block))
        mixer = "attention" if hasattr(block, "attn") or hasattr(block, "attns") else "mixer"
        kinds = [mixer, "MLP"] if count == 2 else ["block"] if count == 1 else [f"part {k}" for k in range(count)]
        names += [f"{kind} {number}" for kind in kinds]
    return names
