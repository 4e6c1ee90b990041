"""timm names of models with connections: registered, built, their weights loaded, what timm has counted."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import timm
from timm.models import (
    build_model_with_cfg,
    load_model_config_from_hf,
    load_state_dict,
    parse_model_name,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn

from hcvision.connections import Connection, parse_connection
from hcvision.models.conversion import convert
from hcvision.models.grafting import own_class
from hcvision.models.stages import find_family

# Names
default_cfgs: dict[str, Any] = {}


def register(base: str, connection: str) -> str:
    """Register ``<base>_<connection>`` with timm, unless it is there, and return that name.

    The new entrypoint takes what the one of ``base`` takes, and ``connection_blocks``,
    ``connection_tanh``, ``connection_norm``, ``connection_arrangement``, ``connection_backend``,
    ``connection_recompute``, ``connection_stream_dtype`` for ``convert``.
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
        own = pretrained and has_connections(cfg, name)
        feature_cfg: dict[str, Any] = {"feature_cls": "getter"}
        out_indices = kwargs.pop("out_indices", None)

        def build(**model_kwargs) -> nn.Module:
            # A residual checkpoint is loaded by timm's own entrypoint, as if we were not there.
            model = base_entrypoint(pretrained=pretrained and not own, pretrained_cfg=cfg, **model_kwargs)
            model.pretrained_cfg = {**model.pretrained_cfg, "architecture": base}  # what it is without connections
            convert(model, connection, **{key.removeprefix("connection_"): value for key, value in options.items()})
            for step in more:
                convert(model, **step)
            default = (
                3 if find_family(model).is_tapped else len(model.feature_info)
            )  # the last three blocks, or all stages
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

    Folders of the hub ask for it, so that ``timm.create_model`` builds what they hold; see ``hcvision.deploy``.

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


def has_connections(cfg: Any, name: str) -> bool:
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
            ``connection_recompute``, ``connection_stream_dtype`` for ``convert``.

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
