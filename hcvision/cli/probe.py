"""``hcvision probe``."""

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile

from hcvision.cli.options import OWN
from hcvision.cli.parsing import StudyParser
from hcvision.data import ImageData
from hcvision.studies import Protocol, open_model, probe
from hcvision.training import run_data


def probe_models(arguments: list[str]) -> None:
    parser = StudyParser(
        prog="hcvision probe",
        description="k nearest neighbours and a linear probe on frozen features, a row per model. Training images of "
        "--data are learned from, its test images are scored (validation images where there are none).",
    )
    parser.add_argument(
        "models",
        nargs="+",
        type=str,
        help="timm names, ours included, with or without a tag; runs, checkpoints, folders that timm saved, hf-hub:...",
    )
    parser.add_argument("--config", action=ActionConfigFile, help=OWN["config"])
    parser.add_argument("--out", type=str, default="runs/probe", help="folder of metrics.jsonl, a line per model")
    parser.add_argument("--connection", type=str | None, default=None, help="of models that are names: dhc2, ...")
    parser.add_argument("--pretrained", type=bool, default=False, help="names bring timm's weights")
    parser.add_argument("--init_from", type=str | None, default=None, help="weights of a name: a file, run or folder")
    parser.add_argument("--model_args", type=dict[str, Any] | None, default=None, help="of names: img_size, ...")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="of runs that averaged them")
    parser.add_class_arguments(Protocol, None)
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one")
    parser.add_argument(
        "--precision",
        type=Literal["32", "bf16-mixed", "16-mixed", "bf16-true", "16-true"],
        default="32",
        help="of the features",
    )
    parser.add_class_arguments(ImageData, "data", instantiate=False)
    options = parser.parse_args(arguments)
    names = ("probes", "neighbours", "temperature", "seeds", "shots")
    protocol = Protocol(**{name: options[name] for name in names})
    if any(word.startswith(("--data", "--config")) for word in arguments):
        data = ImageData(**options.data.as_dict())
    else:
        try:
            data = run_data(options.models[0])
        except ValueError as error:
            raise ValueError(f"--data.root and the like name the images: {error}") from error
    own = ("connection", "pretrained", "init_from", "model_args", "weights")
    models = [
        open_model(source, data.num_classes, **{name: options[name] for name in own}) for source in options.models
    ]
    probe(models, data, protocol, Path(options.out), options.device, options.precision)
