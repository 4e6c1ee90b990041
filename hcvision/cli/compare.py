"""``hcvision compare``."""

from pathlib import Path

import pytorch_lightning as pl
from jsonargparse import ActionConfigFile

from hcvision.cli.options import OWN, WHOLE_IMAGES
from hcvision.cli.parsing import TASKS, StudyParser, find_task
from hcvision.data import ImageData, is_first_process
from hcvision.studies import GenerationStudy, Study, merge, repeat_cell

STUDIES: dict[str, type[Study]] = {"classify": Study, "generate": GenerationStudy}


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
        return int(not repeat_cell(STUDIES[task](**config), variant, int(seed), Path(files[-1]).parent))
    path = STUDIES[task](**config).run()
    if is_first_process():
        print(f"\n{path.read_text()}\nreport: {path}")
    return None
