"""Weights to start from: where they are, which of what a file holds they are, and what makes them fit."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv, load_state_dict_from_hf
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import Tensor

from hcvision.training.checkpoints import best_checkpoint, read_checkpoint

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGED = re.compile(r"(?:^|[._])(?:ema|teacher|target|averaged?)(?:[._]|$)")


def is_remote(source: str) -> bool:
    return source.startswith("hf-hub:")


def find_weights(source: str) -> Path:
    """The file of weights that ``init_from`` names.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(source)
    if path.is_dir():
        found = [file for file in (best_checkpoint(path), path / "model.safetensors") if file and file.is_file()]
        if not found:
            raise FileNotFoundError(f"there are no weights in {path}: neither a run's nor an exported model's folder")
        return found[0]
    if not path.is_file() and not is_remote(source):
        raise FileNotFoundError(f"there is no file {source} to take weights from")
    return path


def read_weights(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the file of weights ``source`` or a repository of the Hugging Face hub holds, and what is known of it.

    That is how images are prepared (``mean``, ``std``, ...) and what the classes are called (``class_names``).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights cannot be had or read.
    """
    if is_remote(source):
        try:
            place = source.removeprefix("hf-hub:")
            content, config = load_state_dict_from_hf(place, weights_only=True), load_model_config_from_hf(place)[0]
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"no weights from {source}: {' '.join(str(error).split())}") from error
        return content, {**config, "class_names": config.get("label_names")}
    path = find_weights(source)
    if path.suffix != ".safetensors":
        content = read_checkpoint(path)
        return content, {**content.get("data_config", {}), "class_names": content.get("class_names")}
    config = load_model_config_from_path(path.parent)[0] if path.with_name("config.json").is_file() else {}
    try:
        return load_file(path), {**config, "class_names": config.get("label_names")}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one: {error}") from error


def pick_weights(content: dict[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    """The weights of a model in what a file holds, under the model's own names.

    They may lie in a dictionary in the file (``state_dict``, ``teacher``, ...), and all have the same words before
    their names (``model.``, ``module.encoder.``, ...). Of several the one that has most of ``names`` is taken, of
    those an averaged one. Where none has, which is so for the published files that timm translates, the largest.

    Args:
        content: of the file.
        names: of the parameters that the weights have to be of.
    """
    best: tuple[int, bool, int] = (-1, False, 0)
    picked: dict[str, Tensor] = {}
    for path, tensors in find_tensors(content):
        state = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
        places = [(name[:at], name[at:]) for name in state for at in beginnings(name)]
        counts = Counter(prefix for prefix, name in places if name in names)
        for prefix in ("", *counts):
            inside = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            fits = counts[prefix] if 2 * counts[prefix] >= min(len(names), len(inside)) else 0
            if prefix and not fits:
                continue
            rank = (fits, AVERAGED.search(path + prefix) is not None, 0 if fits else len(inside))
            if rank > best:
                best, picked = rank, inside
    return picked


def beginnings(name: str) -> list[int]:
    """Where the words of a dotted name begin."""
    return [0, *(match.end() for match in re.finditer(r"\.", name))]


def find_tensors(content: dict[Any, Any], path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each dictionary in a dictionary that has tensors by name, and where it lies: ``state_dict.``, ..."""
    own = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if own:
        yield path, own
    for name, part in content.items():
        if isinstance(part, dict):
            yield from find_tensors(part, f"{path}{name}.")


def fit_channels(state: dict[str, Tensor], own: dict[str, Tensor], first: Any) -> str:
    """Adapt weights of RGB images to another number of channels, in place, as timm does. Returns what was done.

    Args:
        state: the weights.
        own: those of the model.
        first: name of the convolution that sees the image, or several.
    """
    for name in [first] if isinstance(first, str) else first or []:
        weight, wanted = state.get(f"{name}.weight"), own.get(f"{name}.weight")
        if weight is None or wanted is None or weight.dim() != 4 or wanted.dim() != 4:
            continue
        channels = wanted.shape[1]
        if weight.shape[1] == 3 != channels:
            state[f"{name}.weight"] = adapt_input_conv(channels, weight)
            return f"its RGB weights of {name} are adapted to {channels} channel{'s' * (channels > 1)}"
    return ""


def compare_states(own: dict[str, Tensor], state: dict[str, Tensor], ignore: tuple[str, ...] = ()) -> str | None:
    """The first difference in names or shapes in words, or None."""
    for name in own:
        if name.startswith(ignore) if ignore else False:
            continue
        if name not in state:
            there = [repr(other) for other in state if other not in own]
            return f"{name} is missing" + (f"; there are {', '.join(there[:3])}, ..." if there else "")
        if own[name].shape != state[name].shape:
            return f"{name} has shape {list(state[name].shape)}, not {list(own[name].shape)}"
    unknown = next((name for name in state if name not in own), None)
    return None if unknown is None else f"{unknown} is not in this model"


def compare_classes(there: list[str] | None, here: list[str] | None) -> str | None:
    """The first difference between as many classes by name, in words, or None."""
    pairs = enumerate(zip(there, here, strict=False)) if isinstance(there, list) and here is not None else ()
    return next(
        (f"class {k} is {theirs!r} there and {ours!r} here" for k, (theirs, ours) in pairs if theirs != ours), None
    )
