"""``hcvision inspect``: what a trained model's connections do with images."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from hcvision.connections import Connection
from hcvision.data import ImageData, check_writable, pick_device, write_csv
from hcvision.models import stages
from hcvision.studies.insight.callback import Watcher
from hcvision.studies.insight.depth import SkipBlocks, draw_blocks, join_rows, summarize_blocks
from hcvision.studies.insight.figures import (
    draw_classes,
    draw_fractions,
    draw_matrix,
    draw_mixing,
    draw_similarity,
    draw_streams,
)
from hcvision.studies.insight.notes import StageNotes
from hcvision.studies.insight.tables import (
    class_rows,
    fraction_rows,
    gain_rows,
    matrix_rows,
    mixing_rows,
    similarity_rows,
    weight_rows,
)
from hcvision.studies.insight.unfolding import connect_adds, name_sublayers
from hcvision.training import (
    TimmModule,
    checkpoint_folder,
    compare_classes,
    find_checkpoint,
    load_module,
    run_config,
    run_data,
)


def inspect(
    checkpoint: str,
    out: str | None = None,
    twin: str | None = None,
    images: int = 256,
    batch_size: int = 64,
    weights: str = "ema",
    data: dict[str, Any] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    skip_blocks: bool = False,
) -> None:
    """Look into a trained model: what its sub-layers read, how alike their inputs and the streams are, and the classes.

    Writes CSV and PNG, for each stage of the model: matrix (the unfolded connection matrix, mean and spread over
    images), fractions (the same, fractions of frac-connections apart), similarity (cosine between the inputs of
    successive sub-layers), streams (norms, the cosine between streams, their effective rank), mixing and gains (the
    mixing matrices of streams, their product over depth, and what these can gain), weights and classes (dynamic
    weights).

    Args:
        checkpoint: a run's folder (its best checkpoint, or its last) or a checkpoint; diffusion models work too.
        out: folder for the files; RUN/inspect if not given.
        twin: the same for a residual model, to compare similarities with.
        images: validation images, evenly spread over them.
        batch_size: images at a time.
        weights: ema or raw, where the run averaged its weights.
        data: arguments of ImageData, {dataset: folder, root: ...}; without a dataset they change those of the run,
            {root: ...} says where its data are now.
        device: cpu, cuda, ...; auto takes a GPU if there is one.
        overwrite: write into a folder that has files already.
        skip_blocks: also measure the loss and the accuracy with the branches of each block skipped, into blocks.csv and
            blocks.png; beside those of the twin, if there is one. As many passes more as there are blocks.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is something else, its data cannot be opened, or its model has no blocks to look into.
    """
    if images < 1 or batch_size < 1:
        raise ValueError(f"images and batch_size must be at least 1, got {images} and {batch_size}")
    device = pick_device(device)
    folder = Path(out) if out else default_folder(Path(checkpoint))
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} exists; --overwrite true writes into it, --out names another folder")
    check_writable(folder, "--out names another folder")
    module, source = open_run(checkpoint, weights, data)
    twins: list[StageNotes] = []
    skipped_twin: list[dict[str, Any]] = []
    if twin:
        other, _ = open_run(twin, weights, data)
        kinds = [[name_sublayers(blocks) for blocks in stages(connect_adds(m.model))] for m in (module, other)]
        if kinds[0] != kinds[1] or any(isinstance(part, Connection) for part in other.modules()):
            raise ValueError(f"{twin} is no residual twin of {checkpoint}: other blocks, or connections of its own")
        twins = look(other, source, images, batch_size, device)[0]
        skipped_twin = measure_blocks(other, source, images, batch_size, device) if skip_blocks else []
    notes, labels, names = look(module, source, images, batch_size, device)
    for number, stage in enumerate(notes):
        place = folder if len(notes) == 1 else folder / f"stage{number}"
        write_stage(place, stage, twins[number] if twins else None, labels, names)
    print(f"{len(labels)} validation images, {sum(len(stage.names) for stage in notes)} sub-layers")
    print("\n".join(summarize(notes, twins)))
    if skip_blocks:
        skipped = measure_blocks(module, source, images, batch_size, device)
        write_csv(folder / "blocks.csv", join_rows(skipped, skipped_twin))
        draw_blocks(skipped, skipped_twin).savefig(folder / "blocks.png", dpi=150)
        print(summarize_blocks(skipped))
        if skipped_twin:
            print(summarize_blocks(skipped_twin, "in the residual twin "))
    print(f"written to {folder}")


def default_folder(checkpoint: Path) -> Path:
    if checkpoint.is_dir():
        return checkpoint / "inspect"
    place = checkpoint.absolute().parent
    return (
        place.parent / "inspect"
        if place.name == checkpoint_folder(Path()).name
        else place / f"{checkpoint.stem}.inspect"
    )


def open_run(checkpoint: str, weights: str, data: dict[str, Any] | None) -> tuple[TimmModule, ImageData]:
    """The module of a checkpoint, and its data."""
    module, content = load_module(find_checkpoint(checkpoint), weights)
    try:
        if data and ("dataset" in data or run_config(checkpoint) is None):
            source = ImageData(**{"num_workers": 0, **data})
        else:
            source = run_data(checkpoint, changes=data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the data of {checkpoint} are not known: {error}; --data names some") from error
    difference = compare_classes(content.get("class_names"), source.class_names)
    if difference:
        raise ValueError(f"{checkpoint} is of other classes than the data: {difference}")
    return module, source


def look(
    module: TimmModule, source: ImageData, images: int, batch_size: int, device: str
) -> tuple[list[StageNotes], Tensor, list[str]]:
    """What a model does with validation images: notes per stage, their labels (I,), the classes' names."""
    watcher = Watcher()
    validate(module, source, images, batch_size, device, watcher)
    names = source.class_names or [str(label) for label in range(module.hparams["num_classes"])]
    return watcher.notes, torch.cat(watcher.labels), names


def measure_blocks(
    module: TimmModule, source: ImageData, images: int, batch_size: int, device: str
) -> list[dict[str, Any]]:
    """Rows of ``SkipBlocks`` on validation images."""
    skipping = SkipBlocks()
    validate(module, source, images, batch_size, device, skipping)
    return skipping.rows()


def validate(
    module: TimmModule, source: ImageData, images: int, batch_size: int, device: str, callback: pl.Callback
) -> None:
    """Have a callback look on while validation images, evenly spread over all, pass through a model.

    Residual adds of the model are written as connections, for good.
    """
    module.model = connect_adds(module.model)
    source.prepare_data()
    source.setup("validate")
    source.batch_size = source.eval_batch_size = min(batch_size, images)
    if "val" in source.stages:
        base, indices = source.stages["val"]
        count = min(images, len(indices))
        source.stages["val"] = (base, [indices[i * len(indices) // count] for i in range(count)])
    accelerator, _, number = device.partition(":")
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(accelerator, accelerator),
        devices=[int(number)] if number else 1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=-(-images // source.eval_batch_size),
        callbacks=[callback],
    )
    trainer.validate(module, source, verbose=False)


def summarize(notes: list[StageNotes], twins: list[StageNotes]) -> list[str]:
    """A line or two per stage."""
    lines = []
    for number, stage in enumerate(notes):
        where = f"stage {number}: " if len(notes) > 1 else ""
        median = stage.similarity()[:, 1].median() if len(stage.names) > 1 else torch.tensor(float("nan"))
        text = f"{where}inputs of successive sub-layers have a median cosine of {median:.3f}"
        if number < len(twins):
            text += f", {twins[number].similarity()[:, 1].median():.3f} in the residual twin"
        lines.append(text)
        if stage.likeness[-1]:
            alike = torch.cat(stage.likeness[-1]).mean()
            rank, count = torch.cat(stage.ranks[-1]).mean(), stage.norms[-1][0].shape[1]
            text = f"{where}two {stage.part}s have a mean cosine of {alike:.3f} at the end"
            lines.append(f"{text}, and the effective rank of all {count} is {rank:.2f}")
        if stage.mixes:
            forward, backward = torch.cat(stage.gains[-1]).mean(0)[2:].tolist()
            lines.append(f"{where}mixing over all depth can gain {forward:.2f} forward and {backward:.2f} back")
    return lines


# Files and pictures of a stage
def write_stage(folder: Path, stage: StageNotes, twin: StageNotes | None, labels: Tensor, classes: list[str]) -> None:
    """Write what ``inspect`` promises for one stage."""
    pictures: dict[str, Figure] = {}
    mean, spread = stage.matrix()
    write_csv(folder / "matrix.csv", matrix_rows(mean, stage.names))
    if stage.dynamic:
        write_csv(folder / "matrix_spread.csv", matrix_rows(spread, stage.names))
    pictures["matrix"] = draw_matrix(mean, spread if stage.dynamic else None, stage.names)
    if stage.fractions.shape[1] > 1:
        write_csv(folder / "fractions.csv", fraction_rows(stage.fractions, stage.names))
        pictures["fractions"] = draw_fractions(stage.fractions, stage.names)
    if len(stage.names) > 1:
        write_csv(folder / "similarity.csv", similarity_rows(stage, twin))
        pictures["similarity"] = draw_similarity(stage, twin)
    write_csv(folder / "streams.csv", stage.stream_rows())
    pictures["streams"] = draw_streams(stage)
    if stage.mixes:
        write_csv(folder / "mixing.csv", mixing_rows(stage))
        write_csv(folder / "gains.csv", gain_rows(stage))
        pictures["mixing"] = draw_mixing(stage)
    write_csv(folder / "weights.csv", weight_rows(stage))
    if stage.dynamic and labels.dim() == 1:
        present = labels.unique()
        write_csv(folder / "classes.csv", class_rows(stage, labels, classes))
        pictures["classes"] = draw_classes(stage, labels, [classes[label] for label in present])
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
