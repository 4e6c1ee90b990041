"""Settings of cells, compared and merged, and what they were run with."""

import inspect
import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
import yaml

from hcvision.data import ImageData, write_whole
from hcvision.studies.measuring import name_device

FIXED = ("connection", "num_classes")  # of a module's arguments; not for a study's model to say
NOT_SETTINGS = (*FIXED, "seed")


# Settings
def defaults(cls: type) -> dict[str, Any]:
    """The arguments of a class, those that it hands to its bases included, and their defaults."""
    known: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(("hcvision.", "pytorch_lightning.trainer")) and "__init__" in vars(base):
            for name, parameter in list(inspect.signature(base.__init__).parameters.items())[1:]:  # type: ignore[misc]
                if parameter.kind is not parameter.VAR_KEYWORD:
                    known[name] = parameter.default if parameter.default is not parameter.empty else None
    return known


def merge(base: dict[str, Any], changes: dict[str, Any] | None) -> dict[str, Any]:
    """``base`` with ``changes``, which go into dicts within it."""
    merged = dict(base)
    for key, value in (changes or {}).items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def complete(module: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them, with the defaults of model and data, without what leaves results as they are."""
    settings = json.loads(json.dumps(settings))
    for group, cls in {"model": module, "data": ImageData}.items():
        usual = json.loads(json.dumps({k: v for k, v in defaults(cls).items() if k not in NOT_SETTINGS}))
        settings[group] = {key: value for key, value in merge(usual, settings[group]).items() if value is not None}
    for name in ("root", "num_workers"):
        settings["data"].pop(name, None)
    usual, given = defaults(pl.Trainer), settings["trainer"]
    settings["trainer"] = {k: v for k, v in given.items() if k not in usual or v != usual[k]}
    settings["trainer"].pop("enable_progress_bar", None)
    if settings["trainer"].get("devices") in (1, "1"):  # said where there are jobs
        del settings["trainer"]["devices"]
    return settings


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of dicts, and their places (``model.lr``)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe_changes(
    variants: dict[str, dict[str, Any]], connection: Callable[[str], str], usual: dict[str, Any]
) -> list[str]:
    """What the variants of a study are, in a line, or nothing where they are connections alone.

    Args:
        variants: by name, what each changes.
        connection: of a variant.
        usual: settings of the others.
    """
    lines: list[str] = []
    changed: dict[str, Any] = {}
    for variant, changes in variants.items():
        own = ("connection", "match_time")
        changes_shown = [(name, value) for name, value in flat(changes) if name not in own]
        changed |= dict(changes_shown)
        if changes_shown:
            what = ", ".join(f"{name} {json.dumps(value)}" for name, value in changes_shown)
            lines.append(f"{variant} is {connection(variant)} with {what}.")
    base = dict(flat(usual))
    others = ", ".join(f"{name} {json.dumps(base[name])}" for name in changed if name in base)
    return [" ".join([*lines, *([f"The others have {others}."] if others else [])])] if lines else []


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """Write it whole or not at all; tuples as lists."""
    write_whole(path, yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, width=120).encode())


def span(values: list[float]) -> str:
    low, high = round(min(values), 2), round(max(values), 2)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def environment(device: str) -> dict[str, Any]:
    """Where this runs, with which versions, and the git revision of this package (+ where it was changed since)."""
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    versions["Lightning"] = pl.__version__
    return {"device": name_device(device), "versions": versions, "revision": revision(Path(__file__).parent.parent)}


@cache  # of the code that this process has read, whatever is there when its last cell ends
def revision(package: Path) -> str:

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        found = git("log", "-1", "--format=%h", "--", ".")
        found += "+" if found and git("status", "--porcelain", "--", ".") else ""
    except OSError:  # no git here
        found = ""
    return found or "unknown"
