"""What the command line says of itself: its commands, options that are no arguments of a class, and its errors.

Nothing is imported here: ``hcvision_command`` reads this file alone, since help needs neither torch nor Lightning.
"""

import sys
from typing import NoReturn

COMMANDS = {
    "fit": "train a model, or fine-tune one (--task generate: a diffusion model)",
    "validate": "score a checkpoint on the validation images",
    "test": "score a checkpoint on the test images; classes one by one, confusion matrix",
    "predict": "classes and probabilities of image files, as CSV or JSON",
    "inspect": "what the connections of a trained model do: tables and pictures",
    "probe": "k nearest neighbours and a linear probe on frozen features, of any model",
    "export": "a checkpoint as a folder for timm, as ONNX, as torch.export",
    "benchmark": "speed and memory of models, beside their residual twins",
    "compare": "train variants beside their residual twin and report",
    "report": "write a study's table and pictures again, from its CSV files",
    "sample": "draw images with a diffusion model",
    "score": "compare drawn images with real ones: FID, or a distance on a small classifier",
    "encode": "turn a folder of images into latents of a VAE",
    "coverage": "count the timm architectures that take connections, and say why the others do not",
}
OWN = {  # options that are no arguments of a class
    "config": "YAML file of options; may be given several times, later ones and the command line win",
    "print_config": "print the configuration that results, and end",
    "task": "classify, or generate (diffusion)",
    "run": "folder of the run (default: runs/NAME)",
    "resume": "go on with the run in that folder; auto: if there is one, else start it (fit only)",
    "ckpt_path": "checkpoint to go on with, or to score: a path, or best or last of the run",
    "clean": "with --data.relative: ImageNet's folder, whose validation images of the same classes are tested too",
    "corruptions": "test corrupted images too, by each of these, or all (see --data.corruption)",
    "severities": "of the corruptions, 1 to 5 (default: all)",
    "seed_everything": "seed of the initial weights and of everything random (default: 0)",
    "repeat": "train one cell again (dhc2/0 for seed 0) and compare it with the results beside the configuration",
}
WHOLE_IMAGES = {"data.scale": (1.0, 1.0), "data.ratio": (1.0, 1.0), "data.crop_pct": 1.0}  # where images are drawn


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line on stderr and this exit code."""
    print(f"hcvision: error: {message}", file=sys.stderr)
    sys.exit(code)
