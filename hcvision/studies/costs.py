"""What the variants of a study cost: step time and memory, measured interleaved with nothing beside."""

import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from hcvision.data import ImageData, write_json
from hcvision.studies.measuring import measure, ratios, training_step
from hcvision.studies.processes import limit_threads


def measure_costs(study: Any, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Per variant of a ``Study`` the time of a training step and its peak of memory, as ratios to the first variant.

    Variants whose steps are the same, for example a model and the same one trained for longer, are measured as one.
    """
    if not study.timing_rounds:
        return {}
    path = study.out / "costs.json"
    device = study.device
    settings = {variant: study.cost_settings(variant) for variant in study.variants}
    key = {"rounds": study.timing_rounds, "device": study.timed_on, "settings": settings}
    if path.is_file() and (known := json.loads(path.read_text()))["key"] == key:
        return known["costs"]
    say(f"measuring step time and memory on {study.timed_on}")
    data = ImageData(**study.data)

    def build(variant: str) -> Callable[[], None]:
        torch.manual_seed(0)
        module = study.build_model(variant, data.num_classes, 0).to(device)
        images = torch.randn(data.batch_size, *module.data_config["input_size"], device=device)
        targets = torch.randint(data.num_classes, (data.batch_size,), device=device)
        precision = str(study.trainer_arguments(variant).get("precision", "32"))
        return training_step(module, (images, targets), precision)

    def find_first(variant: str) -> str:
        """The first variant with the same step."""
        return next(one for one in study.variants if describe_step(study, one) == describe_step(study, variant))

    measured = {variant: find_first(variant) for variant in study.variants}
    with limit_threads(study.threads):
        times, peaks = measure([*dict.fromkeys(measured.values())], build, study.timing_rounds, device)
    first = study.variants[0]
    costs = {
        variant: {"time": statistics.median(ratios(times[one], times[first])), "memory": peaks[one] / peaks[first]}
        for variant, one in measured.items()
    }
    write_json(path, {"key": key, "costs": costs})
    return costs


def describe_step(study: Any, variant: str) -> tuple[Any, ...]:
    """What the cost of a variant's training step depends on."""
    precision = study.trainer_arguments(variant).get("precision")
    return study.connection(variant), study.model_arguments(variant), precision
