"""A run read back: its module from a checkpoint, and its data."""

from pathlib import Path
from typing import Any

import yaml

from hcvision.data import ImageData, in_one_line, refusals
from hcvision.training.checkpoints import best_checkpoint, checkpoint_folder, read_checkpoint
from hcvision.training.classification import ImageClassifier
from hcvision.training.generation import ImageGenerator
from hcvision.training.module import TimmModule

WEIGHTS = ("ema", "raw")
FOR_TRAINING = {
    "pretrained": False,
    "init_from": None,
    "grad_checkpointing": False,
}  # what a trained model needs no more


def find_checkpoint(source: str) -> Path:
    """The file that a run's folder (its best checkpoint, or its last) or a path stands for.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the folder is no run's.
    """
    path = Path(source)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {source}; a run's folder, a checkpoint, a folder that timm saved or hf-hub:OWNER/NAME "
                "would work"
            )
        return path
    file = best_checkpoint(path)
    if file is None and (checkpoint_folder(path).is_dir() or (path / "config.yaml").is_file()):
        raise FileNotFoundError(f"there is no checkpoint in the run {path} yet")
    if file is None:
        raise ValueError(
            f"{path} holds no classifier: neither checkpoints/best.ckpt or last.ckpt, as a run does, nor "
            "config.json and model.safetensors, as timm saves models"
        )
    return file


def load_module(file: Path, weights: str = "ema", **changes: Any) -> tuple[TimmModule, dict[str, Any]]:
    """The module of a checkpoint, with its weights, in evaluation mode, and the checkpoint.

    Args:
        file: a checkpoint of ours.
        weights: ema or raw, as ``load_classifier`` has it.
        **changes: of the arguments that the module was made with.

    Raises:
        ValueError: it is something else, or damaged.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    checkpoint = read_checkpoint(file)
    hparams = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(hparams, dict) or "model" not in hparams or "state_dict" not in checkpoint:
        raise ValueError(f"{file} is no checkpoint of ours; those of a run are in RUN/checkpoints")
    kind: Any = ImageGenerator if "objective" in hparams else ImageClassifier
    hparams = hparams | {name: value for name, value in FOR_TRAINING.items() if name in hparams} | changes
    with refusals(f"{file} is of a model that cannot be built"):
        module = kind(**hparams)
    averaged = "current_model_state" in checkpoint
    state = checkpoint["current_model_state" if averaged and weights == "raw" else "state_dict"]
    module.on_load_checkpoint({**checkpoint, "state_dict": state})
    module.load_state_dict(state)
    return module.eval(), checkpoint


def run_config(source: str) -> Path | None:
    """The config.yaml of the run that a folder or a checkpoint in it is of, if there is one."""
    path = Path(source)
    run = path if path.is_dir() else path.absolute().parent.parent
    known = path.exists() and checkpoint_folder(run).is_dir() and (run / "config.yaml").is_file()
    return run / "config.yaml" if known else None


def run_data(source: str, but_not: tuple[str, ...] = (), changes: dict[str, Any] | None = None) -> ImageData:
    """The data of the run that a folder or a checkpoint in it is of, as its config.yaml has them, but for ``changes``.

    Raises:
        ValueError: no config.yaml says what they are, they cannot be opened, or are a dataset that begins as one of
            ``but_not``.
    """
    path = run_config(source)
    if path is None:
        raise ValueError("no config.yaml says what the data are")
    try:
        own, changes = yaml.safe_load(path.read_text())["data"], changes or {}
        if any("pipe:" in str(value).lower() for name, value in own.items() if name not in changes):
            raise ValueError("its config.yaml names a command, which only the command line may")
        config = own | changes
        if not config.get("dataset", "folder").startswith(but_not):
            return ImageData(**{**config, "num_workers": 0})
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, yaml.YAMLError) as error:
        raise ValueError(f"the run's cannot be opened: {in_one_line(error)}") from error
    raise ValueError(f"the dataset {config['dataset']} is not looked into")
