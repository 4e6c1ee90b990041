"""The commands of hcvision, each with ``--help``; ``hcvision_command`` calls them."""

import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from hcvision import studies
from hcvision.cli.compare import compare
from hcvision.cli.coverage import count_coverage
from hcvision.cli.fit import run_lightning
from hcvision.cli.options import fail
from hcvision.cli.parsing import StudyParser, expand_argument
from hcvision.cli.probe import probe_models
from hcvision.cli.sample import sample
from hcvision.cli.score import score
from hcvision.data import is_first_process, keep_freed_memory
from hcvision.deploy import export, predict
from hcvision.diffusion import encode_folder
from hcvision.studies import benchmark, report
from hcvision.studies import inspect as inspect_run
from hcvision.training import Stopped, quieten, shorten_sockets


def run_function(function: Callable[..., Any]) -> Callable[[list[str]], int | None]:
    """A command whose options are the arguments of a function; those without default are positional.

    A list of text takes one or more words. An int that the function returns is the exit code.
    """
    text = function.__doc__ or ""
    parameters = inspect.signature(function).parameters.values()
    lists = {p.name: p.default for p in parameters if p.annotation in (list[str], list[str] | None)}

    def run(arguments: list[str]) -> int | None:
        title = text.strip().splitlines()[0]
        parser = StudyParser(prog=f"hcvision {function.__name__.partition('_')[0]}", description=title)
        parser.add_function_arguments(function, as_positional=True, skip={"say", *lists})
        for name, default in lists.items():
            about = re.search(rf"^ *{name}: (.*)", text, re.MULTILINE)
            names, more = ([name], {}) if default is inspect.Parameter.empty else ([f"--{name}"], {"default": default})
            parser.add_argument(*names, nargs="+", type=str, help=about[1] if about else "", **more)
        result = function(**parser.instantiate_classes(parser.parse_args(arguments)).as_dict())
        return result if isinstance(result, int) else None

    return run


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    **dict.fromkeys(("fit", "validate", "test"), run_lightning),
    "predict": run_function(predict),
    "inspect": run_function(inspect_run),
    "probe": probe_models,
    "export": run_function(export),
    "benchmark": run_function(benchmark),
    "compare": compare,
    "report": run_function(report),
    "sample": run_function(sample),
    "score": score,
    "encode": run_function(encode_folder),
    "coverage": count_coverage,
}


def run(arguments: list[str]) -> None:
    """Do what a command line says; ``arguments`` begin with the command. Errors end in one line."""
    quieten()
    keep_old_places()
    keep_freed_memory()
    shorten_sockets()
    command = COMMANDS[arguments[0]]
    try:
        arguments = list(map(expand_argument, arguments))
        status = command(arguments if command is run_lightning else arguments[1:])
    except Stopped as stop:
        if is_first_process():
            print(f"{stop.message}; {how_to_go_on(arguments)}", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except (ValueError, OSError, MemoryError, MisconfigurationException) as error:
        if os.environ.get("HCVISION_DEBUG"):
            raise
        fail(f"{error} (HCVISION_DEBUG=1 shows where)")
    if status:
        sys.exit(status)


def keep_old_places() -> None:
    """Have classes found where configurations of earlier versions name them."""
    sys.modules.update({"hcvision.insight": studies})


def how_to_go_on(arguments: list[str]) -> str:
    if arguments[0] != "fit" or any(re.match("--resume[= ]?(true|auto)", part) for part in arguments):
        return "the same command goes on"
    return f"go on with: hcvision {shlex.join(arguments)} --resume true"
