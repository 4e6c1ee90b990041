"""Parsers whose errors are one line, and what is done to arguments before they are parsed."""

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.cli import LightningArgumentParser

from hcvision.cli.options import fail
from hcvision.training import ImageClassifier, ImageGenerator, TimmModule

TASKS: dict[str, type[TimmModule]] = {"classify": ImageClassifier, "generate": ImageGenerator}


class OneLineErrors:
    """In front of a parser class: a wrong option ends in one line, with the nearest option, and exit code 2.

    A path may begin with ~, wherever in a configuration or on the command line it is. A list of one may be a word.
    """

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        kinds = [(action, listed(action)) for action in walk_actions(self)]
        lists = {option: kind for action, kind in kinds if kind for option in action.option_strings}
        args = wrap_words(sys.argv[1:] if args is None else args, lists)
        return expand_all(super().parse_args(args, *rest, **kwargs))  # type: ignore[misc]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line for line in str(message).splitlines() if line.strip()]
        unknown = re.search(r"unrecognized arguments: (--[\w.]+)", message)
        if unknown:
            known = {option for action in walk_actions(self) for option in action.option_strings}
            near = difflib.get_close_matches(unknown[1], known, n=2)
            lines += [f"did you mean {' or '.join(near)}?"] if near else []
        fail("; ".join(line.strip() for line in lines).replace(":; ", ": "))


def listed(action: argparse.Action) -> Any:
    """The type of an option that takes a list and no single word, or None."""
    kind = getattr(action, "_typehint", None)
    kinds = {*(get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,))} - {NoneType}
    origins = [get_origin(one) for one in kinds]
    return kind if list in origins and all(origins) else None


def wrap_words(arguments: Any, lists: dict[str, Any]) -> Any:
    """The words of a command line, where a list of one for an option of ``lists`` (with its type) may be a word."""
    if not isinstance(arguments, (list, tuple)):
        return arguments
    wrapped: list[Any] = []
    for argument in arguments:
        option, equals, word = str(argument).partition("=")
        if wrapped and wrapped[-1] in lists:  # the word behind its option
            option, equals, word = wrapped.pop(), "=", str(argument)
        if option in lists and equals:
            if word != "null" and not word.startswith(("[", "{")):
                word = f"[{json.dumps(word, ensure_ascii=False) if 'str' in str(lists[option]) else word}]"
            argument = f"{option}={word}"
        wrapped.append(argument)
    return wrapped


def expand_home(text: str) -> str:
    """A path with the home folder in place of ~ or ~NAME at its beginning; any other text as it is.

    Raises:
        ValueError: there is no such home folder.
    """
    if text != "~" and not re.match(r"~[\w.-]*/", text):
        return text
    if (path := os.path.expanduser(text)) == text:
        raise ValueError(f"there is no home folder for {text}; a path without ~ would work")
    return path


def expand_all(value: Any) -> Any:
    """Options, or a part of them, with ``expand_home`` of every text but a separator of labels."""
    if isinstance(value, Namespace):
        for name, part in vars(value).items():
            setattr(value, name, part if name == "label_separator" else expand_all(part))
    elif isinstance(value, dict):
        return {name: expand_all(part) for name, part in value.items()}
    elif isinstance(value, (list, tuple)):
        return type(value)(map(expand_all, value))
    elif isinstance(value, str):
        return expand_home(value)
    return value


def expand_argument(argument: str) -> str:
    """A word of the command line with ``expand_home`` of a path behind its = sign, which no shell looks at."""
    option, equals, path = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    return f"{option}{equals}{expand_home(path) if '/' in path else path}"


def walk_actions(parser: Any) -> Iterator[argparse.Action]:
    """Every option of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from walk_actions(subparser)


class StudyParser(OneLineErrors, ArgumentParser):
    pass


class RunParser(OneLineErrors, LightningArgumentParser):
    pass


def find_task(arguments: list[str]) -> str:
    """What ``--task`` says, or the last configuration file that says it: it decides which options there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    parser.add_argument("-c", "--config", action="append", default=[])
    options = parser.parse_known_args(arguments)[0]
    task = options.task
    for path in reversed(options.config):
        if task is None and Path(path).is_file():
            try:
                content = yaml.safe_load(Path(path).read_text())
            except yaml.YAMLError as error:
                raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
            task = content.get("task") if isinstance(content, dict) else None
    if task not in (None, *TASKS):
        raise ValueError(f"task must be {' or '.join(TASKS)}, got {task!r}")
    return task or "classify"
