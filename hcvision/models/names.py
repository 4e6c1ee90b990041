"""timm names of models with connections: registered, built, their weights loaded, what timm has counted."""

import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import timm
from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    load_model_config_from_hf,
    load_state_dict,
    parse_model_name,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._hub import load_model_config_from_path
from torch import Tensor, nn

from hcvision.connections import Connection, parse_connection
from hcvision.models.conversion import NoResidualWarning, convert, remove_connections
from hcvision.models.grafting import own_class
from hcvision.models.stages import find_family

# Names
default_cfgs: dict[str, Any] = {}


PLACES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename")  # of weights, in timm's configurations
LOADING = ("cache_dir", "pretrained_strict", "pretrained_model_args")  # arguments of whoever loads them


def register(pattern: str, *connections: str) -> list[str]:
    """Make timm know architectures with connections: ``register("swin_*", "dhc2")``.

    timm's registry knows the names that were registered with it, and asks nobody about others. Importing hcvision
    registers ViTs and DiTs; this registers more, so that ``timm.create_model("swin_tiny_patch4_window7_224_dhc2")``,
    ``timm.list_models("swin_*_dhc2")`` and programs that take timm's names work with them. Each name takes the
    pretrained tags of its base: the weights are those of the residual base, trained without connections, which
    start as its residual adds.

    Args:
        pattern: a timm name, or a pattern of names as ``timm.list_models`` takes it. A pattern leaves out what cannot
            be converted, for which every architecture that matches is built on the meta device, in some tenths of
            a second each.
        connections: ``dhc2``, ``sfc4``, ..., one or more.

    Returns:
        The names, new and known ones: the bases in timm's order, with each connection.

    Raises:
        ValueError: an unknown connection or none; no timm name matches; nothing that matches can be converted, or,
            of a single name, not with each of the connections.
    """
    if not connections:
        raise ValueError(f"register({pattern!r}) needs a connection, such as 'dhc2'")
    for connection in connections:
        if parse_connection(connection)[0] == "residual":
            raise ValueError(f"register({pattern!r}) needs a connection, such as 'dhc2', got {connection!r}")
    known = timm.list_models(pattern)
    bases = [base for base in known if timm.model_entrypoint(base).__module__ != __name__]
    if not bases:
        raise ValueError(
            f"what matches {pattern!r} has connections already"
            if known
            else f"no timm name matches {pattern!r}{say_new_name(pattern)}"
        )
    pairs, refused = [], ""
    for base in bases:
        for connection, reason in try_connections(base, connections):
            if not reason:
                pairs.append((base, connection))
            elif pattern in bases:
                raise ValueError(f"{base} does not take {connection}: {reason}")
            refused = refused or f"{base} with {connection}, for one: {reason}"
    if not pairs:
        raise ValueError(f"nothing that matches {pattern!r} can be converted; {refused}")
    return [register_name(base, connection) for base, connection in pairs]


def register_name(base: str, connection: str) -> str:
    """Register ``<base>_<connection>`` with timm, unless it is there, and return that name.

    The new entrypoint takes what the one of ``base`` takes, and ``connection_blocks``,
    ``connection_tanh``, ``connection_norm``, ``connection_arrangement``, ``connection_entry``, ``connection_backend``,
    ``connection_recompute``, ``connection_stream_dtype``, ``connection_time`` for ``convert``.
    ``connection_more`` is a list of further calls of ``convert``, each a dict of its arguments.

    Raises:
        ValueError: an unknown connection.
        RuntimeError: ``base`` is not a timm name.
    """
    parse_connection(connection)
    name = f"{base}_{connection}"
    if timm.is_model(name):
        return name
    if not timm.is_model(base) or base in get_deprecated_models():
        raise RuntimeError(f"Unknown model ({base}){say_new_name(base)}")
    base_entrypoint = timm.model_entrypoint(base)

    def entrypoint(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs) -> nn.Module:
        options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("connection_")}
        more = options.pop("connection_more", ())
        loading = {key: kwargs.pop(key) for key in LOADING if key in kwargs}
        cfg: Any = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        own = pretrained and has_connections(cfg, name)
        origin: Any = with_origin(cfg, base, name, pretrained, own, tagged=isinstance(pretrained_cfg, str))
        feature_cfg: dict[str, Any] = {"feature_cls": "getter"}
        out_indices = kwargs.pop("out_indices", None)

        def build(**model_kwargs) -> nn.Module:
            # A residual checkpoint is loaded by timm's own entrypoint, as if we were not there.
            model = base_entrypoint(pretrained=pretrained and not own, pretrained_cfg=cfg, **loading, **model_kwargs)
            model.pretrained_cfg = {**model.pretrained_cfg, "architecture": base}  # what it is without connections
            with warnings.catch_warnings():
                if not pretrained or own:  # nothing was computed before that could change
                    warnings.simplefilter("ignore", NoResidualWarning)
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
            pretrained_cfg=origin,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=feature_cfg,
            **loading,
            **kwargs,
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = (
        f"{base} with {connection} in place of its residual adds, and the weights of {base} on request."
    )
    cfgs = {cfg.tag or "": with_note(cfg, say_origin(base, cfg)) for cfg in get_arch_pretrained_cfgs(base).values()}
    if cfgs:
        default_cfgs[name] = DefaultCfg(deque(cfgs), cfgs, any(cfg.has_weights for cfg in cfgs.values()))
    register_model(entrypoint)
    return name


def register_if_new(name: str) -> None:
    """Register a name such as ``swin_tiny_patch4_window7_224_dfc4``, whose base timm knows, unless it is there."""
    base, _, connection = name.rpartition("_")
    if not timm.is_model(name) and timm.is_model(base):
        register_name(base, connection)


def say_new_name(name: str) -> str:
    """What timm calls a model of an old name now, in words, or nothing."""
    now = get_deprecated_models().get(name)
    return f": timm calls it {now} now" if now else ""


# Where weights are from
def say_origin(base: str, cfg: Any) -> str:
    """What the weights are with which a model of this configuration starts, or nothing if there are none."""
    tag = f".{cfg.tag}" if cfg.tag else ""
    return f"initial weights: those of {base}{tag}, trained without connections" if cfg.has_weights else ""


def with_note(cfg: Any, note: str) -> Any:
    return replace(cfg, notes=tuple(dict.fromkeys((*(cfg.notes or ()), note)))) if note else cfg


def with_origin(cfg: Any, base: str, name: str, pretrained: bool, own: bool, tagged: bool) -> Any:
    """The configuration of a model that is built with it, which says where its weights are from, and no more.

    timm writes it into the folders that it saves, whatever was done to the weights until then. It names the tag under
    which the weights are listed, or that the caller gave for a file of residual weights (``tagged``).
    """
    if cfg.source in ("local-dir", "hf-hub"):  # a folder says it of itself
        return with_note(cfg, f"initial weights: of a residual {base}") if pretrained and not own else cfg
    listed = get_arch_pretrained_cfgs(name).get(f"{name}.{cfg.tag}" if cfg.tag else name)
    if pretrained and listed and all((getattr(cfg, at) or None) == (getattr(listed, at) or None) for at in PLACES):
        return with_note(cfg, say_origin(base, listed))
    given = {"tag": None, "description": None, "origin_url": None, "paper_name": None, "paper_ids": None, "notes": None}
    if not pretrained or own:
        return replace(cfg, **given)
    given["tag"] = cfg.tag if tagged else None
    return with_note(replace(cfg, **given), f"initial weights: of a residual {base}")


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
    name = register_name(base, connection)
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
        name: a timm name, with or without a pretrained tag, one such as ``swin_tiny_patch4_window7_224_dfc4`` that
            was not registered included, or ``local-dir:`` and ``hf-hub:`` with what
            ``timm.models.save_for_hf`` or ``push_to_hf_hub`` wrote for a model with or without connections.
        connection: ``dhc3``, ``sfc2``, ...; None or ``residual`` gives the timm model itself, or the model
            that the folder holds.
        pretrained: load the weights of ``name``; connections start at their initial values, unless the
            folder brings them.
        **kwargs: everything ``timm.create_model`` takes, and ``connection_blocks``,
            ``connection_tanh``, ``connection_norm``, ``connection_arrangement``, ``connection_entry``,
            ``connection_backend``, ``connection_recompute``, ``connection_stream_dtype``, ``connection_time`` for
            ``convert``.

    Raises:
        ValueError: an unknown connection, or a model that cannot be converted.
        RuntimeError: an unknown model.
    """
    residual = connection is None or parse_connection(connection)[0] == "residual"
    source, place = parse_model_name(name)
    if source is None:
        base, dot, tag = name.partition(".")
        register_if_new(base)
        if not residual:
            name = register_name(base, connection) + dot + tag  # type: ignore[arg-type]
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    load_config = load_model_config_from_path if source == "local-dir" else load_model_config_from_hf
    _, saved, _ = load_config(place)
    register_if_new(saved)
    if residual:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    options = {
        key.removeprefix("connection_"): kwargs.pop(key) for key in list(kwargs) if key.startswith("connection_")
    }
    return convert(timm.create_model(name, pretrained=pretrained, **kwargs), connection, **options)  # type: ignore[arg-type]


def try_connections(base: str, connections: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each connection, and why an architecture, built on the meta device, does not take it, or nothing."""
    try:
        model = timm.create_model(base, device="meta")
    except (TypeError, NotImplementedError, RuntimeError) as error:
        reason = f"timm does not build it on the meta device: {error}".partition("\n")[0]
        yield from ((connection, reason) for connection in connections)
        return
    for connection in connections:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NoResidualWarning)
                remove_connections(convert(model, connection))
            yield connection, ""
        except ValueError as error:
            yield connection, str(error).partition(";")[0]


def coverage(pattern: str = "") -> Iterator[tuple[str, str, str]]:
    """Try every timm name that matches, on the meta device.

    Yields:
        The name, its module in ``timm.models``, and why it cannot be converted, or nothing.
    """
    for name in timm.list_models(pattern):
        package, _, module = timm.model_entrypoint(name).__module__.rpartition(".")
        if package == "timm.models":
            for _, reason in try_connections(name, ["dhc2"]):
                yield name, module, reason
