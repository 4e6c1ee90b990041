"""The commands of hcvision, each with ``--help``; ``hcvision_command`` calls them."""

import argparse
import difflib
import errno
import inspect
import json
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import pytorch_lightning as pl
import timm
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from tqdm import tqdm

from hcvision.arguments import check_number
from hcvision.benchmark import benchmark
from hcvision.convert import coverage
from hcvision.data import ImageData
from hcvision.dit import TRUNK, read_sizes
from hcvision.evaluation import ClassReport
from hcvision.export import export
from hcvision.insight import inspect as inspect_run
from hcvision.latents import encode_folder, load_vae
from hcvision.prediction import load_module, predict
from hcvision.report import report
from hcvision.runs import (
    Stopped,
    best_checkpoint,
    check_writable,
    checkpoint_folder,
    equip,
    is_first_process,
    is_out_of_memory,
    keep_freed_memory,
    keep_metrics,
    last_checkpoint,
    pick_device,
    quieten,
    read_checkpoint,
    shorten_sockets,
    write_json,
)
from hcvision.sampling import Sampling, columns_of, draw_samples, enlarge, grid, read_samples, write_npz
from hcvision.scoring import (
    FEWEST,
    Extractor,
    Inception,
    SmallClassifier,
    count_samples,
    look_at_data,
    look_at_samples,
    open_samples,
    train_classifier,
)
from hcvision.scoring import compare as compare_features
from hcvision.study import GenerationStudy, Study, merge
from hcvision.training import ImageClassifier, ImageGenerator, TimmModule
from hcvision.weights import pick_weights, read_weights
from hcvision_command import OWN, WHOLE_IMAGES, fail

TASKS: dict[str, type[TimmModule]] = {"classify": ImageClassifier, "generate": ImageGenerator}
STUDIES: dict[str, type[Study]] = {"classify": Study, "generate": GenerationStudy}
HALF_PRECISIONS = {"16-mixed", "bf16-mixed", "16-true", "bf16-true", "16", "bf16"}


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


class CommandLine(LightningCLI):
    """LightningCLI with one folder per run, which nothing overwrites, and resume that resumes."""

    def __init__(self, task: str, **kwargs: Any):
        self.task = task
        super().__init__(TASKS[task], ImageData, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--task", type=str, default=self.task, help=OWN["task"])
        if self.task == "generate":
            parser.set_defaults(WHOLE_IMAGES)
            parser.link_arguments("data.seed", "model.seed")
        parser.add_argument("--run", type=str | None, default=None, help=OWN["run"])
        parser.add_argument(
            "--resume",
            type=bool | Literal["auto"],
            default=False,
            help=OWN["resume"],
        )
        if self.task == "classify":
            parser.link_arguments("data.multi_label", "model.multi_label")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leave the command line alone: a checkpoint's hyper-parameters are compared with it, not put over it."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        model, data = config["model"], config["data"]
        name = "_".join(filter(None, [str(model["model"]).replace(":", "_").replace("/", "_"), model["connection"]]))
        named = Path(config["run"] or f"runs/{name}-{str(data['dataset']).replace('/', '_')}")
        self.run_folder = find_moved_run(config, named) or named
        self.checkpoint = config["ckpt_path"]
        self.is_trial = bool(config["trainer"]["fast_dev_run"])  # of which nothing is kept
        if self.checkpoint in ("best", "last"):
            found = best_checkpoint(self.run_folder) if self.checkpoint == "best" else None
            self.checkpoint = found or checkpoint_folder(self.run_folder) / f"{self.checkpoint}.ckpt"
        if config["resume"] == "auto":
            config["resume"] = last_checkpoint(self.run_folder) is not None
        self.resuming, config["resume"] = config["resume"] and self.subcommand == "fit", False
        if self.resuming and self.checkpoint is not None:
            raise ValueError("give --resume or --ckpt_path, got both")
        if self.resuming or (self.subcommand != "fit" and self.checkpoint is None):
            self.checkpoint = self.find_checkpoint()
        elif self.subcommand == "fit" and is_first_process() and not self.is_trial:
            check_room(self.run_folder)
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise FileNotFoundError(f"there is no checkpoint {self.checkpoint}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "ckpt_path": self.checkpoint, "weights_only": True}

    def find_checkpoint(self) -> Path:
        checkpoint = last_checkpoint(self.run_folder)
        if checkpoint is None:
            raise FileNotFoundError(f"there is nothing to resume or score: no checkpoint in {self.run_folder}")
        return checkpoint

    def instantiate_classes(self) -> None:
        """A checkpoint brings all weights: no others are looked for, which may not be there any more."""
        model = self.config[self.subcommand]["model"]
        kept = {key: model[key] for key in ("init_from", "pretrained")}
        if self.checkpoint is not None:
            model["init_from"], model["pretrained"] = None, False
        super().instantiate_classes()
        for key, value in kept.items():  # as the run's configuration says
            model[key] = value

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand]["trainer"]
        if self.subcommand != "fit":  # nothing new to log
            config["logger"] = False
            self.save_config_callback = None
        arguments = equip(self.run_folder, config.as_dict(), monitor=self.model.monitor)
        config["callbacks"], config["plugins"] = arguments.pop("callbacks"), arguments.pop("plugins", None)
        config["callbacks"].append(LambdaCallback(on_exception=self.remember_stage))
        if self.subcommand == "test" and self.task == "classify":
            place = Path(self.checkpoint or "").absolute().parent
            run = place.parent if place.name == checkpoint_folder(Path()).name else self.run_folder
            config["callbacks"].append(ClassReport(run / "test"))
        try:
            return super().instantiate_trainer(**arguments, **kwargs)
        except RuntimeError as error:  # two callbacks that Lightning cannot tell apart
            raise ValueError(" ".join(str(error).split())) from error

    def before_fit(self) -> None:
        """The last checks, before anything is written."""
        if is_first_process() and not self.is_trial:
            for folder in (self.run_folder, checkpoint_folder(self.run_folder)):
                check_writable(folder, "--run names another folder, and --ckpt_path a checkpoint to go on from")
        self.model.check_data(self.datamodule)
        self.model.check_arguments()
        self.datamodule.check_batch_size(self.trainer.world_size)
        self.check_length()
        if self.checkpoint is not None:
            self.model.class_names = self.datamodule.class_names
            self.model.on_load_checkpoint(read_checkpoint(self.checkpoint))
            self.model.check_place(self.datamodule, self.trainer.world_size)
        if self.resuming:
            print(f"resuming {self.run_folder} from {self.checkpoint}")
        if is_first_process():
            if not self.is_trial:
                keep_metrics(self.run_folder) if self.resuming else make_room(self.run_folder)
            if self.model.untouched is not None and self.checkpoint is None:
                print(f"weights of {self.model.hparams['init_from']}; {say_untouched(self.model.untouched)}")
                if self.model.adapted:
                    print(self.model.adapted)

    def check_length(self) -> None:
        """Raise ValueError when there is nothing to train, or nothing but the warm-up."""
        trainer, limit = self.trainer, self.trainer.limit_train_batches
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if getattr(trainer, name) == 0:
                raise ValueError(f"there is nothing to train: {name} is 0")
        batches = self.datamodule.count_batches(trainer.world_size)
        if batches is not None:
            self.model.count_warmup(trainer, min(batches, limit) if isinstance(limit, int) else int(batches * limit))

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if str(error).startswith("Early stopping conditioned on metric"):  # which nothing logs
                raise ValueError(" ".join(str(error).split())) from error
            if not is_out_of_memory(error):
                raise
            raise MemoryError(self.what_needs_less()) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            kept = last_checkpoint(self.run_folder)
            last = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
            raise OSError(f"cannot write into {self.run_folder}: {error.strerror}; {last}") from error

    def remember_stage(self, trainer: pl.Trainer, *_: Any) -> None:
        self.was_training = trainer.training

    def what_needs_less(self) -> str:
        """What to do when there is not enough memory for a batch."""
        config, trainer = self.config[self.subcommand], self.trainer
        data, model = config["data"], config["model"]
        if not self.was_training:
            size = data["eval_batch_size"] or data["batch_size"]
            ways = [f"--data.eval_batch_size {size // 2}"] if size > 1 else []
        else:
            size = data["batch_size"]
            more = f"--trainer.accumulate_grad_batches {2 * trainer.accumulate_grad_batches}"
            ways = [f"--data.batch_size {size // 2} {more} (the same update)"] if size > 1 else []
            ways += [] if model["grad_checkpointing"] else ["--model.grad_checkpointing true"]
        if str(config["trainer"]["precision"]) not in HALF_PRECISIONS:
            ways.append("--trainer.precision bf16-mixed")
        ways = ways or ["a smaller model", "smaller images (--data.img_size)"]
        where = trainer.strategy.root_device
        return f"not enough memory on {where} for batches of {size}; any of these needs less: {', '.join(ways)}"

    def after_fit(self) -> None:
        if not is_first_process():
            return
        metrics = self.trainer.callback_metrics
        top1 = f"top-1 {100 * metrics['val_top1'].item():.2f} %, " if "val_top1" in metrics else ""
        scores = f"val {top1}loss {metrics['val_loss'].item():.4f}; " if "val_loss" in metrics else ""
        kept = "nothing of it is kept (fast_dev_run)" if self.is_trial else f"the run is in {self.run_folder}"
        print(f"{scores}{kept}")


def find_moved_run(config: Any, named: Path) -> Path | None:
    """The folder of a run whose own config.yaml was given, where that names another one: it was copied or moved."""
    for file in map(Path, map(str, config["config"] or [])):
        folder = file.parent
        if file.name != "config.yaml" or last_checkpoint(folder) is None:
            continue
        recorded = yaml.safe_load(file.read_text()).get("run")
        recorded = recorded and expand_home(recorded)
        if recorded == config["run"] and not (named.exists() and folder.samefile(named)):
            return folder
    return None


def say_untouched(names: list[str]) -> str:
    """What a file of weights had nothing for, in words."""
    connections = [name for name in names if "connection" in name]
    rest = [name for name in names if "connection" not in name]
    parts = rest[:4] + [f"{len(rest) - 4} more"] * (len(rest) > 4)
    parts += [f"{len(connections)} parameters of connections"] * bool(connections)
    return f"{', '.join(parts)} keep their initial values" if parts else "they are of all parameters"


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


def check_room(run: Path) -> None:
    """Raise ValueError when a new run would write into a folder that holds a run, or something else."""
    if not is_free(run) and last_checkpoint(run) is not None:
        raise ValueError(f"{run} holds a run; --resume true goes on with it, --run names another folder for a new one")
    if not is_free(run) and not (run / "config.yaml").is_file():
        raise ValueError(f"{run} exists and is not a run of ours; --run names another folder")


def is_free(run: Path) -> bool:
    return not run.exists() or (run.is_dir() and not any(run.iterdir()))


def make_room(run: Path) -> None:
    """Move a run aside that ended before its first checkpoint, so that nothing of it is lost."""
    if is_free(run):
        return
    number = 1
    while (aside := run.with_name(f"{run.name}.unfinished{number}")).exists():
        number += 1
    run.rename(aside)
    print(f"{run} ended before its first checkpoint; it was moved to {aside}")


def run_lightning(arguments: list[str]) -> None:
    """fit, validate and test; ``arguments`` begin with which."""
    CommandLine(
        find_task(arguments),
        args=arguments,
        parser_class=RunParser,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


def compare(arguments: list[str]) -> int | None:
    task = find_task(arguments)
    parser = StudyParser(prog="hcvision compare", description="Train variants side by side and report.")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options")
    parser.add_argument("--task", type=str, default=task, help=OWN["task"])
    parser.add_argument("--repeat", type=str | None, default=None, metavar="VARIANT/SEED", help=OWN["repeat"])
    parser.add_class_arguments(STUDIES[task], skip={"model", "data", "trainer"})
    skipped = {"connection", "num_classes"} | ({"seed"} if task == "generate" else set())
    parser.add_class_arguments(TASKS[task], "model", skip=skipped, instantiate=False)
    parser.add_class_arguments(ImageData, "data", skip={"seed"}, instantiate=False)
    parser.add_class_arguments(pl.Trainer, "trainer", instantiate=False)
    if task == "generate":
        parser.set_defaults(WHOLE_IMAGES)
    config = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    files, repeat = config.pop("config"), config.pop("repeat")
    config.pop("task")
    defaults = parser.get_defaults().as_dict()["trainer"]
    config["trainer"] = {name: value for name, value in config["trainer"].items() if value != defaults[name]}
    if isinstance(config["variants"], dict):  # what variants change is of the right type, or said before any training
        groups = {group: config[group] for group in ("model", "trainer")}
        for name, changes in config["variants"].items():
            if isinstance(changes, dict) and all(isinstance(changes.get(group) or {}, dict) for group in groups):
                own = {group: merge(given, changes.get(group)) for group, given in groups.items()}
                parser.parse_object({"out": name, **{k: config[k] for k in ("variants", "seeds", "data")}, **own})
    if repeat is not None:
        variant, _, seed = repeat.rpartition("/")
        if not files or not variant or not seed.isdigit():
            raise ValueError(f"--repeat takes VARIANT/SEED, and --config that of a study with results, got {repeat!r}")
        return int(not STUDIES[task](**config).repeat(variant, int(seed), Path(files[-1]).parent))
    path = STUDIES[task](**config).run()
    if is_first_process():
        print(f"\n{path.read_text()}\nreport: {path}")
    return None


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


def sample(
    checkpoint: str,
    out: str = "samples",
    number: int = 64,
    classes: list[str | int] | None = None,
    guidance: float = 1.0,
    guided_channels: int | None = 3,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    npz: bool = False,
    model: str | None = None,
    model_args: dict[str, Any] | None = None,
    connection: str | None = None,
    objective: str = "ddpm",
    vae: str | None = None,
    accelerator: str = "auto",
    devices: str = "auto",
    strategy: str = "auto",
    precision: str = "32-true",
) -> None:
    """Draw images with a diffusion model. A run that was killed goes on where it was.

    Args:
        checkpoint: a run's folder, a checkpoint of ours, or, together with --model, a file of weights.
        out: folder for samples.png (a grid of the first 64 at most), samples.npz and the parts of the run.
        number: images; image i is of class i modulo the number of classes.
        classes: names or numbers of the classes wanted; all if not given.
        guidance: scale of classifier-free guidance; 1 is none.
        guided_channels: of the first channels only; the published DiT numbers are with 3; null for all.
        steps: of the sampler; 250 for DDPM, 50 for velocity if not given.
        sampler: ddpm or ddim; heun or euler for velocity.
        seed: of the noise; image i depends on it and on i alone.
        batch_size: images at a time, per device.
        npz: write samples.npz too: arr_0, (N, H, W, 3), uint8, as ADM's evaluator reads it.
        model: timm name of a DiT, for a file of weights that is no checkpoint of ours. The number of classes, the
            size and the channels are read in the file.
        model_args: more arguments of the model that the file is of.
        connection: the same file's connection.
        objective: the same file's objective, ddpm or velocity.
        vae: name or folder of the VAE; the checkpoint's if not given.
        accelerator: Lightning's.
        devices: Lightning's.
        strategy: Lightning's.
        precision: Lightning's.
    """
    module = load_generator(checkpoint, model, model_args, connection, objective, vae)
    names = module.class_names or [str(i) for i in range(module.hparams["num_classes"])]
    plan = Sampling(steps, sampler, guidance, guided_channels, seed)
    wanted = [find_class(str(name), names) for name in classes] if classes else list(range(len(names)))
    count = int(devices) if devices.lstrip("-").isdigit() else devices
    trainer = {"accelerator": accelerator, "devices": count, "strategy": strategy, "precision": precision}
    folder = draw_samples(module, Path(out), plan, number, wanted, batch_size, trainer)
    if not is_first_process():
        return
    columns = columns_of(wanted)
    shown = min(number, max(columns, 64 // columns * columns))
    enlarge(grid(read_samples(folder, shown), columns), 640).save(Path(out) / "samples.png")
    if npz:
        write_npz(Path(out) / "samples.npz", folder, number)
    print(f"{number} images of {len(set(wanted))} classes are in {out}: samples.png{' and samples.npz' if npz else ''}")


def load_generator(
    path: str,
    model: str | None,
    model_args: dict[str, Any] | None,
    connection: str | None,
    objective: str,
    vae: str | None,
) -> ImageGenerator:
    """The diffusion model of a run, of a checkpoint, or of a file of weights."""
    file = last_checkpoint(Path(path)) if Path(path).is_dir() else Path(path)
    if file is None or not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: neither a file nor the folder of a run")
    if model is not None:
        sizes = read_sizes(pick_weights(read_weights(str(file))[0], TRUNK))
        classes = sizes.pop("num_classes", 1000)
        module = ImageGenerator(
            model, connection=connection, objective=objective, vae=vae, num_classes=classes,
            model_args={**sizes, **(model_args or {})},
        )  # fmt: skip
        lacking = module.load_weights(str(file))
        if lacking:
            raise ValueError(
                f"{file} holds other weights than a {model}: {lacking[0]} is not in it, or of another size"
            )
        return able_to_draw(module)
    hparams = read_checkpoint(file).get("hyper_parameters", {})
    if "objective" not in hparams:
        what = "a classifier" if "model" in hparams else "no checkpoint of ours (--model says what weights are of)"
        raise ValueError(f"{file} is {what}; `hcvision sample` draws with diffusion models")
    generator, checkpoint = load_module(file, vae=vae or hparams["vae"])
    assert isinstance(generator, ImageGenerator)
    generator.data_config |= checkpoint.get("data_config", {})
    generator.class_names = checkpoint.get("class_names")
    return able_to_draw(generator)


def able_to_draw(module: ImageGenerator) -> ImageGenerator:
    """The same. Raises ValueError when it draws latents and nothing says which VAE makes images of them."""
    channels = module.data_config["input_size"][0]
    if module.hparams["vae"] is None and channels not in (1, 3):
        raise ValueError(
            f"the model draws latents of {channels} channels; --vae names the VAE that makes images of them"
        )
    if module.hparams["vae"] is not None:
        load_vae(module.hparams["vae"])
    return module.eval()


def find_class(name: str, names: list[str]) -> int:
    """The number of a class that is given by name or number."""
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(names):
        return int(name)
    near = difflib.get_close_matches(name, names, n=3)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"there are {', '.join(names[:10])}" + ", ..." * (len(names) > 10)
    )
    raise ValueError(f"unknown class {name!r}; {hint}")


def score(arguments: list[str]) -> None:
    parser = StudyParser(
        prog="hcvision score",
        description="Compare drawn images with real ones. The real ones are the training images of --data.",
    )
    parser.add_argument(
        "samples", type=str, help="a folder of `hcvision sample`, or an .npz with arr_0 (N, H, W, C) uint8"
    )
    parser.add_argument("--number", type=int | None, default=None, help="score the first so many samples")
    parser.add_argument("--real_images", type=int, default=10000, help="training images to compare with")
    parser.add_argument("--inception", type=str | None, default=None, help="file of Inception's weights, or download")
    parser.add_argument(
        "--classifier",
        type=str | None,
        default=None,
        help="without Inception: folder of the small classifier, trained there if need be (beside the samples)",
    )
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one")
    parser.add_class_arguments(ImageData, "data", instantiate=False)
    options = parser.parse_args(arguments)
    path = Path(options.samples)
    count_samples(path, options.number)
    check_number("real_images", options.real_images, least=FEWEST, whole=True)
    shape = open_samples(path)[0].shape
    device = pick_device(options.device)
    input_size = (shape[3], *shape[1:3])
    data = options.data.as_dict()
    extractor: Extractor
    if options.inception:
        extractor = Inception(None if options.inception == "download" else options.inception, device)
    else:
        folder = Path(options.classifier) if options.classifier else path.parent / "classifier"
        train_classifier(folder, data, input_size, device=device)
        extractor = SmallClassifier(folder, device)
    drawn = look_at_samples(extractor, path, options.number)
    images = ImageData(**data)
    images.prepare_data()
    real = look_at_data(extractor, images, "train", input_size, options.real_images)
    scores = {"samples": len(drawn.features), "real": len(real.features), "network": extractor.name}
    scores |= compare_features(drawn, real)
    print(f"{scores['samples']:,} samples against {scores['real']:,} training images, seen by {extractor.name}")
    labels = {"distance": extractor.distance, "score": extractor.score, "accuracy": "in the class they were drawn as"}
    for name in ("distance", "score", "precision", "recall", "accuracy"):
        if name in scores:
            print(f"{scores[name]:9.4f}  {labels.get(name, name)}")
    number, features = min(len(drawn.features), len(real.features)), drawn.features.shape[1]
    if number <= features:
        print(
            f"the distance says little: {features} features have no covariance of {number} images; more would be needed"
        )
    file = path / "scores.json" if path.is_dir() else path.with_suffix(".scores.json")
    try:
        write_json(file, scores)
        print(f"written to {file}")
    except OSError as error:
        print(f"the scores cannot be kept in {file}: {error.strerror}")


def count_coverage(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hcvision coverage",
        description="Build every timm architecture on the meta device and convert it: which work, why not the others.",
    )
    parser.add_argument("pattern", nargs="?", default="", help="only names that match, such as 'vit_*'")
    parser.add_argument("--names", action="store_true", help="list every name")
    options = parser.parse_args(arguments)
    total = len(timm.list_models(options.pattern))
    works: Counter[str] = Counter()
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for name, module, reason in tqdm(coverage(options.pattern), total=total, disable=None, leave=False):
        if reason:
            reasons[reason].append(name)
        else:
            works[module] += 1
        if options.names:
            tqdm.write(f"{'no ' if reason else 'yes'} {name}{f': {reason}' if reason else ''}")
    yes, no = sum(works.values()), sum(map(len, reasons.values()))
    if not yes + no:
        raise ValueError(f"no timm name matches {options.pattern!r}")
    print(f"{yes} of {yes + no} timm names take connections\n")
    for module, count in works.most_common():
        print(f"{count:5} {module}")
    if reasons:
        print("\nthe others:\n")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        print(f"{len(names):5} {reason} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    **dict.fromkeys(("fit", "validate", "test"), run_lightning),
    "predict": run_function(predict),
    "inspect": run_function(inspect_run),
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


def how_to_go_on(arguments: list[str]) -> str:
    if arguments[0] != "fit" or any(re.match("--resume[= ]?(true|auto)", part) for part in arguments):
        return "the same command goes on"
    return f"go on with: hcvision {shlex.join(arguments)} --resume true"
