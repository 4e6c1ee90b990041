"""A timm transformer in, the same transformer with connections out.

``convert`` swaps the classes of a model and of its blocks for subclasses that only differ in what
stands where the residual adds were: no module is moved, so the keys of the state dict, hooks,
``isinstance`` and the weights stay. What each block adds, and where a model keeps its blocks, is in
``hcvision.families``.
"""

import copy
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, SupportsIndex

import timm
import torch
from timm.models import (
    build_model_with_cfg,
    load_model_config_from_hf,
    load_state_dict,
    parse_model_name,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import load_model_config_from_path
from timm.models.cait import Cait
from timm.models.hiera import Hiera
from timm.models.xcit import Xcit
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hcvision.connections import (
    KINDS,
    Connection,
    StreamConnection,
    build_connection,
    check_count,
    parse_connection,
    reduce_streams,
)
from hcvision.families import BLOCKS, MODELS, ConnectedBlock, Family
from hcvision.successors import BUILDERS as BUILDERS  # registered there

Blocks = slice | str | Iterable[int] | Callable[[int, nn.Module], bool] | None


class Grafted:
    """Between a mixin and a module's own class. Pickled and copied by that pair."""

    grafted: tuple[type, type]

    def __reduce_ex__(self, protocol: SupportsIndex):
        return _new, type(self).grafted, *super().__reduce_ex__(protocol)[2:]


@functools.cache
def _subclass(mixin: Any, cls: Any) -> Any:
    annotations = {**getattr(cls, "__annotations__", {}), **inspect.get_annotations(mixin)}
    namespace = {
        "__module__": mixin.__module__,
        "__doc__": cls.__doc__,
        "__annotations__": annotations,
        "grafted": (mixin, cls),
    }
    for name in ("forward", "forward_cls"):
        if hasattr(cls, name):
            namespace[f"base_{name}"] = _renamed(getattr(cls, name), f"base_{name}")
    return type(f"Connected{cls.__name__}", (mixin, Grafted, cls), namespace)


def _renamed(function: FunctionType, name: str) -> FunctionType:
    """The same code under another name, which TorchScript takes from the function, not the attribute."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__annotations__, copy.__kwdefaults__ = function.__annotations__, function.__kwdefaults__
    return copy


def _new(mixin: type, cls: type) -> nn.Module:
    subclass = _subclass(mixin, cls)
    return subclass.__new__(subclass)


def _graft(module: nn.Module, mixin: type, **attributes: Any) -> None:
    cls: Any = type(module)
    module.__class__ = _subclass(mixin, cls)
    for name, value in attributes.items():
        setattr(module, name, value)


def _ungraft(module: Any, *attributes: str) -> None:
    module.__class__ = own_class(module)
    for name in attributes:
        delattr(module, name)


def own_class(module: nn.Module) -> type:
    """The class that timm gave the module."""
    return type(module).grafted[1] if isinstance(module, Grafted) else type(module)


@torch.fx.wrap
def leave_streams(feature: Tensor, dim: int) -> Tensor:
    """The mean over the copies of a map (B, n*dim, H, W) or of tokens (..., n*dim); what is dim wide has left them.

    n need not be whole, as for ghc2x3.
    """
    last = feature.dim() - 1
    axis = 1 if feature.dim() == 4 and feature.shape[1] >= dim else last
    rate, rest = feature.shape[axis] // dim, feature.shape[axis] % dim
    if rate <= 1 and rest == 0:
        return feature
    feature = feature.movedim(axis, last)
    if rest > 0:  # a part of x once more than the rest of it
        once_more = [feature[..., k * dim : k * dim + rest] for k in range(rate + 1)]
        others = [feature[..., k * dim + rest : (k + 1) * dim] for k in range(rate)]
        parts = [reduce_streams(torch.cat(copies, dim=-1), len(copies)) for copies in (once_more, others)]
        return torch.cat(parts, dim=-1).movedim(last, axis)
    return reduce_streams(feature, rate).movedim(last, axis)


class Exit:
    """The module behind the last block: it sees the mean of the streams, however many come out of the blocks."""

    stream_dim: int

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.base_forward(leave_streams(x, self.stream_dim))


class ConnectedModel:
    """What the model itself has to know: which tensors are streams, and which parameters do not decay."""

    connection: str  # the name, or several joined by +

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward_intermediates(self, *args, **kwargs):
        out = super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]
        family = _family(self)  # type: ignore[arg-type]
        call = inspect.signature(own_class(self).forward_intermediates).bind(self, *args, **kwargs)  # type: ignore
        if not family.is_tapped or "." in family.blocks or (family.exit and call.arguments.get("norm")):
            return out  # taps at the ends of stages, or of a part that is converted itself, or behind the exit
        dim = self.embed_dim
        traceable: Any = (Tensor, torch.fx.Proxy)

        def leave(taps: Any) -> Any:
            return tree_map(lambda tap: leave_streams(tap, dim) if isinstance(tap, traceable) else tap, taps)

        def leave_last(x: Any) -> Any:
            return x if family.exit else leave(x)

        if isinstance(out, tuple):
            return leave_last(out[0]), leave(out[1])
        if isinstance(out, dict):
            return {key: (leave_last if key == "image_features" else leave)(part) for key, part in out.items()}
        return leave(out)

    def prune_intermediate_layers(self, *args, **kwargs):
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        _place_borders(self)
        return kept

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = set(getattr(super(), "no_weight_decay", set)())
        for prefix, module in self.named_modules():
            if isinstance(module, Connection):
                names.update(f"{prefix}.{name}" for name in module.no_weight_decay())
        return names


class ClassAttentionModel(ConnectedModel):
    """CaiT, XCiT: behind the blocks the class token attends to x."""

    def forward_cls(self, x: Tensor) -> Tensor:
        return self.base_forward_cls(leave_streams(x, self.embed_dim))


class HieraModel(ConnectedModel):
    """Hiera taps blocks inside its stages too (``coarse=False``)."""

    def forward_intermediates(self, *args, **kwargs):
        features = super().forward_intermediates(*args, **kwargs)
        call = inspect.signature(Hiera.forward_intermediates).bind(self, *args, **kwargs)
        call.apply_defaults()
        if call.arguments["coarse"]:
            return features
        taken, _ = feature_take_indices(len(self.blocks), call.arguments["indices"])
        taps = features if call.arguments["intermediates_only"] else features[1]
        for k, block in enumerate(taken):
            tap = taps[k].movedim(1, -1) if call.arguments["output_fmt"] == "NCHW" else taps[k]
            tap = leave_streams(tap, self.blocks[block].dim_out)
            taps[k] = tap.movedim(-1, 1) if call.arguments["output_fmt"] == "NCHW" else tap
        return features


MIXINS: dict[type, type[ConnectedModel]] = {Cait: ClassAttentionModel, Hiera: HieraModel, Xcit: ClassAttentionModel}


# Which blocks a model has


def _columns(model: Any, family: Family) -> list[list[Any]]:
    """The blocks of a model, in order, by container."""
    containers: list[nn.Module] = [model]
    for part in family.blocks.split("."):
        containers = [
            child
            for container in containers
            for child in (container.children() if part == "*" else [container.get_submodule(part)])
        ]
    return [list(_flat(container)) for container in containers]


def stages(model: Any) -> list[list[Any]]:
    """The blocks that have connections, or can have them, in runs through which streams of one width pass.

    Raises:
        ValueError: a model or a block that ``convert`` does not take.
    """
    family = _family(model)
    breaks = set(family.breaks(model))
    runs: list[list[Any]] = []
    for column in _columns(model, family):
        runs.append([])
        dim = 0
        for i, block in enumerate(column):
            if _mixin(block).why_not(block):
                runs.append([])
                continue
            if i in breaks or (dim and _mixin(block).dim(block) != dim):
                runs.append([])
            dim = _mixin(block).dim(block)
            runs[-1].append(block)
    return [run for run in runs if run]


def _flat(container: nn.Module) -> Iterator[nn.Module]:
    for child in container.children():
        if isinstance(child, nn.Sequential):
            yield from _flat(child)
        else:
            yield child


def _family(model: nn.Module) -> Family:
    family = MODELS.get(own_class(model))
    if family is None:
        raise ValueError(f"cannot convert a {own_class(model).__name__}{_blocks_of(model)}; {_what_works()}")
    return family


def _blocks_of(model: nn.Module) -> str:
    """What an unknown model is made of: the classes of timm's in its longest container of modules."""
    containers = []
    for module in model.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            own = [type(child).__name__ for child in module if not type(child).__module__.startswith("torch.")]
            containers.append(own)
    longest = max(containers, key=len, default=[])
    return f" with blocks of class {Counter(longest).most_common(1)[0][0]}" if longest else ""


def _what_works() -> str:
    return f"the families that work: {', '.join(families())}"


def families() -> list[str]:
    """The modules of ``timm.models`` whose models ``convert`` takes."""
    return sorted({cls.__module__.rpartition(".")[2] for cls in MODELS})


def _mixin(block: nn.Module) -> type[ConnectedBlock]:
    mixin = BLOCKS.get(own_class(block))
    if mixin is None:
        known = ", ".join(sorted({cls.__name__ for cls in BLOCKS}))
        raise ValueError(f"cannot convert blocks of class {own_class(block).__name__}; the classes that work: {known}")
    return mixin


def _chosen(blocks: Blocks, candidates: list[Any]) -> list[int]:
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
    able = [i for i in chosen if not _mixin(candidates[i]).why_not(candidates[i])]
    if not able:
        reasons = {f": {_mixin(candidates[i]).why_not(candidates[i])}" for i in chosen} or {""}
        raise ValueError(
            f"blocks={blocks!r} chooses none of the {count} blocks that can have connections{reasons.pop()}"
        )
    return able


def convert(model: Any, connection: str, *, blocks: Blocks = None, recompute: int = 0, **options) -> nn.Module:
    """Put connections where a timm model has residual adds, in place.

    At their initial values the connections are the residual adds: the outputs stay what they were
    (FC to the bit, HC too, up to the rounding of a mean over n equal numbers). HC streams are entered
    before the first block of a run of converted blocks and left, by their mean, behind its last one;
    a hierarchical model has a run per stage.

    Args:
        model: a timm model, or its ``features_only`` wrapper. Weights stay where they are.
        connection: ``dhc2``, ``sfc4``, ...; ``residual`` takes connections away again.
        blocks: which blocks, counted from 0 over the whole model: a slice, the same as text (``"6:"``),
            indices, or a function of index and block; None for all that can have connections. Call
            again for other blocks with another connection.
        recompute: compute the streams again in backward, from every so many blocks; see ``recompute_streams``.
        **options: options of ``build_connection``: ``tanh``, ``norm``, ``arrangement``, ``backend``.

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
        convert(model.model, connection, blocks=blocks, recompute=recompute, **options)
        return model
    candidates = [block for column in _columns(model, _family(model)) for block in column]
    if kind == "residual":
        if isinstance(model, ConnectedModel):
            _take_away(model, candidates, blocks)
        return model

    grafts: list[tuple[Any, dict[str, Any]]] = []
    first = [0]  # the number of the first sub-layer of each block
    for block in candidates:
        first.append(first[-1] + _mixin(block).adds)
    for i in _chosen(blocks, candidates):
        block, mixin = candidates[i], _mixin(candidates[i])
        if isinstance(block, ConnectedBlock):
            raise ValueError(
                f"block {i} of this {own_class(model).__name__} has a connection already ({block.connection1.name})"
            )
        if kind == "ghc" and hasattr(mixin, "carry1"):
            raise ValueError(
                f"{connection} cannot take the adds of a {own_class(block).__name__}, which scales x itself; "
                f"{', '.join(kind for kind in KINDS if kind != 'ghc')} can"
            )
        like = next(block.parameters())
        new: dict[str, Any] = {"channels_first": mixin.is_channels_first(block), "entry_rate": 1, "exit_rate": 1}
        for k in range(mixin.adds):
            new[f"connection{k + 1}"] = build_connection(
                connection, mixin.dim(block), first[i] + k, device=like.device, dtype=like.dtype, **options
            ).train(block.training)
        grafts.append((block, new))
    for block, attributes in grafts:  # only now that nothing can fail
        _graft(block, _mixin(block), **attributes)
    for part in _parts(model):
        if not isinstance(part, ConnectedModel):
            architecture = getattr(part, "pretrained_cfg", {}).get("architecture", "")
            _graft(part, MIXINS.get(type(part), ConnectedModel), residual_architecture=architecture)
        _label(part)
    _place_borders(model)
    if recompute:
        recompute_streams(model, recompute)
    return model


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
    runs = [run for run in stages(model) if any(isinstance(block, ConnectedBlock) for block in run)]
    if not runs:
        raise ValueError(f"recompute={every} needs a model with connections, this {own_class(model).__name__} has none")
    for run in runs:
        groups = (run[i : i + every] for i in range(0, len(run), every)) if every else [run]
        for group in groups:
            parts = [[part for part in block.children() if isinstance(part, StreamConnection)] for block in group]
            for i, (own, following) in enumerate(zip(parts, [*parts[1:], []], strict=True)):
                for k, part in enumerate(own):
                    part.recompute = every > 0 and (i > 0 or k > 0)
                    part.records = every > 0 and (part is not own[-1] or following != [])
    return model


def _parts(model: Any) -> list[Any]:
    """The model, and the encoder in it that has the blocks and a row of its own."""
    owner, _, _ = _family(model).blocks.rpartition(".")
    return [model] if not owner or "*" in owner else [model, model.get_submodule(owner)]


def _take_away(model: Any, candidates: list[Any], blocks: Blocks) -> None:
    chosen = [candidates[i] for i in _chosen(blocks, candidates) if isinstance(candidates[i], ConnectedBlock)]
    for block in chosen:
        for name, module in block.named_children():
            if isinstance(module, Connection) and not _is_residual(module):
                raise ValueError(
                    f"{name} of a {own_class(block).__name__} is no residual add any more: it has left its initial "
                    "values, and taking it away would change the model"
                )
    for block in chosen:
        connections = [name for name, module in block.named_children() if isinstance(module, Connection)]
        _ungraft(block, "channels_first", "entry_rate", "exit_rate", *connections)
    _place_borders(model)
    if not any(isinstance(block, ConnectedBlock) for block in candidates):
        family = _family(model)
        if family.exit and isinstance(model.get_submodule(family.exit), Exit):
            _ungraft(model.get_submodule(family.exit), "stream_dim")
    for part in _parts(model):
        _label(part)
        if not any(isinstance(block, ConnectedBlock) for block in candidates):
            _ungraft(part, "connection", "residual_architecture")


def _is_residual(connection: Any) -> bool:
    """Whether every parameter has its initial value, and that is the residual add."""
    if getattr(connection, "arrangement", "sequential") != "sequential":
        return False
    initial = copy.deepcopy(connection)
    initial.reset_parameters()
    return all(
        ours.is_meta or torch.equal(ours, theirs)
        for ours, theirs in zip(connection.parameters(), initial.parameters(), strict=True)
    )


def _place_borders(model: Any) -> None:
    """Say where streams are entered and left, for the connections that the blocks have now."""
    family = _family(model)
    breaks = set(family.breaks(model))
    for column in _columns(model, family):
        carried = [_carried(block) for block in column]
        for i, block in enumerate(column):
            if not isinstance(block, ConnectedBlock):
                continue
            rate = carried[i][0]
            goes_on = i + 1 < len(column) and carried[i + 1] == carried[i] and i + 1 not in breaks
            own: list[Any] = [part for part in block.children() if isinstance(part, Connection)]
            left_behind = i + 1 == len(column) and family.exit and not own[-1].has_exit
            block.entry_rate = 1 if i > 0 and carried[i - 1] == carried[i] and i not in breaks else rate
            block.exit_rate = 1 if goes_on or left_behind else rate
            for connection in own:
                if connection.has_exit:
                    connection.place_exit(connection is own[-1] and block.exit_rate > 1)
        if family.exit and any(rate > 1 for rate, *_ in carried):
            norm = model.get_submodule(family.exit)
            if not isinstance(norm, Exit):
                _graft(norm, Exit, stream_dim=model.embed_dim)


def _carried(block: Any) -> tuple[int, ...]:
    """How many copies of x a block leaves, and of what width, in which streams; (1, 0) without connections."""
    if not isinstance(block, ConnectedBlock):
        return 1, 0
    connection = block.connection1  # type: ignore[attr-defined]
    return connection.copies, connection.dim, connection.streams, connection.views


OPTIONS = {"tanh": True, "norm": True, "arrangement": "sequential"}


def _steps(model: Any) -> list[dict[str, Any]]:
    """The calls of ``convert`` that make the connections that a model has."""
    blocks = [block for column in _columns(model, _family(model)) for block in column]
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
    if len(steps) == 1 and steps[0]["blocks"] == [i for i, b in enumerate(blocks) if not _mixin(b).why_not(b)]:
        del steps[0]["blocks"]
    return steps


def _label(model: Any) -> None:
    """Write the connections into the model: the attribute ``connection``, and what timm saves for the hub."""
    steps = _steps(model)
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


# Names


default_cfgs: dict[str, Any] = {}


def register(base: str, connection: str) -> str:
    """Register ``<base>_<connection>`` with timm, unless it is there, and return that name.

    The new entrypoint takes what the one of ``base`` takes, and ``connection_blocks``,
    ``connection_tanh``, ``connection_norm``, ``connection_arrangement``, ``connection_backend``,
    ``connection_recompute`` for ``convert``.
    ``connection_more`` is a list of further calls of ``convert``, each a dict of its arguments.

    Raises:
        ValueError: an unknown connection.
        RuntimeError: ``base`` is not a timm name.
    """
    parse_connection(connection)
    name = f"{base}_{connection}"
    if timm.is_model(name):
        return name
    if not timm.is_model(base):
        raise RuntimeError(f"Unknown model ({base})")
    base_entrypoint = timm.model_entrypoint(base)

    def entrypoint(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs) -> nn.Module:
        options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("connection_")}
        more = options.pop("connection_more", ())
        cfg: Any = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        own = pretrained and _has_connections(cfg, name)
        feature_cfg: dict[str, Any] = {"feature_cls": "getter"}
        out_indices = kwargs.pop("out_indices", None)

        def build(**model_kwargs) -> nn.Module:
            # A residual checkpoint is loaded by timm's own entrypoint, as if we were not there.
            model = base_entrypoint(pretrained=pretrained and not own, pretrained_cfg=cfg, **model_kwargs)
            model.pretrained_cfg = {**model.pretrained_cfg, "architecture": base}  # what it is without connections
            convert(model, connection, **{key.removeprefix("connection_"): value for key, value in options.items()})
            for step in more:
                convert(model, **step)
            default = 3 if _family(model).is_tapped else len(model.feature_info)  # the last three blocks, or all stages
            feature_cfg["out_indices"] = out_indices or default
            return model

        return build_model_with_cfg(
            build,
            name,
            own,
            pretrained_cfg=cfg,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=feature_cfg,
            **kwargs,
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{base} with {connection} in place of its residual adds."
    base_cfg: Any = timm.get_pretrained_cfg(base)
    cfg = replace(base_cfg, tag=None, architecture=name)
    cfg = replace(cfg, url="", file=None, hf_hub_id=None, custom_load=False, origin_url=None)
    default_cfgs.update(timm.models.generate_default_cfgs({name: cfg}))
    register_model(entrypoint)
    return name


@register_model
def hcvision_converted(
    pretrained: bool = False, connection_architecture: str | None = None, pretrained_cfg_overlay=None, **kwargs
) -> nn.Module:
    """The model of a name such as ``swin_tiny_patch4_window7_224_dhc3``, which importing hcvision does not register.

    Folders of the hub ask for it, so that ``timm.create_model`` builds what they hold; see ``hcvision.export``.

    Raises:
        ValueError: no such name is given, or its connection is unknown.
        RuntimeError: its base is not a timm name.
    """
    base, _, connection = (connection_architecture or "").rpartition("_")
    if not base:
        raise ValueError(
            "connection_architecture must be a timm name and a connection, such as 'vit_tiny_patch16_224_dhc3', "
            f"got {connection_architecture!r}"
        )
    name = register(base, connection)
    overlay = {**(pretrained_cfg_overlay or {}), "architecture": name}
    model = timm.model_entrypoint(name)(pretrained, pretrained_cfg_overlay=overlay, **kwargs)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": "hcvision_converted"}
    return model


def _has_connections(cfg: Any, name: str) -> bool:
    """Whether a checkpoint was written by the model of that name, and not by its residual twin."""
    if cfg.source in ("local-dir", "hf-hub"):  # its config.json says
        return cfg.architecture == name
    if cfg.state_dict or (cfg.file and not cfg.custom_load):
        return any(".connection1." in key for key in cfg.state_dict or load_state_dict(cfg.file))
    return False


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """timm's filter; into a residual checkpoint it puts the model's own initial connection parameters.

    Raises:
        RuntimeError: the checkpoint holds some of the model's connection parameters, but not all.
    """
    own = {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        if isinstance(module, Connection)
        for name, value in module.state_dict().items()
    }
    trunk = {name: value for name, value in state_dict.items() if name not in own}
    timm_filter = getattr(sys.modules[own_class(model).__module__], "checkpoint_filter_fn", None)
    if timm_filter is not None:
        trunk = timm_filter(trunk, model)
    missing = [name for name in own if name not in state_dict]
    if missing and len(missing) < len(own):
        raise RuntimeError(
            f"the checkpoint has {len(own) - len(missing)} of {len(own)} connection parameters; "
            f"missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return {**trunk, **{name: state_dict.get(name, value) for name, value in own.items()}}


def create_model(name: str, connection: str | None = None, *, pretrained: bool = False, **kwargs) -> nn.Module:
    """``timm.create_model`` with one argument more, for every architecture that ``convert`` takes.

    Args:
        name: a timm name, with or without a pretrained tag, or ``local-dir:`` and ``hf-hub:`` with what
            ``timm.models.save_for_hf`` or ``push_to_hf_hub`` wrote for a model with or without connections.
        connection: ``dhc3``, ``sfc2``, ...; None or ``residual`` gives the timm model itself, or the model
            that the folder holds.
        pretrained: load the weights of ``name``; connections start at their initial values, unless the
            folder brings them.
        **kwargs: everything ``timm.create_model`` takes, and ``connection_blocks``,
            ``connection_tanh``, ``connection_norm``, ``connection_arrangement``, ``connection_backend``,
            ``connection_recompute`` for ``convert``.

    Raises:
        ValueError: an unknown connection, or a model that cannot be converted.
        RuntimeError: an unknown model.
    """
    residual = connection is None or parse_connection(connection)[0] == "residual"
    source, place = parse_model_name(name)
    if source is None:
        if residual:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        base = name.partition(".")[0]
        twin = register(base, connection)  # type: ignore[arg-type]
        if pretrained and "pretrained_cfg" not in kwargs:
            cfg: Any = timm.get_pretrained_cfg(name)
            kwargs["pretrained_cfg"] = replace(cfg, architecture=twin)
        return timm.create_model(twin, pretrained=pretrained, **kwargs)
    load_config = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
    _, saved, _ = load_config(place)
    base, _, suffix = saved.rpartition("_")
    if not timm.is_model(saved) and timm.is_model(base):
        register(base, suffix)
    if residual:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    options = {
        key.removeprefix("connection_"): kwargs.pop(key) for key in list(kwargs) if key.startswith("connection_")
    }
    return convert(timm.create_model(name, pretrained=pretrained, **kwargs), connection, **options)  # type: ignore[arg-type]


def coverage(pattern: str = "") -> Iterator[tuple[str, str, str]]:
    """Try every timm name that matches, on the meta device.

    Yields:
        The name, its module in ``timm.models``, and why it cannot be converted, or nothing.
    """
    for name in timm.list_models(pattern):
        package, _, module = timm.model_entrypoint(name).__module__.rpartition(".")
        if package == "timm.models":
            try:
                convert(timm.create_model(name, device="meta"), "dhc2")
                reason = ""
            except ValueError as error:
                reason = str(error).partition(";")[0]
            except (TypeError, NotImplementedError, RuntimeError) as error:
                reason = f"timm does not build it on the meta device: {error}".partition("\n")[0]
            yield name, module, reason
