"""``hcvision probe``: frozen features of models, scored on the same images."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from hcvision.data import ImageData, check_writable, pick_device
from hcvision.studies.probing.features import Frozen, check_model, collect
from hcvision.studies.probing.protocol import Protocol
from hcvision.studies.records import add_line, tabulate

FILE = "metrics.jsonl"


def check_data(data: ImageData, protocol: Protocol) -> None:
    """Raise ValueError when the images cannot be probed, or are too few, as far as that is known now."""
    data.check_training()
    if data.multi_label:
        raise ValueError("a probe needs one label per image, not several (multi_label)")
    if data.dataset == "latents":
        raise ValueError("a probe looks at images, not at latents; a folder would work")
    data.prepare_data()
    data.setup("predict")
    if "train" in data.stages:
        base, indices = data.stages["train"]
        if hasattr(base, "targets"):
            protocol.check([int(base.targets[index]) for index in indices], data.class_names or [])


def probe(
    models: list[Frozen],
    data: ImageData,
    protocol: Protocol,
    out: Path,
    device: str = "auto",
    precision: str = "32",
) -> list[dict[str, Any]]:
    """Score the frozen features of models, write a line of ``metrics.jsonl`` for each, and print the table.

    Each model looks at each image once; the features are kept in memory, 4 bytes per number.

    Args:
        models: what ``open_model`` gave; they are taken out of the list one by one.
        data: training images, and test images or, where there are none, validation images.
        protocol: how they are scored.
        out: folder of the file.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
        precision: of the features: 32, bf16-mixed, 16-mixed, bf16-true or 16-true.

    Returns:
        The lines that were written.

    Raises:
        ValueError: images that cannot be probed or that a model does not take.
        OSError: the file cannot be written.
    """
    device = pick_device(device)
    check_writable(out, "--out names another folder")
    check_data(data, protocol)
    for frozen in models:
        check_model(frozen, data)
    names = data.class_names or [str(number) for number in range(data.num_classes)]
    lines = []
    while models:
        frozen = models.pop(0)
        about = frozen.describe()
        title = " ".join([about["model"], about["connection"]])
        train, test = (collect(frozen.module, data, split, device, precision, f"{title}, {split}")
                       for split in ("train", "test"))  # fmt: skip
        frozen.module.model.cpu()
        protocol.check(train[1], names)
        with tqdm(total=protocol.fits, desc=f"{title}, probes", unit=" fits", leave=False, disable=None) as bar:
            scores = protocol.score(train, test, names, device, bar.update)
        line = about | data.describe() | {"images": len(test[1]), "train_images": len(train[1])}
        line |= {"features": train[0].shape[1], "size": list(data.data_config(frozen.module.data_config)["input_size"])}
        line |= {"precision": precision, "shots": protocol.shots, "seeds": list(protocol.seeds), **scores}
        every = add_line(out / FILE, line)
        lines.append(line)
    print("\n".join(["", *tabulate([line for line in every if "features" in line]), "", f"written to {out / FILE}"]))
    return lines
