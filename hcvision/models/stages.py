"""Where a model keeps its blocks: columns, stages, and which family it is of."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from hcvision.models.families import MODELS, Family, find_mixin
from hcvision.models.grafting import own_class


# Which blocks a model has
def find_columns(model: Any, family: Family) -> list[list[Any]]:
    """The blocks of a model, in order, by container."""
    containers: list[nn.Module] = [model]
    for part in family.blocks.split("."):
        containers = [
            child
            for container in containers
            for child in (container.children() if part == "*" else [container.get_submodule(part)])
        ]
    return [list(flatten(container)) for container in containers]


def stages(model: Any) -> list[list[Any]]:
    """The blocks that have connections, or can have them, in runs through which streams of one width pass.

    Raises:
        ValueError: a model or a block that ``convert`` does not take.
    """
    family = find_family(model)
    breaks = set(family.breaks(model))
    runs: list[list[Any]] = []
    for column in find_columns(model, family):
        runs.append([])
        dim = 0
        for i, block in enumerate(column):
            if find_mixin(block).find_obstacle(block):
                runs.append([])
                continue
            if i in breaks or (dim and find_mixin(block).dim(block) != dim):
                runs.append([])
            dim = find_mixin(block).dim(block)
            runs[-1].append(block)
    return [run for run in runs if run]


def flatten(container: nn.Module) -> Iterator[nn.Module]:
    for child in container.children():
        if isinstance(child, nn.Sequential):
            yield from flatten(child)
        else:
            yield child


def find_family(model: nn.Module) -> Family:
    family = MODELS.get(own_class(model))
    if family is None:
        raise ValueError(f"cannot convert a {own_class(model).__name__}{name_blocks(model)}; {say_families()}")
    return family


def name_blocks(model: nn.Module) -> str:
    """What an unknown model is made of: the classes of timm's in its longest container of modules."""
    containers = []
    for module in model.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            own = [type(child).__name__ for child in module if not type(child).__module__.startswith("torch.")]
            containers.append(own)
    longest = max(containers, key=len, default=[])
    return f" with blocks of class {Counter(longest).most_common(1)[0][0]}" if longest else ""


def say_families() -> str:
    return f"the families that work: {', '.join(families())}"


def families() -> list[str]:
    """The modules of ``timm.models`` whose models ``convert`` takes."""
    return sorted({cls.__module__.rpartition(".")[2] for cls in MODELS})
