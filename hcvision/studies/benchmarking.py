"""How fast models are and what memory they take, each beside its residual twin."""

import gc
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from hcvision.connections import parse_connection
from hcvision.data import check_name, check_writable, has_compiler, is_out_of_memory, markdown, pick_device, write_csv
from hcvision.models import dit_names
from hcvision.studies.measuring import (
    PRECISIONS,
    WARM_UP,
    OperationCount,
    Step,
    inference_step,
    keep_freed_memory,
    measure,
    name_device,
    quartiles,
    ratios,
    training_step,
)
from hcvision.training import ImageClassifier, ImageGenerator, TimmModule

MODES = {"infer": "inference", "train": "training"}
TIMM_COLUMNS = {  # of timm's benchmark.py
    "infer": ("samples_per_sec", "step_time", "batch_size", "img_size", "gmacs", "macts"),
    "train": ("samples_per_sec", "step_time", "batch_size", "img_size"),
}
COLUMNS = ("ratio", "ratio_q1", "ratio_q3", "peak_memory_mb", "memory_ratio")  # and ours


def benchmark(
    models: list[str],
    connection: str | None = None,
    batch_size: int = 32,
    img_size: int | None = None,
    num_classes: int = 1000,
    model_args: dict[str, Any] | None = None,
    opt: str = "adamw",
    device: str = "auto",
    precision: str = "32",
    compile: bool = False,
    grad_checkpointing: bool = False,
    infer: bool = True,
    train: bool = True,
    rounds: int = 15,
    out: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure images per second and peak memory, in inference and in training, each model beside its residual twin.

    Args:
        models: timm names, ours included, with a connection of any rate behind them or none; dit_* too.
        connection: dhc2, sfc4, ... for those of the models that are named without one.
        batch_size: images of a step.
        img_size: their height and width; the model's own if not given.
        num_classes: classes.
        model_args: more arguments of timm.create_model: depth, drop_path_rate, connection_blocks, ...
        opt: optimizer of the training step, by timm's name.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.
        precision: 32, bf16-mixed, 16-mixed (no scaling of the loss), bf16-true or 16-true, as Lightning's.
        compile: run the models through torch.compile. Memory is then measured on a GPU only.
        grad_checkpointing: compute activations again in backward instead of keeping them.
        infer: measure inference: a forward pass without gradients.
        train: measure training: forward, backward and the optimizer's update.
        rounds: steps of each model that count, after two that warm it up.
        out: CSV file for the results, in the columns of timm's benchmark.py and more: ratios to the twin and their
            quartiles, memory. Times are medians in milliseconds, parameters and activations in millions, memory in
            10^6 bytes. GMACs count matmuls and convolutions, of one image.
        overwrite: write over that file if it exists.
        say: called with the lines to print.

    Returns:
        A row per model, twins included, by those columns. Memory is the most that tensors take at a time: on a GPU
        what its allocator counts, less what was there before the model; on a CPU the tensors that operations have
        touched, which leaves out an optimizer's state until the update.

    Raises:
        ValueError: an unknown name, with the nearest ones, or another bad argument.
        MemoryError: it does not fit; what was measured before is in ``out``.
    """
    check_name("precision", precision, PRECISIONS)
    counts = {"batch_size": batch_size, "num_classes": num_classes, "rounds": rounds, "img_size": img_size}
    for what, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    model_args = model_args or {}
    if img_size is not None and "img_size" in model_args:
        raise ValueError(f"give img_size or model_args.img_size, got both ({img_size} and {model_args['img_size']})")
    modes = [mode for mode, wanted in (("infer", infer), ("train", train)) if wanted]
    if not modes:
        raise ValueError("nothing to measure: infer and train are both false")
    if out is not None and Path(out).exists() and not (overwrite and Path(out).is_file()):
        raise ValueError(f"{out} exists; --overwrite true writes over a file, --out names another one")
    if out is not None:
        check_writable(Path(out).parent, "--out names another file")
    if compile and not has_compiler(pick_device(device).partition(":")[0]):
        raise ValueError("there is no compiler, which torch.compile needs; --compile false measures without it")
    setup = Setup(
        modes=modes,
        rounds=rounds,
        batch_size=batch_size,
        img_size=img_size,
        num_classes=num_classes,
        model_args=model_args,
        opt=opt,
        device=pick_device(device),
        precision=precision,
        compile=compile,
        grad_checkpointing=grad_checkpointing and train,
    )
    twins = find_twins(models, connection)
    if setup.device == "cpu":
        keep_freed_memory()
    steps = sum(map(len, twins.values())) * (1 + len(modes) * (WARM_UP + rounds))
    facts: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    with tqdm(total=steps, leave=False, disable=None) as bar:
        for base, group in twins.items():  # what cannot be built or run fails before anything is measured
            bar.set_description(f"building {base}")
            for name, kind in group.items():
                facts[name] = {"model": name, **setup.look(base, kind)}
                bar.update()
            gc.collect()
        bar.clear()
        say(setup.describe())
        try:
            for base, group in twins.items():
                rows += setup.measure(base, group, facts, bar)
                if out is not None:
                    write_csv(Path(out), rows)
        finally:
            bar.clear()
            for mode in modes if rows else []:
                say("\n" + "\n".join(table(rows, mode)))
    return rows


def find_twins(models: Iterable[str], connection: str | None = None) -> dict[str, dict[str, str | None]]:
    """The residual twins of models, and what is measured together with each: names and connections, the twin first.

    Raises:
        ValueError: an unknown name, a name with a tag, or two connections for a model.
    """
    if connection is not None:
        parse_connection(connection)
    groups: dict[str, dict[str, str | None]] = {}
    for name in models:
        base, kind = split_name(name)
        if kind is not None and connection is not None:
            raise ValueError(f"{name} has a connection already; give {base}, or no --connection")
        architecture, _, tag = base.partition(".")
        check_name("model", architecture, timm.list_models())
        if tag:
            raise ValueError(f"{name} names weights, and none are loaded to measure it; give {architecture}")
        kind = kind or (connection if connection != "residual" else None)
        names = groups.setdefault(base, {base: None})
        if kind is not None:
            names[f"{base}_{kind}"] = kind
    if not groups:
        raise ValueError("models must be one or more names, got none")
    return groups


def split_name(name: str) -> tuple[str, str | None]:
    """``vit_tiny_patch16_224_dhc3`` into the timm name and ``dhc3``; a name without connection and None."""
    base, _, kind = name.rpartition("_")
    try:
        parse_connection(kind)
    except ValueError:
        return name, None
    return (base, kind) if kind != "residual" and timm.is_model(base) else (name, None)


@dataclass(frozen=True)
class Setup:
    """What the models of a benchmark have in common; see ``benchmark``."""

    modes: list[str]
    rounds: int
    batch_size: int
    img_size: int | None
    num_classes: int
    model_args: dict[str, Any]
    opt: str
    device: str
    precision: str
    compile: bool
    grad_checkpointing: bool

    def describe(self) -> str:
        how = ["compiled" if self.compile else "eager", f"precision {self.precision}", f"batches of {self.batch_size}"]
        how += [self.opt] if "train" in self.modes else []
        how += ["gradient checkpointing"] if self.grad_checkpointing else []
        how += [f"median of {self.rounds} round{'s' * (self.rounds > 1)}"]
        text = f"{name_device(self.device)}, torch {torch.__version__}, timm {timm.__version__}: {', '.join(how)}"
        if self.device == "cpu":
            text += "\ntimes on a CPU are noise: read the ratios, which are to the twin's step of the same round"
        return text

    def build(self, base: str, connection: str | None, training: bool) -> TimmModule:
        """The model, on the CPU; the same trunk for every connection.

        Raises:
            ValueError: it does not take the connection or one of the arguments.
        """
        kind = ImageGenerator if base in dit_names else ImageClassifier
        more = {k: v for k, v in self.model_args.items() if connection or not k.startswith("connection_")}
        if self.img_size is not None and getattr(timm.get_pretrained_cfg(base), "fixed_input_size", False):
            more["img_size"] = self.img_size
        torch.manual_seed(0)
        try:
            return kind(
                base,
                connection=connection,
                num_classes=self.num_classes,
                model_args=more,
                opt=self.opt,
                grad_checkpointing=self.grad_checkpointing and training,
            )
        except TypeError as error:
            raise ValueError(f"{base} does not take these model_args: {error}") from error

    def batch(self, module: TimmModule, number: int, device: str) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and classes (B,)."""
        channels, *size = module.data_config["input_size"]
        size = size if self.img_size is None else [self.img_size, self.img_size]
        images = torch.randn(number, channels, *size, device=device)
        return images, torch.randint(self.num_classes, (number,), device=device)

    def look(self, base: str, connection: str | None) -> dict[str, Any]:
        """What one image tells: the columns that are the same wherever they are measured.

        Raises:
            ValueError: the model cannot be built so, or does not take such an image.
        """
        module = self.build(base, connection, training=True)
        batch = self.batch(module, 1, "cpu")
        try:
            with OperationCount() as count, sdpa_kernel(SDPBackend.MATH):
                inference_step(module, batch, "32")()
        except (AssertionError, RuntimeError) as error:
            size = " x ".join(map(str, batch[0].shape[1:]))
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{base} does not take images of {size}: {reason}") from error
        return {
            "infer_gmacs": round(count.macs / 1e9, 2),
            "infer_macts": round(count.activations / 1e6, 2),
            "param_count": round(sum(parameter.numel() for parameter in module.model.parameters()) / 1e6, 2),
            **{f"{mode}_img_size": batch[0].shape[-1] for mode in MODES},
            **{f"{mode}_batch_size": self.batch_size for mode in MODES},
            "device": name_device(self.device),
            "precision": self.precision,
            "torch": torch.__version__,
        }

    def measure(
        self, base: str, group: dict[str, str | None], facts: dict[str, dict[str, Any]], bar: tqdm
    ) -> list[dict[str, Any]]:
        """The rows of a twin and of what goes with it."""

        def build(name: str) -> Step:
            module = self.build(base, group[name], training=mode == "train").to(self.device)
            batch = self.batch(module, self.batch_size, self.device)
            if self.compile:
                module.model.compile(dynamic=False)
            if mode == "infer":
                return inference_step(module, batch, self.precision)
            optimizer = create_optimizer_v2(
                module.model, opt=self.opt, lr=1e-4, weight_decay=0.05, fallback_list=("*connection?.*",)
            )  # as in a run
            return training_step(module, batch, self.precision, optimizer)

        rows = {name: {**facts[name], "twin": None if name == base else base} for name in group}
        for mode in self.modes:
            bar.set_description(f"{base}, {MODES[mode]}")
            if self.compile:
                torch.compiler.reset()
            try:
                times, peaks = measure(list(group), build, self.rounds, self.device, bar.update)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise MemoryError(
                    f"not enough memory on {self.device} for {MODES[mode]} of {', '.join(group)} side by side in "
                    f"batches of {self.batch_size}; a smaller batch_size or fewer of them at a time need less"
                ) from error
            if self.compile and self.device == "cpu":
                peaks = {}  # there memory is that of the eager model
            for name, row in rows.items():
                values = describe_step(times[name], peaks.get(name), self.batch_size)
                if name != base:
                    values |= compare_step(times[name], times[base], peaks.get(name), peaks.get(base))
                row |= {f"{mode}_{key}": value for key, value in values.items()}
        timms = [f"{mode}_{column}" for mode in self.modes for column in TIMM_COLUMNS[mode]]
        ours = [f"{mode}_{column}" for mode in self.modes for column in COLUMNS]
        columns = ["model", *timms, "param_count", *ours, "twin", "device", "precision", "torch"]
        return [{column: row.get(column) for column in columns} for row in rows.values()]


def describe_step(times: list[float], peak: float | None, batch_size: int) -> dict[str, float | None]:
    """The columns of a model's steps: seconds and bytes in other units."""
    elapsed = statistics.median(times)
    return {
        "samples_per_sec": round(batch_size / elapsed, 2),
        "step_time": round(1e3 * elapsed, 3),
        "peak_memory_mb": None if peak is None else round(peak / 1e6, 2),
    }


def compare_step(
    times: list[float], first: list[float], peak: float | None, base: float | None
) -> dict[str, float | None]:
    """The columns of a model beside its twin."""
    low, middle, high = quartiles(ratios(times, first))
    memory = None if peak is None or base is None else round(peak / base, 4)
    return {"ratio": round(middle, 4), "ratio_q1": round(low, 4), "ratio_q3": round(high, 4), "memory_ratio": memory}


def table(rows: list[dict[str, Any]], mode: str) -> list[str]:
    """The rows' inference or training in Markdown."""
    lines = [[MODES[mode], "images/s", "ms", "time (quartiles)", "memory, MB", "memory"]]
    for row in rows:
        value = {key.removeprefix(f"{mode}_"): value for key, value in row.items() if value is not None}
        line = [row["model"], f"{value['samples_per_sec']:,.1f}", f"{value['step_time']:,.1f}"]
        spread = "{ratio:.2f} x ({ratio_q1:.2f} - {ratio_q3:.2f})"
        line += [spread.format_map(value) if "ratio" in value else ""]
        line += [f"{value['peak_memory_mb']:,.1f}" if "peak_memory_mb" in value else ""]
        lines.append([*line, f"{value['memory_ratio']:.2f} x" if "memory_ratio" in value else ""])
    return markdown(lines)
