"""A timm transformer in, the same transformer with connections out.

``convert`` swaps the classes of a model and of its blocks for subclasses that only differ in what
stands where the residual adds were: no module is moved, so the keys of the state dict, hooks,
``isinstance`` and the weights stay, and a family costs one block forward here (``BLOCKS``) and the
names of its entry and exit (``MODELS``).
"""

import functools
import inspect
from dataclasses import dataclass, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, Optional, SupportsIndex

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models import vision_transformer as timm_vit
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hcvision.connections import Connection, build_connection, expand_streams, parse_connection, reduce_streams


class Grafted:
    """In front of a module's own class. Pickled and copied by the pair (mixin, class) it was made of."""

    grafted: tuple[type, type]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

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
        "base_forward": _renamed(cls.forward, "base_forward"),
    }
    return type(f"Connected{cls.__name__}", (mixin, cls), namespace)


def _renamed(function: FunctionType, name: str) -> FunctionType:
    """The same code under another name, which TorchScript takes from the function, not the attribute."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__annotations__, copy.__kwdefaults__ = function.__annotations__, function.__kwdefaults__
    return copy


def _new(mixin: type, cls: type) -> nn.Module:
    subclass = _subclass(mixin, cls)
    return subclass.__new__(subclass)


def _graft(module: nn.Module, mixin: type, **attributes: Any) -> nn.Module:
    cls: Any = type(module)
    module.__class__ = _subclass(mixin, cls)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Entry(Grafted):
    """The last module before the blocks: what comes out of it enters the streams."""

    def forward(self, x: Tensor) -> Tensor:
        return expand_streams(self.base_forward(x), self.rate)


class Exit(Grafted):
    """The final norm: it sees the mean of the streams."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base_forward(reduce_streams(x, self.rate))


class PreNormBlock(Grafted):
    """timm.models.vision_transformer.Block."""

    sublayers = 2

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:
        y, c = self.connection1.width_connection(x)
        y = self.drop_path1(self.ls1(self.attn(self.norm1(y), attn_mask=attn_mask, is_causal=is_causal)))
        x = self.connection1.depth_connection(x, y, c)
        y, c = self.connection2.width_connection(x)
        y = self.drop_path2(self.ls2(self.mlp(self.norm2(y))))
        return self.connection2.depth_connection(x, y, c)


@torch.fx.wrap
def leave_streams(feature: Tensor, rate: int, dim: int) -> Tensor:
    """The mean over streams of a map (B, n*E, H, W) or of tokens (B, N, n*E); what has E channels has left them."""
    axis = 1 if feature.dim() == 4 else -1
    if rate == 1 or feature.shape[axis] != rate * dim:
        return feature
    return reduce_streams(feature.movedim(axis, -1), rate).movedim(-1, axis)


class ConnectedModel(Grafted):
    """What the model itself has to know: which tensors are streams, and which parameters do not decay."""

    def forward_intermediates(self, *args, **kwargs):
        features = super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]
        return tree_map(self._leave, features)

    def _leave(self, feature: Any) -> Any:
        traceable: Any = (Tensor, torch.fx.Proxy)
        return (
            leave_streams(feature, self.connection_rate, self.embed_dim) if isinstance(feature, traceable) else feature
        )

    def prune_intermediate_layers(self, *args, **kwargs):
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        _attach_exit(self)
        return kept

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = set(super().no_weight_decay())  # type: ignore[misc]
        for prefix, module in self.named_modules():
            if isinstance(module, Connection):
                names.update(f"{prefix}.{name}" for name in module.no_weight_decay())
        return names


@dataclass(frozen=True)
class Family:
    """Where a model class keeps its blocks, and the modules just before and after them."""

    blocks: str
    entry: str
    exit: str


BLOCKS: dict[type, Any] = {
    timm_vit.Block: PreNormBlock,
}

MODELS: dict[type, Family] = {
    timm_vit.VisionTransformer: Family("blocks", entry="norm_pre", exit="norm"),
}


def convert(model: Any, connection: str, **options) -> nn.Module:
    """Put connections where a timm transformer has residual adds, in place.

    At their initial values the connections are the residual adds: the outputs stay what they were
    (FC to the bit, HC too, up to the rounding of a mean over n equal numbers).

    Args:
        model: a timm model, or its ``features_only`` wrapper.
        connection: ``dhc2``, ``sfc4``, ...; ``residual`` leaves the model as it is.
        **options: options of ``build_connection``: ``tanh``, ``norm``, ``arrangement``.

    Returns:
        The same model object.

    Raises:
        ValueError: an unknown connection, a model that has connections already, a model or block
            class that is not supported, a dim that the frac rate does not divide.
    """
    kind, rate = parse_connection(connection)
    if isinstance(model, FeatureGetterNet):
        convert(model.model, connection, **options)
        return model
    if isinstance(model, ConnectedModel):
        raise ValueError(f"{type(model).grafted[1].__name__} has connections already ({model.connection})")
    if kind == "residual":
        return model
    family = MODELS.get(type(model))
    if family is None:
        known = ", ".join(cls.__name__ for cls in MODELS)
        raise ValueError(f"cannot convert a {type(model).__name__}; the model classes that work: {known}")
    blocks = list(model.get_submodule(family.blocks))
    for block in blocks:
        if type(block) not in BLOCKS:
            known = ", ".join(cls.__name__ for cls in BLOCKS)
            raise ValueError(f"cannot convert blocks of class {type(block).__name__}; the classes that work: {known}")

    layer_index = 0
    grafts: list[tuple[nn.Module, Any, dict[str, Connection]]] = []
    for block in blocks:
        mixin = BLOCKS[type(block)]
        like = next(block.parameters())
        connections = {}
        for number in range(1, mixin.sublayers + 1):
            connections[f"connection{number}"] = build_connection(
                connection, model.embed_dim, layer_index, device=like.device, dtype=like.dtype, **options
            ).train(block.training)
            layer_index += 1
        grafts.append((block, mixin, connections))
    for block, mixin, connections in grafts:  # only now that nothing can fail
        _graft(block, mixin, **connections)
    _graft(model, ConnectedModel, connection=connection, connection_rate=rate if kind.endswith("hc") else 1)
    if model.connection_rate > 1:
        _graft(model.get_submodule(family.entry), Entry, rate=rate)
    _attach_exit(model)
    return model


def _attach_exit(model: Any) -> None:
    norm = model.get_submodule(MODELS[type(model).grafted[1]].exit)
    if model.connection_rate > 1 and not isinstance(norm, Exit):
        _graft(norm, Exit, rate=model.connection_rate)


default_cfgs: dict[str, Any] = {}


def register(base: str, connection: str) -> str:
    """Register ``<base>_<connection>`` with timm, unless it is there, and return that name.

    The new entrypoint takes what the one of ``base`` takes, and the connection's options as
    ``connection_tanh``, ``connection_norm`` and ``connection_arrangement``.

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

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        prefix = "connection_"
        options = {key.removeprefix(prefix): kwargs.pop(key) for key in list(kwargs) if key.startswith(prefix)}

        def build(**model_kwargs) -> nn.Module:
            return convert(base_entrypoint(pretrained=False, **model_kwargs), connection, **options)

        feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
        return build_model_with_cfg(
            build, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{base} with {connection} in place of its residual adds."
    base_cfg: Any = timm.get_pretrained_cfg(base)
    cfg = replace(base_cfg, tag=None, architecture=name)
    cfg = replace(cfg, url="", file=None, hf_hub_id=None, custom_load=False, origin_url=None)
    default_cfgs.update(timm.models.generate_default_cfgs({name: cfg}))
    register_model(entrypoint)
    return name


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """timm's filter; into a residual checkpoint it puts the model's own initial connection parameters.

    Raises:
        RuntimeError: the checkpoint holds some of the model's connection parameters, but not all.
    """
    state_dict = timm_vit.checkpoint_filter_fn(state_dict, model)
    own = {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        if isinstance(module, Connection)
        for name, value in module.state_dict().items()
    }
    missing = [name for name in own if name not in state_dict]
    if missing and len(missing) < len(own):
        raise RuntimeError(
            f"the checkpoint has {len(own) - len(missing)} of {len(own)} connection parameters; "
            f"missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return {**own, **state_dict}


def create_model(name: str, connection: str | None = None, *, pretrained: bool = False, **kwargs) -> nn.Module:
    """``timm.create_model`` with one argument more.

    Args:
        name: a timm name, with or without a pretrained tag.
        connection: ``dhc3``, ``sfc2``, ...; None or ``residual`` gives the timm model itself.
        pretrained: load the weights of ``name``; connections start at their initial values.
        **kwargs: everything ``timm.create_model`` takes, and ``connection_tanh``,
            ``connection_norm``, ``connection_arrangement``.

    Raises:
        ValueError: an unknown connection, or a model that cannot be converted.
        RuntimeError: an unknown model.
    """
    if connection is None or parse_connection(connection)[0] == "residual":
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    base = name.partition(".")[0]
    twin = register(base, connection)
    if pretrained and "pretrained_cfg" not in kwargs:
        cfg: Any = timm.get_pretrained_cfg(name)
        kwargs["pretrained_cfg"] = replace(cfg, architecture=twin)
    return timm.create_model(twin, pretrained=pretrained, **kwargs)
