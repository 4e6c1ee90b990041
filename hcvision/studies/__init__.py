"""Evidence: variants trained side by side, their report, what a model gets right, how fast it is, what it draws.

``study.py`` and ``generation.py`` train the cells of a study, in ``processes.py`` side by side; ``display.py`` shows
how far they are, ``statistics.py``, ``figures.py`` and ``reporting.py`` say what came out. ``benchmarking.py`` times
models beside their residual twins and ``costs.py`` the variants of a study, with what is in ``measuring.py``;
``evaluation.py`` rates classes, ``calibration.py`` probabilities, ``probing/`` frozen features, ``records.py`` keeps
what was found, ``scoring.py`` rates drawn images, and ``insight/`` looks at trained connections.
"""

from hcvision.studies.benchmarking import Setup, benchmark, compare_step, describe_step
from hcvision.studies.calibration import Calibration
from hcvision.studies.evaluation import ClassReport
from hcvision.studies.generation import GenerationStudy
from hcvision.studies.insight import LogConnections, inspect, unfolded_matrix
from hcvision.studies.measuring import (
    WARM_UP,
    Step,
    TensorMemory,
    interleaved_times,
    keep_freed_memory,
    name_device,
    peak_memory,
    training_step,
)
from hcvision.studies.probing import Protocol, open_model, probe
from hcvision.studies.records import RecordScores
from hcvision.studies.repetition import repeat_cell
from hcvision.studies.reporting import report
from hcvision.studies.scoring import (
    FEWEST,
    Extractor,
    Inception,
    SmallClassifier,
    TimmNetwork,
    compare_features,
    count_samples,
    look_at_data,
    look_at_samples,
    open_samples,
    train_classifier,
    warn_of_few,
)
from hcvision.studies.settings import merge
from hcvision.studies.statistics import interval
from hcvision.studies.study import Study

__all__ = [
    "FEWEST",
    "WARM_UP",
    "Calibration",
    "ClassReport",
    "Extractor",
    "GenerationStudy",
    "Inception",
    "LogConnections",
    "Protocol",
    "RecordScores",
    "Setup",
    "SmallClassifier",
    "Step",
    "Study",
    "TensorMemory",
    "TimmNetwork",
    "benchmark",
    "compare_features",
    "compare_step",
    "count_samples",
    "describe_step",
    "inspect",
    "interleaved_times",
    "interval",
    "keep_freed_memory",
    "look_at_data",
    "look_at_samples",
    "merge",
    "name_device",
    "open_model",
    "open_samples",
    "peak_memory",
    "probe",
    "repeat_cell",
    "report",
    "train_classifier",
    "training_step",
    "unfolded_matrix",
    "warn_of_few",
]
