"""What the command ``hcvision`` runs first: help and wrong names of options need neither torch nor Lightning."""

import ast
import difflib
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import sys
import textwrap
from pathlib import Path


def find_package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


OPTIONS = runpy.run_path(str((find_package("hcvision") or Path()) / "cli" / "options.py"))  # without its package
COMMANDS, OWN, WHOLE_IMAGES, fail = (OPTIONS[name] for name in ("COMMANDS", "OWN", "WHOLE_IMAGES", "fail"))
USAGE = """\
usage: hcvision COMMAND [--config FILE] [options]

{}

`hcvision COMMAND --help` lists the options; configs/ holds complete configurations."""
VARIED = {"compare": {"model.connection", "data.seed"}}  # by variants and seeds
WAITING = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}  # how a user says how threads wait
TASKS = {"classify": ("TimmModule", "ImageClassifier"), "generate": ("TimmModule", "ImageGenerator")}
GROUPS = {
    "model": ("TimmModule", "ImageClassifier", "ImageGenerator"), "data": ("ImageData",), "trainer": ("Trainer",),
    "study": ("Study", "GenerationStudy"),
}  # fmt: skip
FILES = {
    "TimmModule": "hcvision/training/module.py",
    "ImageClassifier": "hcvision/training/classification.py",
    "ImageGenerator": "hcvision/training/generation.py",
    "ImageData": "hcvision/data/module.py",
    "Study": "hcvision/studies/study.py",
    "GenerationStudy": "hcvision/studies/generation.py",
    "Trainer": "pytorch_lightning/trainer/trainer.py",
}
LIGHTNING = ("config", "print_config", "task", "run", "resume", "ckpt_path", "seed_everything")
LAID_OUT = {  # the commands whose help is read in the source: their own options, and groups with the prefix of each
    **dict.fromkeys(("fit", "validate"), (LIGHTNING, {g: f"{g}." for g in ("model", "data", "trainer")})),
    "test": (
        (*LIGHTNING, "clean", "corruptions", "severities"),
        {group: f"{group}." for group in ("model", "data", "trainer")},
    ),
    "compare": (
        ("config", "print_config", "task", "repeat"),
        {"study": "", "model": "model.", "data": "data.", "trainer": "trainer."},
    ),
}
LINKED = {"model.num_classes", "model.multi_label", "model.seed"}  # come from the data


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format("\n".join(f"  {name:<10} {about}" for name, about in COMMANDS.items())))
    elif arguments[0] == "--version":
        print(f"hcvision {importlib.metadata.version('hcvision')}")
    else:
        check_names(arguments)
        if arguments[0] in LAID_OUT and {"-h", "--help"}.intersection(arguments):
            print(describe_command(arguments))
            return
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
    names = {name for node in classes_of(group) for name in arguments_of(node)}
    return names | {"help"} if names else set()  # where there are none the whole parser will say


def classes_of(group: str) -> list[ast.ClassDef]:
    """The classes of a group, as their source has them, without those whose source cannot be read."""
    found = []
    for name in GROUPS[group]:
        package, _, file = FILES[name].partition("/")
        folder = find_package(package)
        if folder is not None and (folder / file).is_file():
            nodes = ast.parse((folder / file).read_text()).body
            found += [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def arguments_of(node: ast.ClassDef) -> dict[str, tuple[str, str | None, str]]:
    """The arguments of a class by name: type, default (None where there is none) and what the docstring says."""
    import docstring_parser  # for help alone

    found = {}
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            about = "\n".join(filter(None, (ast.get_docstring(node), ast.get_docstring(member))))
            docs = {one.arg_name: one.description or "" for one in docstring_parser.parse(about).params}
            arguments, keywords = member.args.args, member.args.kwonlyargs
            defaults = [None] * (len(arguments) - len(member.args.defaults)) + member.args.defaults
            for argument, default in zip([*arguments, *keywords], [*defaults, *member.args.kw_defaults], strict=True):
                kind = ast.unparse(argument.annotation) if argument.annotation else ""
                value = ast.unparse(default) if default else None
                found[argument.arg] = (kind, value, docs.get(argument.arg, ""))
    return found


def describe_command(arguments: list[str]) -> str:
    """The help of a command with the options of classes, read in their source."""
    command = arguments[0]
    task = "generate" if re.search(r"--task[ =]generate", " ".join(arguments)) else "classify"
    own, groups = LAID_OUT[command]
    text = [f"usage: hcvision {command} [--config FILE] [options]", "", COMMANDS[command], ""]
    text += [line for name in own for line in describe_option(f"--{name}", OWN[name])]
    for group, prefix in groups.items():
        classes = {node.name: arguments_of(node) for node in classes_of(group)}
        wanted = {"model": TASKS[task], "study": GROUPS["study"] if task == "generate" else ("Study",)}
        options: dict[str, tuple[str, str | None, str]] = {}
        for name in wanted.get(group, GROUPS[group]):
            options |= classes.get(name, {})
        text += ["", f"{group} (Lightning's)" if group == "trainer" else group]
        hidden = {"self", "kwargs", *(groups if not prefix else ())}  # a study takes the groups as arguments
        for name, (kind, default, about) in options.items():
            if name in hidden or f"{prefix}{name}" in LINKED | VARIED.get(command, set()):
                continue
            about = re.sub(r":\w+:`~?\.?([^`]*)`", r"\1", " ".join(about.partition("\n\n")[0].split()))
            about = about.partition(" Default: ")[0].replace("``", "")
            value = WHOLE_IMAGES.get(f"{prefix}{name}", default) if task == "generate" else default
            wants = "required" if value is None else "default: " + str(value).strip("'")
            text += describe_option(f"--{prefix}{name}", f"{about} ({wants})", kind)
    text += ["", "Values are YAML. configs/ holds complete configurations."]
    return "\n".join(text)


def describe_option(name: str, about: str, kind: str = "") -> list[str]:
    """The lines of an option in a help: its name and type, and what it means beside them or below."""
    width = max(min(shutil.get_terminal_size().columns, 120), 60)
    lines = textwrap.wrap(about, width - 32)
    head = f"  {name} {kind}".rstrip()
    first = [f"{head:<31} {lines.pop(0)}"] if lines and len(head) < 31 else [head]
    return [*first, *(f"{'':32}{line}" for line in lines)]


if __name__ == "__main__":
    main()
