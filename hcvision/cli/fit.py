"""``hcvision fit``, ``validate`` and ``test``: Lightning's command line with one folder per run."""

import errno
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import LambdaCallback
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from hcvision.cli.options import OWN, WHOLE_IMAGES
from hcvision.cli.parsing import TASKS, RunParser, expand_home, find_task
from hcvision.data import CORRUPTIONS, ImageData, check_writable, is_first_process, is_out_of_memory
from hcvision.studies import Calibration, ClassReport, RecordScores
from hcvision.training import best_checkpoint, checkpoint_folder, equip, keep_metrics, last_checkpoint, read_checkpoint

HALF_PRECISIONS = {"16-mixed", "bf16-mixed", "16-true", "bf16-true", "16", "bf16"}


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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.add_argument("--clean", type=str | None, default=None, help=OWN["clean"])
            parser.add_argument("--corruptions", type=list[str] | None, default=None, help=OWN["corruptions"])
            parser.add_argument("--severities", type=list[int], default=[1, 2, 3, 4, 5], help=OWN["severities"])
        return parser

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
        given = model["init_from"] or (f"timm's weights of {model['model']}" if model["pretrained"] else None)
        self.scored = None
        if self.subcommand != "fit" and self.checkpoint is None and last_checkpoint(self.run_folder) is None and given:
            self.scored = given  # the weights that a run would start from
        elif self.resuming or (self.subcommand != "fit" and self.checkpoint is None):
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
            folder = run / "test"
            self.classes = ClassReport(folder / self.datamodule.variant)
            self.records = RecordScores(folder, self.scored)
            config["callbacks"] += [Calibration(), self.classes, self.records]
        try:
            return super().instantiate_trainer(**arguments, **kwargs)
        except RuntimeError as error:  # two callbacks that Lightning cannot tell apart
            raise ValueError(" ".join(str(error).split())) from error

    def before_fit(self) -> None:
        """The last checks, before anything is written."""
        if is_first_process() and not self.is_trial:
            for folder in (self.run_folder, checkpoint_folder(self.run_folder)):
                check_writable(folder, "--run names another folder, and --ckpt_path a checkpoint to go on from")
        self.datamodule.check_training()
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

    def before_test(self) -> None:
        """Open what else is to be tested, before long work."""
        config, data = self.config[self.subcommand], self.datamodule
        self.say_what_is_scored()
        self.clean, self.corrupted = None, []
        if self.task != "classify":
            if config["clean"] is not None or config["corruptions"]:
                raise ValueError("clean and corruptions are for classification, not for --task generate")
            return
        if config["clean"] is not None:
            if data.relative is None:
                raise ValueError("clean is for a relative of ImageNet, which --data.relative names")
            some = data.chosen and [data.class_names[number] for number in data.chosen]
            if some and data.classes is None:
                some = f"imagenet-{data.relative}"  # the same ones, by their name
            changes = {"relative": "val", "root": config["clean"], "classes": some}
            self.clean = ImageData(**config["data"].as_dict() | changes)
        names = config["corruptions"] or []
        names = [*CORRUPTIONS] if names == ["all"] else names
        self.corrupted = [data.corrupted(name, severity) for name in names for severity in config["severities"]]
        self.records.is_quiet = bool(self.clean or self.corrupted)

    def before_validate(self) -> None:
        self.say_what_is_scored()

    def say_what_is_scored(self) -> None:
        """Say so where there is no checkpoint of a run, and raise ValueError when a head has not been trained."""
        if self.scored is None:
            return
        untrained = [name for name in self.model.untouched or () if name.startswith(self.model.head_names)]
        theirs, ours = self.model.model.pretrained_cfg["num_classes"], self.model.hparams["num_classes"]
        if self.model.hparams["init_from"] is None and theirs != ours:
            untrained = [f"a head of {ours} classes, they have {theirs}"]
        what = f"there is no checkpoint in {self.run_folder}, and {self.scored}"
        if untrained:
            raise ValueError(f"{what}, to start from, bring no {', '.join(untrained)}: there is nothing to score")
        if is_first_process():
            print(f"{what}, to start from, are scored")

    def after_test(self) -> None:
        """Test what else is to be tested, with the same weights."""
        more: dict[str, Any] = {"ckpt_path": self.checkpoint, "weights_only": True}
        if self.clean is not None:
            self.classes.folder = self.records.folder / self.clean.variant
            self.records.is_quiet = bool(self.corrupted)
            self.trainer.test(self.model, self.clean, **more)
        top1: list[float] = []
        for number, data in enumerate(self.corrupted, start=1):
            self.classes.is_on = False
            self.records.is_quiet = number < len(self.corrupted)
            (scores,) = self.trainer.test(self.model, data, verbose=False, **more)
            top1.append(next(scores[name] for name in ("test_top1", "test_map") if name in scores))
        if top1 and is_first_process():
            print(f"{100 * sum(top1) / len(top1):.2f} % on average over {len(top1)} corruptions and severities")

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


def check_room(run: Path) -> None:
    """Raise ValueError when a new run would write into a folder that holds a run, or something else."""
    if not is_free(run) and last_checkpoint(run) is not None:
        raise ValueError(f"{run} holds a run; --resume true goes on with it, --run names another folder for a new one")
    if not is_free(run) and not (run / "config.yaml").is_file():
        raise ValueError(f"{run} exists and is not a run of ours; --run names another folder")


def is_free(run: Path) -> bool:
    """Whether nothing is there, or what tests of the weights to start from have written."""
    return not run.exists() or (run.is_dir() and all(entry.name == "test" for entry in run.iterdir()))


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
