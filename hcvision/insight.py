"""What a model's connections do with images: who reads whom, what the streams hold, what depends on the class.

A model without connections is looked at as what it is: ``shc1`` at its initial values is the residual add.

Letters in shapes: B batch, N tokens, L sub-layers, S streams, V views, E stream width, I images, K classes.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision.connections import Connection
from hcvision.convert import convert, own_class, stages
from hcvision.data import ImageData
from hcvision.evaluation import plain
from hcvision.families import ConnectedBlock
from hcvision.prediction import find_checkpoint, load_module, run_config, run_data
from hcvision.runs import check_writable, checkpoint_folder, is_first_process, pick_device, write_csv
from hcvision.training import TimmModule, compare_classes

STEPS = ("width_connection", "depth_connection", "join")
QUANTILES = (0.05, 0.5, 0.95)
OURS, TWIN = "#00798c", "#444444"
COLORS = ("#00798c", "#d1495b", "#edae49", "#66a182", "#8d5b9e", "#2e4057", "#e07a1f", "#5fa8d3")


@dataclass
class Mixing:
    """The weights of one sub-layer, and where streams are entered and left."""

    alpha: Tensor  # (B, ..., S, V+S)
    beta: Tensor  # (B, ..., S), or (B, ..., S, V) where a stream takes of every view of the output
    enters: bool  # streams were entered before it
    leaves: bool  # and are left behind it

    @property
    def streams(self) -> int:
        return self.alpha.shape[-2]

    @property
    def views(self) -> int:
        return self.alpha.shape[-1] - self.streams


@dataclass
class Passage:
    """What happened at one sub-layer."""

    mixing: Mixing
    streams: Tensor  # (B, ..., S, E), before it
    view: Tensor  # (B, ..., V, E), the branch input
    output: Tensor  # (B, ..., V, E), the branch output
    after: Tensor  # (B, ..., S, E), the streams behind it


@contextlib.contextmanager
def watch(blocks: Iterable[Any], note: Callable[[Passage], None]) -> Iterator[None]:
    """Call ``note`` for every sub-layer of ``blocks`` that the forward passes come through meanwhile, in order."""
    before: list[tuple[Connection, dict[str, Any]]] = []
    try:
        for block in blocks:
            own = connections_of(block)
            for k, connection in enumerate(own):
                enters, leaves = k == 0 and block.entry_rate > 1, k == len(own) - 1 and block.exit_rate > 1
                before.append((connection, {name: vars(connection).get(name) for name in STEPS}))
                _wrap(connection, own[k - 1] if k else None, note, enters, leaves)
        yield
    finally:
        for connection, steps in reversed(before):
            for name, step in steps.items():
                vars(connection).pop(name, None)
                if step is not None:  # somebody else watches too
                    vars(connection)[name] = step


def _wrap(connection: Any, previous: Any, note: Callable[[Passage], None], enters: bool, leaves: bool) -> None:
    width, depth, size = connection.width_connection, connection.depth_connection, connection.dim // connection.views
    before: list[tuple[Tensor, Tensor]] = []

    def width_connection(x: Tensor) -> Any:
        view, carried = width(x)
        before.append((x, view))
        return view, carried

    def depth_connection(branch_output: Tensor, carried: Any) -> Tensor:
        after = depth(branch_output, carried)
        streams, view = before.pop()
        mixed = carried[0].flatten(-2)
        if mixed.data_ptr() != streams.data_ptr() and not torch.equal(mixed, streams):
            raise ValueError("a block that scales its streams itself cannot be looked into")
        parts = [part.detach().unflatten(-1, (-1, size)) for part in (streams, view, branch_output, after)]
        alpha, beta = connection.whole_alpha(carried[1]), carried[2]
        note(Passage(Mixing(alpha.detach(), beta.detach(), enters, leaves), *parts))
        return after

    def join(branch_output: Tensor, carried: Any) -> Any:
        return width_connection(previous.depth_connection(branch_output, carried))

    vars(connection).update(zip(STEPS, (width_connection, depth_connection, join), strict=True))


def connections_of(block: nn.Module) -> list[Any]:
    return [module for module in block.children() if isinstance(module, Connection)]


def unfold(mixings: list[Mixing], reduce: Callable[[Tensor], Tensor] = lambda row: row) -> Tensor:
    """How much of every earlier output is in the input of each sub-layer (HC eq. 20 and 27), token by token.

    Source 0 is the embedding, source j the output of sub-layer j - 1; the last row is the read-out, the mean over
    copies (GHC has a linear map there, which no such matrix holds). The views of a frac-connection are the fractions of
    the hidden state, of sources too; hyper-connections have one view::

        input[k, v] = sum_jq c[k, v, j, q] * source[j, q]

    Args:
        mixings: of the sub-layers of a stage, in order, from one forward pass.
        reduce: done with every row (B, ..., V, L+1, V) as soon as it is there, such as ``by_image``.

    Returns:
        c, (B, ..., L+1, V, L+1, V), in float32 at least.

    Raises:
        ValueError: the sub-layers have different numbers of views.
    """
    views, sources = mixings[0].views, len(mixings) + 1
    if any(mixing.views != views for mixing in mixings):
        counts = sorted({mixing.views for mixing in mixings})
        raise ValueError(f"sub-layers with {' and '.join(map(str, counts))} views have no matrix in common")
    alpha = mixings[0].alpha
    fraction = _fractions(mixings[0])  # that each stream holds
    state = alpha.new_zeros(*alpha.shape[:-2], len(fraction), sources, views)
    state[..., torch.arange(len(fraction)), 0, fraction] = 1
    rows = []
    for k, mixing in enumerate(mixings):
        if mixing.enters and k:
            state = state[..., _fractions(mixing), :, :]
        with torch.autocast(alpha.device.type, enabled=False):
            mixed = torch.einsum("...sm,...sjq->...mjq", mixing.alpha, state)
        rows.append(reduce(mixed[..., :views, :, :]))
        state = mixed[..., views:, :, :].clone()
        if mixing.beta.dim() == mixing.alpha.dim():
            state[..., k + 1, :] += mixing.beta
        else:
            state[..., torch.arange(mixing.streams), k + 1, _fractions(mixing)] += mixing.beta
        if mixing.leaves:
            state = _mean_of_copies(state, mixing.views)
    rows.append(reduce(_mean_of_copies(state, views)))
    return torch.stack(rows, dim=-4)


def _mean_of_copies(state: Tensor, views: int) -> Tensor:
    """(..., S, L+1, V) -> (..., V, L+1, V): of the streams that hold the same fraction."""
    return torch.stack([state[..., fraction::views, :, :].mean(-3) for fraction in range(views)], dim=-3)


def _fractions(mixing: Mixing) -> list[int]:
    return [stream % mixing.views for stream in range(mixing.streams)]


def by_image(row: Tensor) -> Tensor:
    """The mean over the tokens of each image: (B, ..., V, L+1, V) -> (B, V, L+1, V)."""
    return row.flatten(1, -4).mean(1) if row.dim() > 4 else row


def join_fractions(c: Tensor) -> Tensor:
    """(..., L+1, V, L+1, V) -> (..., L+1, L+1): how much of an output is in an input, if its fractions are alike.

    The sum over the output's fractions, the mean over the input's.
    """
    return c.sum(-1).mean(-2)


@torch.no_grad()
def unfolded_matrix(
    model: nn.Module, images: Tensor | tuple[Tensor, ...], *, stage: int | None = None, per_fraction: bool = False
) -> Tensor:
    """The unfolded connection matrix: which outputs a sub-layer reads, and how much of each (HC eq. 20 and 27).

    Row k is the input of sub-layer k, counted from 0 over attention and MLP alike, and the last row the read-out (the
    mean over streams); column 0 is the embedding and column j the output of sub-layer j - 1. A residual model has ones
    on and below the diagonal. Dynamic weights are averaged over tokens and images, after unfolding. For
    frac-connections an entry is the sum over the output's fractions and the mean over the input's.

    Args:
        model: a timm model, with connections or without, or a Lightning module of ours. It is left as it was.
        images: (B, C, H, W), or all arguments of the model as a tuple: (x, t, y) of a DiT.
        stage: which, of a model whose blocks stand in several (Swin, ConvNeXt, ...).
        per_fraction: the fractions apart: input, its fraction, output, its fraction.

    Returns:
        (L+1, L+1) for L sub-layers, or (L+1, m, L+1, m), in float32, or the float64 of the model.

    Raises:
        ValueError: a model that ``convert`` does not take; one with several stages, and none is named; sub-layers with
            different numbers of views, or that scale their streams themselves.
    """
    with look_inside(model) as (inner, columns):
        last = len(columns) - 1
        if last if stage is None else not 0 <= stage <= last:
            name = own_class(inner).__name__
            raise ValueError(f"stage must be one of 0 to {last}, the stages of this {name}, got {stage}")
        mixings: list[Mixing] = []
        with watch(columns[stage or 0], lambda passage: mixings.append(passage.mixing)):
            inner(*images) if isinstance(images, tuple) else inner(images)
    c = unfold(mixings, by_image).mean(0)
    return c if per_fraction else join_fractions(c)


@contextlib.contextmanager
def look_inside(model: Any) -> Iterator[tuple[nn.Module, list[list[Any]]]]:
    """The model, or a copy with the connections that its residual adds are, in evaluation mode, and its stages."""
    inner = model.model if isinstance(model, TimmModule | FeatureGetterNet) else model
    was_training = [(module, module.training) for module in inner.modules()]
    try:
        inner = connect_adds(inner)
        inner.eval()
        yield inner, stages(inner)
    finally:
        for module, training in was_training:
            module.training = training


def connect_adds(model: Any) -> Any:
    """The model, if all its blocks have connections, or a copy with residual adds written as connections."""
    blocks = [block for stage in stages(model) for block in stage]
    fractions = {connection.views for block in blocks for connection in connections_of(block)}
    if all(isinstance(block, ConnectedBlock) for block in blocks):
        return model
    rate = max(fractions, default=1)
    same = f"sfc{rate}" if rate > 1 else "shc1"  # both are the residual add at their initial values
    return convert(copy.deepcopy(model), same, blocks=lambda _, block: not isinstance(block, ConnectedBlock))


def name_sublayers(blocks: list[Any]) -> list[str]:
    """``attention 0``, ``MLP 0``, ``attention 1``, ... with the number of the block in its stage."""
    names = []
    for number, block in enumerate(blocks):
        count = len(connections_of(block))
        mixer = "attention" if hasattr(block, "attn") or hasattr(block, "attns") else "mixer"
        kinds = [mixer, "MLP"] if count == 2 else ["block"] if count == 1 else [f"part {k}" for k in range(count)]
        names += [f"{kind} {number}" for kind in kinds]
    return names


class StageNotes:
    """What passes through one stage, condensed batch by batch. ``names`` are those of its L sub-layers."""

    def __init__(self, blocks: list[Any]):
        self.blocks, self.names = blocks, name_sublayers(blocks)
        own = [connection for block in blocks for connection in connections_of(block)]
        self.part = "fraction" if any(connection.views > 1 for connection in own) else "stream"
        self.dynamic = any(getattr(connection, "dynamic", False) for connection in own)
        self.mixings: list[Mixing] = []
        self.last_input: Tensor | None = None
        self.matrices: list[Tensor] = []  # (B, L+1, V, L+1, V) each
        self.cosines: list[list[Tensor]] = [[] for _ in self.names[1:]]  # of the inputs of sub-layers k and k + 1
        self.norms: list[list[Tensor]] = [[] for _ in [*self.names, "end"]]  # (B, S) each
        self.likeness: list[list[Tensor]] = [[] for _ in [*self.names, "end"]]  # (B,) each, cosine between two streams
        self.alphas: list[list[Tensor]] = [[] for _ in self.names]  # (B, S, V+S) each
        self.betas: list[list[Tensor]] = [[] for _ in self.names]  # (B, S) or (B, S, V) each
        self.product = torch.empty(0)
        self.products: list[list[Tensor]] = [[] for _ in self.names]  # (B, S, S) each, of the mixing matrices so far
        self.gains: list[list[Tensor]] = [[] for _ in self.names]  # (B, 4) each; see ``note_mixing``

    def note(self, passage: Passage) -> None:
        k, mixing = len(self.mixings), passage.mixing
        self.mixings.append(mixing)
        view = passage.view.flatten(-2).float()
        if k:
            self.cosines[k - 1].append(F.cosine_similarity(self.last_input, view, dim=-1).flatten().cpu())  # type: ignore[arg-type]
        self.last_input = view
        self.note_streams(k, passage.streams)
        tokens = tuple(range(1, mixing.alpha.dim() - 2))
        self.alphas[k].append(mean_over(mixing.alpha, tokens).float().cpu())
        self.betas[k].append(mean_over(mixing.beta, tokens).float().cpu())
        self.note_mixing(k, mixing, tokens)
        if k + 1 == len(self.names):
            self.note_streams(k + 1, passage.after)
            self.matrices.append(unfold(self.mixings, by_image).cpu())
            self.mixings, self.last_input = [], None

    def note_mixing(self, k: int, mixing: Mixing, tokens: tuple[int, ...]) -> None:
        """The product of the mixing matrices of every token, and what both can gain.

        As mHC (fig. 3) counts it: the largest absolute row sum of H_res, which bounds what a stream can grow on its way
        forward, and column sum, for gradients on their way back.
        """
        own = mixing.alpha[..., mixing.views :].mT.float()  # row i is the next stream i
        self.product = own if k == 0 or mixing.enters else own @ self.product
        sums = [part.abs().sum(dim).amax(-1) for part in (own, self.product) for dim in (-1, -2)]
        self.products[k].append(mean_over(self.product, tokens).cpu())
        self.gains[k].append(mean_over(torch.stack(sums, dim=-1), tokens).cpu())

    @property
    def mixes(self) -> bool:
        """Whether there are several streams, as many in all sub-layers."""
        counts = {alphas[0].shape[1] for alphas in self.alphas}
        return len(counts) == 1 and counts != {1}

    def note_streams(self, k: int, streams: Tensor) -> None:
        streams = streams.float().flatten(1, -3)
        self.norms[k].append(streams.norm(dim=-1).mean(1).cpu())
        count = streams.shape[-2]
        if count > 1:  # the sum of all pairs is the square of the sum
            together = F.normalize(streams, dim=-1).sum(-2).square().sum(-1)
            self.likeness[k].append(((together - count) / (count * (count - 1))).mean(1).cpu())

    @property
    def fractions(self) -> Tensor:
        """The matrix with its fractions, the mean over images: (L+1, V, L+1, V)."""
        return torch.cat(self.matrices).double().mean(0)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """The unfolded connection matrix, mean over images and their standard deviation, both (L+1, L+1)."""
        each = join_fractions(torch.cat(self.matrices).double())
        return each.mean(0), each.std(0) if len(each) > 1 else torch.zeros_like(each[0])

    def similarity(self) -> Tensor:
        """5 %, median and 95 % of the cosine between the inputs of successive sub-layers: (L-1, 3)."""
        levels = torch.tensor(QUANTILES)
        return torch.stack([torch.cat(values).quantile(levels) for values in self.cosines])

    def stream_rows(self) -> list[dict[str, Any]]:
        """Per place in depth: the mean norm of each stream, and how alike two streams are (cosine)."""
        rows = []
        for place, norms, likeness in zip([*self.names, "end"], self.norms, self.likeness, strict=True):
            mean = torch.cat(norms).mean(0)
            alike = float(torch.cat(likeness).mean()) if likeness else None
            rows += [
                {"before": place, self.part: stream, "norm": float(norm), f"cosine between {self.part}s": alike}
                for stream, norm in enumerate(mean)
            ]
        return rows


def mean_over(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    return values.mean(dims) if dims else values


class Watcher(pl.Callback):
    """Notes what passes through a module's model in its evaluation, a ``StageNotes`` per stage, and the labels."""

    def __init__(self) -> None:
        self.notes: list[StageNotes] = []
        self.labels: list[Tensor] = []
        self.watching = contextlib.ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.notes, self.labels = [StageNotes(blocks) for blocks in stages(pl_module.model)], []
        for notes in self.notes:
            self.watching.enter_context(watch(notes.blocks, notes.note))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.labels.append(batch[1].cpu())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.watching.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.watching.close()


class LogConnections(pl.Callback):
    """Draws the unfolded connection matrix on some validation images during training, for TensorBoard and as CSV.

    The files are in RUN/connections: stage0-step000100.csv, .png, ...

    Args:
        images: of the first validation batch of each validation.
        every_n_epochs: how often.
    """

    def __init__(self, images: int = 32, every_n_epochs: int = 1):
        if images < 1 or every_n_epochs < 1:
            raise ValueError(f"images and every_n_epochs must be at least 1, got {images} and {every_n_epochs}")
        self.images, self.every_n_epochs = images, every_n_epochs
        self.batch: Any = None
        self.works = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Raise ValueError when the model has no blocks to look into."""
        stages(pl_module.model)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0:
            self.batch = tuple(part[: self.images] for part in batch)

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        batch, self.batch = self.batch, None
        if trainer.sanity_checking or trainer.current_epoch % self.every_n_epochs or not self.works:
            return
        if batch is None or not len(batch[0]):
            return
        inner = pl_module.model
        notes = [StageNotes(blocks) for blocks in stages(inner)]
        if not all(isinstance(block, ConnectedBlock) for stage in notes for block in stage.blocks):
            return  # residual adds: ones, now and always
        try:
            with contextlib.ExitStack() as watching:
                for stage in notes:
                    watching.enter_context(watch(stage.blocks, stage.note))
                pl_module.batch_loss(batch)
        except ValueError as error:
            self.works = False
            warnings.warn(f"no matrix of connections is logged: {error}", stacklevel=2)
            return
        if not is_first_process():
            return
        folder = Path(trainer.default_root_dir) / "connections"
        for number, stage in enumerate(notes):
            mean, _ = stage.matrix()
            name = f"stage{number}-step{trainer.global_step:06}"
            write_csv(folder / f"{name}.csv", matrix_rows(mean, stage.names))
            figure = draw_matrix(mean, None, stage.names)
            figure.savefig(folder / f"{name}.png", dpi=100)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure(f"connections/stage{number}", figure, trainer.global_step)


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
) -> None:
    """Look into a trained model: what its sub-layers read, how alike their inputs and the streams are, and the classes.

    Writes CSV and PNG, for each stage of the model: matrix (the unfolded connection matrix, mean and spread over
    images), fractions (the same, fractions of frac-connections apart), similarity (cosine between the inputs of
    successive sub-layers), streams (norms, and the cosine between streams), mixing and gains (the mixing matrices of
    streams, their product over depth, and what these can gain), weights and classes (dynamic weights).

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
    if twin:
        other, _ = open_run(twin, weights, data)
        kinds = [[name_sublayers(blocks) for blocks in stages(connect_adds(m.model))] for m in (module, other)]
        if kinds[0] != kinds[1] or any(isinstance(part, Connection) for part in other.modules()):
            raise ValueError(f"{twin} is no residual twin of {checkpoint}: other blocks, or connections of its own")
        twins = look(other, source, images, batch_size, device)[0]
    notes, labels, names = look(module, source, images, batch_size, device)
    for number, stage in enumerate(notes):
        place = folder if len(notes) == 1 else folder / f"stage{number}"
        write_stage(place, stage, twins[number] if twins else None, labels, names)
    print(f"{len(labels)} validation images, {sum(len(stage.names) for stage in notes)} sub-layers")
    print("\n".join(summarize(notes, twins)))
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
    module.model = connect_adds(module.model)
    source.prepare_data()
    source.setup("validate")
    source.batch_size = source.eval_batch_size = min(batch_size, images)
    if "val" in source.stages:
        base, indices = source.stages["val"]
        count = min(images, len(indices))
        source.stages["val"] = (base, [indices[i * len(indices) // count] for i in range(count)])
    watcher = Watcher()
    accelerator, _, number = device.partition(":")
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(accelerator, accelerator),
        devices=[int(number)] if number else 1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=-(-images // source.eval_batch_size),
        callbacks=[watcher],
    )
    trainer.validate(module, source, verbose=False)
    names = source.class_names or [str(label) for label in range(module.hparams["num_classes"])]
    return watcher.notes, torch.cat(watcher.labels), names


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
            lines.append(f"{where}two {stage.part}s have a mean cosine of {alike:.3f} at the end")
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


def matrix_rows(matrix: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """A row per input, a column per output."""
    sources = ["embedding", *names]
    return [
        {"input": name} | {source: f"{value:.6f}" for source, value in zip(sources, row, strict=True)}
        for name, row in zip([*names, "read-out"], matrix.tolist(), strict=True)
    ]


def fraction_rows(fractions: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """A row per input, its fraction, output and its fraction, from the lower triangle of (L+1, m, L+1, m)."""
    inputs, sources = [*names, "read-out"], ["embedding", *names]
    rows = []
    for k, v, j, q in product(*map(range, fractions.shape)):
        if j <= k:
            about = {"input": inputs[k], "fraction": v, "output": sources[j], "of fraction": q}
            rows.append({**about, "weight": f"{fractions[k, v, j, q]:.6f}"})
    return rows


def similarity_rows(stage: StageNotes, twin: StageNotes | None) -> list[dict[str, Any]]:
    rows = []
    looked = [("", stage)] + ([("residual ", twin)] if twin else [])
    levels = [(prefix, notes.similarity().tolist()) for prefix, notes in looked]
    for k, (first, second) in enumerate(pairwise(stage.names)):
        row: dict[str, Any] = {"inputs of": first, "and": second}
        for prefix, values in levels:
            row |= {f"{prefix}{name}": f"{v:.6f}" for name, v in zip(("5 %", "median", "95 %"), values[k], strict=True)}
        rows.append(row)
    return rows


def mixing_rows(stage: StageNotes) -> list[dict[str, Any]]:
    """Per sub-layer, how much of each stream is in each next one, and through all sub-layers up to here."""
    rows = []
    for k, name in enumerate(stage.names):
        own = mixing_matrices(stage, k)
        product = torch.cat(stage.products[k]).mean(0)
        for i, j in product.new_ones(product.shape).nonzero().tolist():
            about = {"sub-layer": name, f"next {stage.part}": i, f"of {stage.part}": j}
            spread = own.std(0)[i, j] if len(own) > 1 else 0.0
            numbers = {"weight": own.mean(0)[i, j], "std": spread, "product": product[i, j]}
            rows.append(about | {key: f"{value:.6f}" for key, value in numbers.items()})
    return rows


def mixing_matrices(stage: StageNotes, k: int) -> Tensor:
    """H_res of sub-layer k, each image's mean over its tokens, (I, S, S): row i is the next stream i."""
    alpha = torch.cat(stage.alphas[k])
    return alpha[..., alpha.shape[2] - alpha.shape[1] :].mT


GAINS = ("forward", "backward", "forward, product", "backward, product")


def gain_rows(stage: StageNotes) -> list[dict[str, Any]]:
    """Per sub-layer, the largest row and column sums of its mixing matrix and of the product up to here."""
    return [
        {"sub-layer": name}
        | {gain: f"{value:.6f}" for gain, value in zip(GAINS, torch.cat(gains).mean(0).tolist(), strict=True)}
        for name, gains in zip(stage.names, stage.gains, strict=True)
    ]


def weight_names(streams: int, views: int, is_general: bool = False) -> list[str]:
    """Of the entries of alpha (S, V+S), row by row, and of beta (S,), or (S, V) row by row."""
    view = ["view"] if views == 1 else [f"view {v}" for v in range(views)]
    into = [*view, *(f"stream {t}" for t in range(streams))]
    outputs = [f"output {v}" for v in range(views)] if is_general else ["output"]
    return [f"stream {s} -> {t}" for s in range(streams) for t in into] + [
        f"{output} -> stream {s}" for s in range(streams) for output in outputs
    ]


def weights_by_image(stage: StageNotes, k: int) -> Tensor:
    """alpha and beta of sub-layer k, each image's mean over its tokens: (I, S*(V+S) + S), or + S*V."""
    return torch.cat([torch.cat(part[k]).flatten(1) for part in (stage.alphas, stage.betas)], dim=1).double()


def names_of(stage: StageNotes, k: int) -> list[str]:
    alpha = stage.alphas[k][0]
    return weight_names(alpha.shape[1], alpha.shape[2] - alpha.shape[1], stage.betas[k][0].dim() == alpha.dim())


def weight_rows(stage: StageNotes) -> list[dict[str, Any]]:
    """Per sub-layer and weight: mean and standard deviation over images."""
    rows = []
    for k, sublayer in enumerate(stage.names):
        rows += [{"sub-layer": sublayer} | row for row in mean_rows(weights_by_image(stage, k), names_of(stage, k))]
    return rows


def class_means(stage: StageNotes, k: int, labels: Tensor) -> Tensor:
    """The weights of sub-layer k by class, for the classes that are there: (K, S*(V+S) + S)."""
    each = weights_by_image(stage, k)
    return torch.stack([each[labels == label].mean(0) for label in labels.unique()])


def class_rows(stage: StageNotes, labels: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """Per class, sub-layer and weight: mean and standard deviation over the class's images, and how many those are."""
    rows = []
    for k, sublayer in enumerate(stage.names):
        for label in labels.unique().tolist():
            each = weights_by_image(stage, k)[labels == label]
            about = {"class": classes[label], "images": len(each), "sub-layer": sublayer}
            rows += [about | row for row in mean_rows(each, names_of(stage, k))]
    return rows


def mean_rows(each: Tensor, names: list[str]) -> list[dict[str, str]]:
    """Mean and standard deviation of each weight over images, (I, weights)."""
    spread = each.std(0) if len(each) > 1 else torch.zeros(each.shape[1])
    return [
        {"weight": name, "mean": f"{mean:.6f}", "std": f"{std:.6f}"}
        for name, mean, std in zip(names, each.mean(0).tolist(), spread.tolist(), strict=True)
    ]


STYLE: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def color_labels(axes: Any, which: str, names: list[str]) -> None:
    """Tell attention from MLP by colour."""
    for label, name in zip(getattr(axes, f"get_{which}ticklabels")(), names, strict=True):
        label.set_color("#d1495b" if name.startswith("attention") else "#00798c" if name.startswith("MLP") else "black")


def draw_matrix(mean: Tensor, spread: Tensor | None, names: list[str]) -> Figure:
    """The unfolded connection matrix, and how it varies over images: rows are inputs, columns outputs."""
    size = len(mean)
    panels = [(mean, "mean over tokens and images", True)]
    if spread is not None:
        panels.append((spread, "standard deviation over images", False))
    with matplotlib.rc_context({**STYLE, "font.size": 11 if size <= 26 else 8}):
        side = min(3.2 + 0.22 * size, 9)
        figure = Figure(figsize=(side * len(panels), side), layout="constrained")
        for axes, (values, title, signed) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw_heat(figure, axes, values, signed)
            axes.set_title(title, fontsize=11)
            inputs, sources = [*names, "read-out"], ["embedding", *names]
            small = {"fontsize": 11 if size <= 26 else 5}
            axes.set_xticks(range(size), sources, rotation=90, **small)
            axes.set_yticks(range(size), inputs, **small)
            color_labels(axes, "x", sources)
            color_labels(axes, "y", inputs)
            axes.set_xlabel("output of")
        figure.axes[0].set_ylabel("input of")
        return figure


def draw_heat(figure: Figure, axes: Any, values: Tensor, signed: bool, block: int = 1) -> None:
    """A lower triangle; the rest stays white. Signed values are red below and blue above zero."""
    size = len(values) // block
    below = torch.ones(size, size).tril().repeat_interleave(block, 0).repeat_interleave(block, 1).bool()
    top = max(float(values[below].abs().max()), 1e-12)
    shown = values.masked_fill(~below, float("nan")).numpy()
    scale = {"cmap": "RdBu", "vmin": -top, "vmax": top} if signed else {"cmap": "Greys", "vmin": 0, "vmax": top}
    picture = axes.imshow(shown, **scale, interpolation="none")
    axes.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, shrink=0.6)
    digits = 2 if top >= 0.1 else 3
    if len(values) <= 18:  # there is room to read them
        for row, column in below.nonzero().tolist():
            value = float(values[row, column])
            color = "white" if abs(value) > 0.6 * top else "black"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", color=color, fontsize=7)


def draw_fractions(fractions: Tensor, names: list[str]) -> Figure:
    """The matrix with every entry cut into its fractions: input fractions down, output fractions across."""
    rows, parts = fractions.shape[:2]
    with matplotlib.rc_context({**STYLE, "font.size": 11 if rows <= 26 else 8}):
        side = min(3.6 + 0.3 * rows, 11)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.subplots()
        draw_heat(figure, axes, fractions.reshape(rows * parts, rows * parts), signed=True, block=parts)
        middles = [parts * k + (parts - 1) / 2 for k in range(rows)]
        axes.set_xticks(middles, ["embedding", *names], rotation=90)
        axes.set_yticks(middles, [*names, "read-out"])
        color_labels(axes, "x", ["embedding", *names])
        color_labels(axes, "y", [*names, "read-out"])
        for k in range(1, rows):
            axes.axhline(parts * k - 0.5, color="white", linewidth=1.2)
            axes.axvline(parts * k - 0.5, color="white", linewidth=1.2)
        axes.set_xlabel(f"output of, {parts} fractions each")
        axes.set_ylabel("input of")
        return figure


def draw_similarity(stage: StageNotes, twin: StageNotes | None) -> Figure:
    """Median and 5 to 95 % of the cosine between the inputs of successive sub-layers (HC fig. 3)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(8, 1.5 + 0.24 * len(stage.names)), 4), layout="constrained")
        axes = figure.subplots()
        looked = [(stage, OURS, "with connections")] + ([(twin, TWIN, "residual twin")] if twin else [])
        for notes, color, label in looked:
            low, median, high = notes.similarity().T.tolist()
            axes.plot(range(1, len(median) + 1), median, color=color, marker="o", label=label)
            axes.fill_between(range(1, len(median) + 1), low, high, color=color, alpha=0.15)
        axes.set_xticks(range(1, len(stage.names)), stage.names[1:], rotation=90)
        color_labels(axes, "x", stage.names[1:])
        axes.set_ylabel("cosine to the input before")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return figure


def draw_streams(stage: StageNotes) -> Figure:
    """The norm of each stream over depth, and how alike two streams are."""
    rows = stage.stream_rows()
    places = [*stage.names, "end"]
    part = stage.part
    alike = {row["before"]: row[f"cosine between {part}s"] for row in rows}
    panels = 2 if any(value is not None for value in alike.values()) else 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5, 1.5 + 0.24 * len(places)) * panels, 4), layout="constrained")
        norms, *rest = figure.subplots(1, panels, squeeze=False)[0]
        for stream in sorted({row[part] for row in rows}):
            points = [(places.index(r["before"]), r["norm"]) for r in rows if r[part] == stream]
            norms.plot(
                *zip(*points, strict=True), marker=".", color=COLORS[stream % len(COLORS)], label=f"{part} {stream}"
            )
        norms.set_ylabel(f"mean norm of a {part}")
        norms.set_ylim(bottom=0)
        norms.legend(frameon=False)
        for axes in rest:
            known = [(places.index(place), value) for place, value in alike.items() if value is not None]
            axes.plot(*zip(*known, strict=True), marker=".", color=OURS)
            axes.set_ylabel(f"mean cosine between two {part}s")
            axes.set_ylim(min(0.0, *(value for _, value in known)) - 0.02, 1.02)
        for axes in (norms, *rest):
            axes.set_xticks(range(len(places)), places, rotation=90)
            color_labels(axes, "x", places)
            axes.grid(alpha=0.25)
        return figure


def draw_mixing(stage: StageNotes) -> Figure:
    """The mixing matrix of each sub-layer, the product of those so far, and what both can gain."""
    own = [mixing_matrices(stage, k).mean(0) for k in range(len(stage.names))]
    products = [torch.cat(parts).mean(0) for parts in stage.products]
    size, count = len(own[0]), len(own)
    with matplotlib.rc_context(STYLE):
        width = min(max(7.0, 2.0 + 0.16 * (size + 1) * count), 16)
        figure = Figure(figsize=(width, 7), layout="constrained")
        *strips, lines = figure.subplots(3, 1, height_ratios=(1, 1, 1.2))
        titles = (
            f"mixing matrix of each sub-layer: rows are the next {stage.part}s",
            "their product from the first on",
        )
        middles = [k * (size + 1) + (size - 1) / 2 for k in range(count)]
        for axes, title, matrices in zip(strips, titles, (own, products), strict=True):
            gap = torch.full((size, 1), float("nan"))
            strip = torch.cat([part for matrix in matrices for part in (matrix, gap)], dim=1)[:, :-1]
            top = float(strip[~strip.isnan()].abs().max())
            picture = axes.imshow(strip.numpy(), cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="none")
            figure.colorbar(picture, ax=axes, shrink=0.9)
            axes.set_title(title, fontsize=11)
            axes.set_xticks(middles, [""] * count)
            axes.set_yticks(range(size))
            axes.spines[:].set_visible(False)
        values = torch.stack([torch.cat(gains).mean(0) for gains in stage.gains]).T.tolist()
        for (name, points), color, style in zip(
            zip(GAINS, values, strict=True), (OURS, "#d1495b") * 2, ("--", "--", "-", "-"), strict=True
        ):
            lines.plot(middles, points, style, color=color, marker=".", label=name)
        lines.set_xlim(strips[0].get_xlim())
        lines.set_ylabel("largest row or column sum")
        lines.set_xticks(middles, stage.names, rotation=90)
        color_labels(lines, "x", stage.names)
        lines.grid(alpha=0.25)
        lines.legend(frameon=False, ncols=2)
        return figure


def draw_classes(stage: StageNotes, labels: Tensor, classes: list[str]) -> Figure:
    """How the weights of each class differ from the mean over classes: what is written, and what is read."""
    panels: dict[str, list[Tensor]] = {"what streams take of an output (beta)": [], "what a branch reads (alpha)": []}
    places: list[str] = []
    for k, name in enumerate(stage.names):
        alpha = stage.alphas[k][0]
        streams, mixtures = alpha.shape[1:]
        means = class_means(stage, k, labels)
        deviation = (means - means.mean(0)).float()
        reads = deviation[:, : streams * mixtures].unflatten(1, (streams, mixtures))[..., : mixtures - streams]
        views = range(mixtures - streams)
        own = torch.stack([reads[:, s, s % len(views)] for s in range(streams)], dim=1)  # FC: of its own fraction
        written = deviation[:, streams * mixtures :]
        if stage.betas[k][0].dim() == alpha.dim():
            written = torch.stack([written[:, s * len(views) + s % len(views)] for s in range(streams)], dim=1)
        for panel, values in zip(panels.values(), (written, own), strict=True):
            panel.append(values)
        places += [name if stream == 0 else "" for stream in range(streams)]
    with matplotlib.rc_context(STYLE):
        height = min(max(0.24 * len(classes), 1.6), 5.0)
        figure = Figure(figsize=(min(4 + 0.22 * len(places), 14), 2 * height + 2.2), layout="constrained")
        for axes, (title, parts) in zip(figure.subplots(2, 1), panels.items(), strict=True):
            values = torch.cat(parts, dim=1)
            top = max(float(values.abs().max()), 1e-12)
            picture = axes.imshow(values.numpy(), cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="none")
            figure.colorbar(picture, ax=axes, shrink=0.8)
            axes.set_title(f"{title}, class minus mean", fontsize=11)
            axes.set_xticks([])
            axes.spines[:].set_visible(False)
            if len(classes) <= 40:
                axes.set_yticks(range(len(classes)), [plain(name) for name in classes])
            else:
                axes.set_ylabel(f"{len(classes)} classes")
        starts = [place for place, name in enumerate(places) if name]
        axes.set_xticks(starts, [places[place] for place in starts], rotation=90)
        color_labels(axes, "x", [places[place] for place in starts])
        return figure
