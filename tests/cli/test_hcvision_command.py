"""What comes before torch: help, and wrong names of commands and options."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import pytorch_lightning as pl

import hcvision_command
from hcvision import cli
from hcvision.cli import main as commands
from hcvision.data.module import ImageData
from hcvision.training.classification import ImageClassifier
from hcvision.training.generation import ImageGenerator
from hcvision_command import COMMANDS, main, names_of


def test_every_command_is_there_and_explained():
    assert list(COMMANDS) == list(commands.COMMANDS)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


LIGHT = "import sys, hcvision_command\nsys.modules['torch'] = sys.modules['timm'] = None\n"


def test_help_needs_no_torch():
    """So it is there in a fraction of a second."""
    code, out, _ = run(f"{LIGHT}hcvision_command.main(['--help'])")
    assert code == 0
    assert all(f"\n  {name} " in out for name in COMMANDS)
    code, out, _ = run(f"{LIGHT}hcvision_command.main(['--version'])")
    assert out.startswith("hcvision 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "unknown command 'fti'; did you mean fit?; the commands: fit, validate"),
        (["fit", "--data.batchsize=4"], "unknown option --data.batchsize; did you mean --data.batch_size"),
        (
            ["fit", "--model.freez_epochs", "1"],
            "unknown option --model.freez_epochs; did you mean --model.freeze_epochs",
        ),
        (["test", "--trainer.device", "1"], "unknown option --trainer.device; did you mean --trainer.devices?"),
        (["compare", "--data.xyzzy", "1"], "unknown option --data.xyzzy (hcvision compare --help lists them)"),
    ],
)
def test_wrong_names_need_no_torch(arguments, message):
    code, out, err = run(f"{LIGHT}hcvision_command.main({arguments!r})")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize(
    ("group", "classes"),
    [("model", (ImageClassifier, ImageGenerator)), ("data", (ImageData,)), ("trainer", (pl.Trainer,))],
)
def test_names_are_those_of_the_classes(group, classes):
    """What is read in the source is what Python knows, base classes included."""
    known = {
        name for cls in classes for base in cls.__mro__[:2] for name in inspect.signature(base.__init__).parameters
    }
    assert known - {"args", "kwargs"} <= names_of(group)
    assert names_of(group) <= known | {"help"}


def test_names_behind_an_option_pass(monkeypatch):
    """A key of a dictionary, a member of a list, and what is no option of these groups."""
    seen = []
    monkeypatch.setattr(cli, "run", seen.append)
    for option in ("--model.model_args.depth=2", "--trainer.callbacks+=x", "--data.help", "--run=x", "--model", "x"):
        main(["fit", option])
    assert len(seen) == 6


def test_where_lightning_cannot_be_read_the_parser_decides(monkeypatch):
    monkeypatch.setattr(hcvision_command.importlib.util, "find_spec", lambda name: None)
    assert names_of("trainer") == set()


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        ({}, "passive"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "9"}, None),
        ({"KMP_BLOCKTIME": "0"}, None),
    ],
)
def test_threads_sleep_unless_the_user_says_how_they_wait(monkeypatch, given, policy):
    for name in hcvision_command.WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    hcvision_command.let_threads_sleep()
    set_now = {name: os.environ[name] for name in hcvision_command.WAITING if name in os.environ}
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert set_now == {**given, **({"OMP_WAIT_POLICY": policy} if policy else {})}


def options_in(text):
    """The options that a help lists, without those that help with a class, and without groups."""
    names = set(re.findall(r"^  (?:-\w \w+, )?--([\w.]+)", text, re.MULTILINE))
    return {name for name in names if not name.endswith(".help")} - {"model", "data", "trainer"}


UNUSED = {"weights_only", "verbose"}  # Lightning's; checkpoints are always read as weights, scores always printed


@pytest.mark.parametrize("task", ["classify", "generate"])
@pytest.mark.parametrize("command", ["fit", "test", "compare"])
def test_help_lists_what_the_parser_takes(command, task, monkeypatch, capsys):
    """And needs no torch: the parser's own help takes seconds, and 750 lines."""
    monkeypatch.setenv("COLUMNS", "200")
    main([command, "--task", task, "--help"])
    ours = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.run([command, "--task", task, "--help"])
    theirs = options_in(capsys.readouterr().out) - UNUSED - {"help"}
    assert options_in(ours) == theirs - hcvision_command.LINKED


@pytest.mark.parametrize("task", ["classify", "generate"])
def test_help_says_defaults_and_what_options_mean(task, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = run(f"{LIGHT}hcvision_command.main(['fit', '--task={task}', '--help'])")
    assert code == 0
    told = " ".join(out.split())
    about = {
        "classify": ", ours included, with or without a pretrained tag",
        "generate": " of a DiT, for example dit_b_patch2_256",
    }
    assert f"--model.model str timm name{about[task]}. (required)" in told
    assert "--trainer.max_epochs Optional[int] Stop training once this number of epochs is reached." in told
    assert f"peak learning rate. (default: {'0.001' if task == 'classify' else '0.0001'})" in told
    area = "(0.08, 1.0)" if task == "classify" else "(1.0, 1.0)"
    assert f"area range of the random resized crop. (default: {area})" in told
    assert ("--model.mixup " in told) == (task == "classify")
    assert ("--model.objective " in told) == (task == "generate")
