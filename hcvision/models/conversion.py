"""A timm transformer in, the same transformer with connections out."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.models._features import FeatureGetterNet
from torch import nn

from hcvision.connections import (
    NEED_TIME,
    TIMED,
    Connection,
    HistoryConnection,
    Place,
    StreamConnection,
    build_connection,
    check_count,
    has_history,
    parse_connection,
)
from hcvision.models.blocks import ConnectedBlock
from hcvision.models.borders import Exit, connections_of, place_borders
from hcvision.models.connected import MIXINS, ConnectedModel
from hcvision.models.families import find_mixin
from hcvision.models.grafting import graft, own_class, ungraft
from hcvision.models.stages import find_columns, find_family, stages
from hcvision.models.ways import find_way_obstacle, place_ways

STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Blocks = slice | str | Iterable[int] | Callable[[int, nn.Module], bool] | None


class NoResidualWarning(UserWarning):
    """A connection that is not the residual add at its initial values changes what a converted model computes."""


def choose_blocks(blocks: Blocks, candidates: list[Any]) -> list[int]:
    """The indices of the blocks that the caller means, of those that can have connections."""
    count = len(candidates)
    if isinstance(blocks, str):  # "6:", as configs and hub folders spell a slice
        parts = blocks.split(":")
        if len(parts) not in (2, 3) or any(part and not part.lstrip("-").isdigit() for part in parts):
            raise ValueError(f"blocks must look like '6:', ':6' or '::2', got {blocks!r}")
        blocks = slice(*(int(part) if part else None for part in parts))
    if blocks is None:
        chosen = list(range(count))
    elif isinstance(blocks, slice):
        chosen = list(range(count))[blocks]
    elif callable(blocks):
        chosen = [i for i, block in enumerate(candidates) if blocks(i, block)]
    else:
        chosen = list(blocks)
        for i in chosen:
            if not isinstance(i, int) or not -count <= i < count:
                raise ValueError(f"blocks must be indices below {count}, the number of blocks, got {i!r}")
        chosen = sorted({i % count for i in chosen})
    able = [i for i in chosen if not find_mixin(candidates[i]).find_obstacle(candidates[i])]
    if not able:
        reasons = {f": {find_mixin(candidates[i]).find_obstacle(candidates[i])}" for i in chosen} or {""}
        raise ValueError(
            f"blocks={blocks!r} chooses none of the {count} blocks that can have connections{reasons.pop()}"
        )
    return able


def convert(
    model: Any,
    connection: str,
    *,
    blocks: Blocks = None,
    recompute: int = 0,
    stream_dtype: torch.dtype | str | None = None,
    time: bool = False,
    **options,
) -> nn.Module:
    """Put connections where a timm model has residual adds, in place.

    At their initial values the connections are the residual adds: the outputs stay what they were
    (FC to the bit, HC too, up to the rounding of a mean over n equal numbers). HC streams are entered
    before the first block of a run of converted blocks and left, by their mean, behind its last one;
    a hierarchical model has a run per stage. ``oru`` alone is not the residual add: the outputs change, and a
    warning says so.

    Args:
        model: a timm model, or its ``features_only`` wrapper. Weights stay where they are.
        connection: ``dhc2``, ``sfc4``, ...; ``residual`` takes connections away again.
        blocks: which blocks, counted from 0 over the whole model: a slice, the same as text (``"6:"``),
            indices, or a function of index and block; None for all that can have connections. Call
            again for other blocks with another connection.
        recompute: compute the streams again in backward, from every so many blocks; see ``recompute_streams``.
        stream_dtype: store the streams in this type; see ``set_stream_dtype``.
        time: let the coefficients see the time embedding of a DiT too, from zero on; of HC, FC, mHC and iHC.
        **options: options of ``build_connection``: ``tanh``, ``norm``, ``arrangement``, ``entry``, ``backend``.

    Returns:
        The same model object.

    Raises:
        ValueError: an unknown connection, a model or block class that is not supported, no such block, a
            block that has a connection already, a dim that the frac rate does not divide; for ``residual``,
            a connection that has left its initial values.
        TypeError: an option that the connection does not have.
    """
    kind, _ = parse_connection(connection)
    if isinstance(model, FeatureGetterNet):
        more: dict[str, Any] = {"recompute": recompute, "stream_dtype": stream_dtype, "time": time}
        convert(model.model, connection, blocks=blocks, **more, **options)
        return model
    if has_history(kind) and (recompute or stream_dtype is not None):
        given = f"recompute={recompute}" if recompute else f"stream_dtype={stream_dtype}"
        raise ValueError(f"{given} is for connections that carry streams, and {connection} reads a history")
    candidates = [block for column in find_columns(model, find_family(model)) for block in column]
    if kind == "residual":
        if isinstance(model, ConnectedModel):
            check_residual(candidates, blocks)
            remove_connections(model, blocks)
        return model

    if time and kind not in TIMED:
        raise ValueError(f"time=True is for {', '.join(TIMED)}, got {connection}")
    grafts: list[tuple[Any, dict[str, Any]]] = []
    first = [0]  # the number of the first sub-layer of each block
    for block in candidates:
        first.append(first[-1] + find_mixin(block).adds)
    chosen = choose_blocks(blocks, candidates)
    places = place_history(model, [candidates[i] for i in chosen]) if has_history(kind) else {}
    for i in chosen:
        block, mixin = candidates[i], find_mixin(candidates[i])
        if isinstance(block, ConnectedBlock):
            raise ValueError(
                f"block {i} of this {own_class(model).__name__} has a connection already ({block.connection1.name})"
            )
        if (time or kind in NEED_TIME) and not mixin.sees_time:
            asked = "time=True" if time else connection
            raise ValueError(f"{asked} needs a model that embeds a time, a DiT, got a {own_class(model).__name__}")
        options |= {"time_dim": mixin.dim(block)} if time else {}
        like = next(block.parameters())
        new: dict[str, Any] = {"channels_first": mixin.is_channels_first(block), "entry_rate": 1, "exit_rate": 1}
        new["restores_dtype"] = False
        for k in range(mixin.adds):
            place = {"place": places[block][k]} if places else {}
            new[f"connection{k + 1}"] = build_connection(
                connection, mixin.dim(block), first[i] + k, device=like.device, dtype=like.dtype, **place, **options
            ).train(block.training)
        if hasattr(mixin, "carry1") and not new["connection1"].takes_scaled:
            raise ValueError(
                f"{connection} cannot take the adds of a {own_class(block).__name__}, which scales x itself; "
                "connections with streams as wide as the model can, such as dhc2"
            )
        unfit = find_way_obstacle(block) if new["connection1"].needs_ways else None
        if unfit:
            raise ValueError(
                f"{connection} needs blocks of a ViT whose attention has one linear map for queries, keys and values, "
                f"got {unfit}"
            )
        check_seam(model, new["connection1"])
        grafts.append((block, new))
    if not grafts[0][1]["connection1"].starts_as_residual:
        changed = f"what this {own_class(model).__name__} computes changes"
        message = f"{connection} is not the residual add at the start: {changed}"
        warnings.warn(message, NoResidualWarning, stacklevel=2)
    for block, attributes in grafts:  # only now that nothing can fail
        graft(block, find_mixin(block), **attributes)
        place_ways(block, attributes["connection1"].ways > 1)
    for part in find_parts(model):
        if not isinstance(part, ConnectedModel):
            architecture = getattr(part, "pretrained_cfg", {}).get("architecture", "")
            graft(part, MIXINS.get(type(part), ConnectedModel), residual_architecture=architecture)
        label_model(part)
    place_borders(model)
    if stream_dtype is not None:
        set_stream_dtype(model, stream_dtype)
    if recompute:
        recompute_streams(model, recompute)
    return model


def check_seam(model: Any, new: Any) -> None:
    """Raises ValueError where some blocks would have a history and others streams, or one that began elsewhere."""
    for part in model.modules():
        if isinstance(part, Connection) and part.copies > 1 and new.copies > 1:
            histories = [one.name for one in (new, part) if isinstance(one, HistoryConnection)]
            if histories:
                raise ValueError(
                    f"cannot put {new.name} beside the {part.name} that this {own_class(model).__name__} has already: "
                    f"{histories[0]} takes all its blocks in one call, and no streams beside it"
                )


def place_history(model: Any, chosen: list[Any]) -> dict[Any, list[Place]]:
    """The places of the sub-layers of blocks in their histories: one for each run of blocks that follow each other."""
    numbers = {id(block) for block in chosen}
    places: dict[Any, list[Place]] = {}
    for run in stages(model):
        layer = number = 0
        for block in run:
            if id(block) not in numbers:
                layer = number = 0
                continue
            places[block] = [Place(layer + k, number, k) for k in range(find_mixin(block).adds)]
            layer, number = layer + len(places[block]), number + 1
    return places


def recompute_streams(model: Any, every: int) -> nn.Module:
    """Keep less for backward: branch outputs, and the streams of every so many blocks only.

    The streams in between are computed again in backward, by the update rule alone, no branch runs twice
    (mHC, arXiv 2512.24880, section 4.3). Values and gradients stay what they are, to the bit. Through torch.compile the
    compiler does the same in the graph that it makes; compile the model, not its blocks: what goes from one graph to
    the next is kept. So are streams behind something that replaces the tensor between two blocks, as FSDP2 does;
    hooks on saved tensors see them there alone.

    Args:
        model: a model with connections.
        every: blocks of a run (a stage) from one that keeps its streams to the next; 0 keeps them all.

    Returns:
        The same model object.

    Raises:
        ValueError: every < 0, or a model without connections.
    """
    check_count("recompute", every, 0)
    if not any(isinstance(part, StreamConnection) for part in model.modules()):
        name = own_class(model).__name__
        raise ValueError(f"recompute={every} needs a model with connections that carry streams, not this {name}")
    for run in stages(model):
        groups = (run[i : i + every] for i in range(0, len(run), every)) if every else [run]
        for group in groups:
            parts = [[part for part in block.children() if isinstance(part, StreamConnection)] for block in group]
            for i, (own, following) in enumerate(zip(parts, [*parts[1:], []], strict=True)):
                for k, part in enumerate(own):
                    part.recompute = every > 0 and (i > 0 or k > 0)
                    part.records = every > 0 and (part is not own[-1] or following != [])
    return model


def set_stream_dtype(model: Any, dtype: torch.dtype | str | None) -> nn.Module:
    """Store the streams of a model in a type of their own: bfloat16 halves what they take of memory and of its time.

    Streams are still mixed in float32, from float32 coefficients, and each is rounded once when it is written; a branch
    gets its input in the type of the model's parameters, and so do the blocks and norms behind the last connection.
    Weights, checkpoints and names know nothing of it.

    Args:
        model: a model with connections.
        dtype: bfloat16, float16 or float32, or their names; None for that of the tensor that enters, which in timm's
            ViTs is float32 under autocast too.

    Returns:
        The same model object.

    Raises:
        ValueError: another type, or a model without connections.
    """
    known = {str(one).removeprefix("torch."): one for one in STREAM_DTYPES}
    chosen = known.get(str(dtype).removeprefix("torch."))
    if dtype is not None and chosen is None:
        raise ValueError(f"stream_dtype must be one of {', '.join(known)}, got {dtype}")
    connections = [part for part in model.modules() if isinstance(part, StreamConnection)]
    if not connections:
        name = own_class(model).__name__
        raise ValueError(f"stream_dtype={dtype} needs a model with connections that carry streams, not this {name}")
    for connection in connections:
        connection.stream_dtype = chosen
    place_borders(model.model if isinstance(model, FeatureGetterNet) else model)
    return model


def find_parts(model: Any) -> list[Any]:
    """The model, and the encoder in it that has the blocks and a row of its own."""
    owner, _, _ = find_family(model).blocks.rpartition(".")
    return [model] if not owner or "*" in owner else [model, model.get_submodule(owner)]


def check_residual(candidates: list[Any], blocks: Blocks) -> None:
    """Raise ValueError where a connection of the chosen blocks is not the residual add, or later ones need it."""
    chosen = choose_blocks(blocks, candidates)
    for i in chosen:
        following: Any = next(iter(connections_of(candidates[i + 1])), None) if i + 1 < len(candidates) else None
        if isinstance(following, HistoryConnection) and i + 1 not in chosen and following.place.layer > 0:
            raise ValueError(
                f"blocks={blocks!r} takes {following.name} from blocks whose outputs later ones read; "
                "take it from the last blocks, or from all"
            )
        for name, module in candidates[i].named_children():
            if isinstance(module, Connection) and not is_residual(module):
                reason = "any more: it has left its initial values" if module.starts_as_residual else "at any values"
                raise ValueError(
                    f"{name} of a {own_class(candidates[i]).__name__} is no residual add {reason}, and taking it away "
                    "would change the model"
                )


def remove_connections(model: Any, blocks: Blocks = None) -> None:
    """Put residual adds where the connections of these blocks are, whatever those are by now."""
    candidates = [block for column in find_columns(model, find_family(model)) for block in column]
    chosen = [candidates[i] for i in choose_blocks(blocks, candidates) if isinstance(candidates[i], ConnectedBlock)]
    for block in chosen:
        connections = [name for name, module in block.named_children() if isinstance(module, Connection)]
        place_ways(block, False)
        ungraft(block, "channels_first", "entry_rate", "exit_rate", "restores_dtype", *connections)
    place_borders(model)
    if not any(isinstance(block, ConnectedBlock) for block in candidates):
        family = find_family(model)
        if family.exit and isinstance(model.get_submodule(family.exit), Exit):
            ungraft(model.get_submodule(family.exit), "stream_dim", "tap")
    for part in find_parts(model):
        label_model(part)
        if not any(isinstance(block, ConnectedBlock) for block in candidates):
            ungraft(part, "connection", "residual_architecture")


def is_residual(connection: Any) -> bool:
    """Whether every parameter has its initial value, and that is the residual add."""
    if not connection.starts_as_residual or getattr(connection, "arrangement", "sequential") != "sequential":
        return False
    initial = copy.deepcopy(connection)
    initial.reset_parameters()
    return all(
        ours.is_meta or torch.equal(ours, theirs)
        for ours, theirs in zip(connection.parameters(), initial.parameters(), strict=True)
    )


OPTIONS = {"tanh": True, "norm": True, "arrangement": "sequential", "time": False, "entry": "copies"}


def list_conversions(model: Any) -> list[dict[str, Any]]:
    """The calls of ``convert`` that make the connections that a model has."""
    blocks = [block for column in find_columns(model, find_family(model)) for block in column]
    steps: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        if isinstance(block, ConnectedBlock):
            connection: Any = block.connection1  # type: ignore[attr-defined]
            options = {key: getattr(connection, key, default) for key, default in OPTIONS.items()}
            step = {"connection": connection.name} | {k: v for k, v in options.items() if v != OPTIONS[k]}
            for known in steps:
                if {**known, "blocks": None} == {**step, "blocks": None}:
                    known["blocks"].append(i)
                    break
            else:
                steps.append({**step, "blocks": [i]})
    if len(steps) == 1 and steps[0]["blocks"] == [
        i for i, b in enumerate(blocks) if not find_mixin(b).find_obstacle(b)
    ]:
        del steps[0]["blocks"]
    return steps


def label_model(model: Any) -> None:
    """Write the connections into the model: the attribute ``connection``, and what timm saves for the hub."""
    steps = list_conversions(model)
    model.connection = "+".join(dict.fromkeys(step["connection"] for step in steps)) or "residual"
    if model.residual_architecture:
        name = "_".join([model.residual_architecture, *(step["connection"] for step in steps[:1])])
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": name}
    arguments = {f"connection_{key}": value for step in steps[:1] for key, value in step.items() if key != "connection"}
    if steps[1:]:
        arguments["connection_more"] = steps[1:]
    if hasattr(model, "_model_args") or arguments:
        kept = {k: v for k, v in getattr(model, "_model_args", {}).items() if not k.startswith("connection_")}
        model._model_args = kept | arguments
