"""What the command ``hcvision`` runs first: help and wrong names of options need neither torch nor Lightning."""

import ast
import difflib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "fit": "train a model, or fine-tune one (--task generate: a diffusion model)",
    "validate": "score a checkpoint on the validation images",
    "test": "score a checkpoint on the test images; classes one by one, confusion matrix",
    "predict": "classes and probabilities of image files, as CSV or JSON",
    "inspect": "what the connections of a trained model do: tables and pictures",
    "export": "a checkpoint as a folder for timm, as ONNX, as torch.export",
    "benchmark": "speed and memory of models, beside their residual twins",
    "compare": "train variants beside their residual twin and report",
    "report": "write a study's table and pictures again, from its CSV files",
    "sample": "draw images with a diffusion model",
    "score": "compare drawn images with real ones: FID, or a distance on a small classifier",
    "encode": "turn a folder of images into latents of a VAE",
    "coverage": "count the timm architectures that take connections, and say why the others do not",
}
USAGE = """\
usage: hcvision COMMAND [--config FILE] [options]

{}

`hcvision COMMAND --help` lists the options; configs/ holds complete configurations."""
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}  # how a user says how threads wait
GROUPS = {"model": ("TimmModule", "ImageClassifier", "ImageGenerator"), "data": ("ImageData",), "trainer": ("Trainer",)}
FILES = {"model": "hcvision/training.py", "data": "hcvision/data.py", "trainer": "pytorch_lightning/trainer/trainer.py"}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format("\n".join(f"  {name:<10} {about}" for name, about in COMMANDS.items())))
    elif arguments[0] == "--version":
        print(f"hcvision {importlib.metadata.version('hcvision')}")
    else:
        check_names(arguments)
        let_threads_sleep()
        try:
            from hcvision.cli import run
        except KeyboardInterrupt:
            fail("interrupted", code=130)
        run(arguments)


def let_threads_sleep() -> None:
    """Have the threads of a computation sleep while they wait for each other, unless the user says how they wait.

    By default OpenMP's threads spin at the end of every operation. Where another process wants a core, they spin
    while the rest of the team waits for that core, and a step takes ten times as long. Read when torch is imported.
    """
    if not WAITING.intersection(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"hcvision: error: {message}", file=sys.stderr)
    sys.exit(code)


def check_names(arguments: list[str]) -> None:
    """End with one line and exit code 2 when there is no such command, or no such option of model, data or trainer."""
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        fail(f"unknown command {arguments[0]!r}{hint}; the commands: {', '.join(COMMANDS)}")
    for argument in arguments[1:]:
        option = re.match(r"--(model|data|trainer)\.(\w+)", argument)
        known = sorted(names_of(option[1])) if option else []
        if option and known and option[2] not in known:
            near = [f"--{option[1]}.{name}" for name in difflib.get_close_matches(option[2], known, n=2)]
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            fail(f"unknown option {option[0]}{hint} (hcvision {arguments[0]} --help lists them)")


def names_of(group: str) -> set[str]:
    """The options of a group: the arguments of its classes, read in their source."""
    package, _, file = FILES[group].partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        return set()  # the whole parser will say
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    return {name for node in classes if node.name in GROUPS[group] for name in arguments_of(node)} | {"help"}


def arguments_of(node: ast.ClassDef) -> Iterator[str]:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            yield from (argument.arg for argument in [*member.args.args, *member.args.kwonlyargs])


if __name__ == "__main__":
    main()
