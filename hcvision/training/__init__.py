"""Training: the Lightning modules, and a run with its folder.

``module.py`` is what every task shares, ``classification.py`` and ``generation.py`` are the tasks. ``runs.py`` equips a
run's folder, ``checkpoints.py`` keeps its checkpoints, ``stopping.py`` ends it so that it can go on, and ``loading.py``
reads it back.
"""

from hcvision.training.checkpoints import best_checkpoint, checkpoint_folder, last_checkpoint, read_checkpoint
from hcvision.training.classification import ImageClassifier
from hcvision.training.generation import ImageGenerator
from hcvision.training.loading import WEIGHTS, find_checkpoint, load_module, run_config, run_data
from hcvision.training.metrics import ClassCounts
from hcvision.training.module import TimmModule
from hcvision.training.runs import Progress, equip, keep_metrics, metrics_files, quieten, shorten_sockets, show_seconds
from hcvision.training.stopping import StopCleanly, Stopped
from hcvision.training.weights import compare_classes, pick_weights, read_weights

__all__ = [
    "WEIGHTS",
    "ClassCounts",
    "ImageClassifier",
    "ImageGenerator",
    "Progress",
    "StopCleanly",
    "Stopped",
    "TimmModule",
    "best_checkpoint",
    "checkpoint_folder",
    "compare_classes",
    "equip",
    "find_checkpoint",
    "keep_metrics",
    "last_checkpoint",
    "load_module",
    "metrics_files",
    "pick_weights",
    "quieten",
    "read_checkpoint",
    "read_weights",
    "run_config",
    "run_data",
    "shorten_sockets",
    "show_seconds",
]
