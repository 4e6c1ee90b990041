"""A trained classifier as files for other programs: timm's hub folder, ONNX, torch.export; each is read back."""

import contextlib
import importlib.util
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from hcvision.data import TIMM_PREFIXES, Images, check_writable, collate, in_one_line
from hcvision.deploy.classifier import MULTI_LABEL, Classifier, load_classifier
from hcvision.deploy.prediction import Files, find_images
from hcvision.models import ConnectedModel, hcvision_converted, vit_names
from hcvision.training import run_data

HUB, ONNX, PT2 = "model.safetensors", "model.onnx", "model.pt2"
WRITTEN = {HUB, ONNX, f"{ONNX}.data", PT2, "config.json"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CONVERTED = hcvision_converted.__name__  # builds what importing hcvision does not register
TOLERANCE = 1e-3  # of the largest logit; in timm's layout nothing may differ
CHECKED = 32  # images
LARGE = 1_500_000_000  # bytes; weights beyond go into a file beside the ONNX graph, which must be below 2 GB

Forward = Callable[[Tensor], Tensor]


def export(
    checkpoint: str,
    out: str,
    onnx: bool = False,
    torch_export: bool = False,
    weights: str = "ema",
    images: list[str] | None = None,
    opset: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a trained classifier as a folder that timm loads, and as ONNX and torch.export if wanted.

    Every file is read back, and its logits are compared with the model's, at several batch sizes.

    Args:
        checkpoint: a run's folder, a checkpoint, a folder that timm wrote, or hf-hub:OWNER/NAME.
        out: folder for config.json, model.safetensors, model.onnx and model.pt2.
        onnx: write model.onnx too, from images (B, C, H, W) to logits (B, num_classes), for any B.
        torch_export: write model.pt2 too, the same for torch.export.load.
        weights: ema or raw, where the run averaged its weights.
        images: files, folders and patterns to check with; if not given, validation images of the run, or else noise.
        opset: version of ONNX's operators; PyTorch's choice if not given.
        overwrite: replace an earlier export.

    Raises:
        ValueError: there is no such classifier or image, packages are missing, a format does not take the model,
            or a file gives other logits than the model.
        FileExistsError: ``out`` exists and is not empty.
    """
    folder = Path(out).resolve()
    _check_room(folder, out, overwrite)
    check_writable(folder.parent, "out must be in another folder")
    missing = [package for package in ONNX_PACKAGES if onnx and importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'hcvision[export]'")
    classifier = load_classifier(checkpoint, weights)
    batches, what = _images_to_check(checkpoint, classifier, images)
    print(f"{classifier.origin} is checked on {what}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        new = Path(place) / "new"
        save_hub_folder(classifier, new)
        _check(HUB, timm.create_model(f"local-dir:{new}", pretrained=True).eval(), classifier, batches, 0.0)
        if torch_export:
            torch.export.save(_trace(classifier), new / PT2)
            _check(PT2, torch.export.load(new / PT2).module(), classifier, batches)
        if onnx:
            with plain_attention(classifier.model):
                program = _trace(classifier)
            _save_onnx(classifier, program, new / ONNX, opset)
            _check(ONNX, _open_onnx(new / ONNX), classifier, batches)
        old = Path(place) / "old"
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir())
    sizes = [
        f"{name} ({size / 1e6:.1f} MB)" if size >= 1e6 else f"{name} ({size / 1e3:.1f} kB)" for name, size in files
    ]
    print(f"{out}: {len(files)} files, {', '.join(sizes)}")
    print(f'import hcvision, timm; model = timm.create_model("local-dir:{out}", pretrained=True)')


def _check_room(folder: Path, out: str, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{out} is a file; out must be a folder")
    there = {path.name for path in folder.iterdir()}
    if there and not overwrite:
        raise FileExistsError(f"{out} is not empty; --overwrite true replaces an earlier export")
    if there - WRITTEN:
        raise FileExistsError(f"{out} holds more than an export, and is not replaced: {sorted(there - WRITTEN)[0]}")


def save_hub_folder(classifier: Classifier, folder: Path) -> None:
    """Write config.json and model.safetensors, from which ``timm.create_model("local-dir:...")`` makes the model."""
    model: Any = classifier.model
    cfg = model.pretrained_cfg
    config: dict[str, Any] = {"label_names": classifier.class_names}
    arguments = {}
    if classifier.multi_label:
        config["pretrained_cfg"] = {"notes": sorted({*(cfg.get("notes") or ()), MULTI_LABEL})}
    if isinstance(model, ConnectedModel) and cfg["architecture"] not in (CONVERTED, *vit_names):
        config["architecture"], arguments = CONVERTED, {"connection_architecture": cfg["architecture"]}
    save_for_hf(
        model,
        str(folder),
        model_config=config,
        model_args=arguments,
        data_config={"crop_mode": "center", **classifier.data_config},
        safe_serialization=True,
    )
    (folder / HUB).chmod((folder / "config.json").stat().st_mode)  # safetensors lets its owner alone read it


def _trace(classifier: Classifier) -> torch.export.ExportedProgram:
    """The model as torch.export sees it, for batches of any size."""
    example = torch.zeros(2, *classifier.data_config["input_size"])
    try:
        with torch.no_grad():
            return torch.export.export(
                classifier.model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"torch.export does not take this model: {in_one_line(error)}") from error


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Have timm write attention as matrix products: torch.onnx does not take every form of the fused one."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def _save_onnx(classifier: Classifier, program: torch.export.ExportedProgram, path: Path, opset: int | None) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it names every operator that it leaves as it is
    try:
        written: Any = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], opset_version=opset, dynamo=True, verbose=False
        )
    except (RuntimeError, ValueError) as error:
        reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(f"PyTorch cannot write this model as ONNX: {in_one_line(reason)}") from error
    version = written.model.opset_imports[""]
    if opset not in (None, version):
        raise ValueError(f"PyTorch writes this model with opset {version}, not {opset}")
    written.model.metadata_props.update(describe(classifier))
    size = sum(tensor.nbytes for tensor in classifier.model.state_dict().values())
    written.save(str(path), external_data=size > LARGE)


def describe(classifier: Classifier) -> dict[str, str]:
    """How images are prepared and what the classes are called, each value as JSON."""
    config = {**classifier.data_config, "class_names": classifier.class_names, MULTI_LABEL: classifier.multi_label}
    return {name: json.dumps(value) for name, value in config.items()}


def _open_onnx(path: Path) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _images_to_check(checkpoint: str, classifier: Classifier, images: list[str] | None) -> tuple[list[Tensor], str]:
    """Batches of 1, of 5 and of the rest, and what they are in words."""
    if images:
        files = find_images(images)
        found, bad = _read(classifier.dataset(Files(files), _spread(len(files))))
        if found is None:
            raise ValueError(f"none of the images to check with could be read: {bad}")
        what = f"{len(found)} images that were given"
    else:
        found, what = _validation_images(checkpoint, classifier)
    if found is None:
        generator = torch.Generator().manual_seed(0)
        found = torch.randn(8, *classifier.data_config["input_size"], generator=generator)
        what = f"8 images of seeded noise, for want of real ones ({what}); --images names some"
    found = found[torch.arange(max(len(found), 6)) % len(found)]
    return [batch for batch in found.split([1, 5, len(found) - 6]) if len(batch)], what


def _validation_images(checkpoint: str, classifier: Classifier) -> tuple[Tensor | None, str]:
    """Validation images of a run, or None, and what they are or why there are none, in words."""
    try:
        data = run_data(checkpoint, (*TIMM_PREFIXES, "latents"))
    except ValueError as error:
        return None, str(error)
    try:
        data.setup("validate")
        base, indices = data.stages["val"]
        found, bad = _read(classifier.dataset(base, [indices[i] for i in _spread(len(indices))]))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        return None, f"the run's cannot be opened: {in_one_line(error)}"
    return found, bad if found is None else f"{len(found)} validation images of the run"


def _spread(count: int) -> list[int]:
    """At most ``CHECKED`` numbers below count, evenly spread."""
    return sorted({i * count // CHECKED for i in range(CHECKED)}) if count else []


def _read(images: Images) -> tuple[Tensor | None, str]:
    """The images that can be read (B, C, H, W), or None and why the first of them cannot."""
    batch = collate([images[number] for number in range(len(images))])
    return (batch.images, "") if len(batch.images) else (None, str(next(iter(batch.bad), "there are none")))


@torch.no_grad()
def _check(
    name: str, forward: Forward, classifier: Classifier, batches: list[Tensor], tolerance: float = TOLERANCE
) -> None:
    """Compare logits with the model's and print what came out. Raises ValueError when they differ too much."""
    expected = torch.cat([classifier.model(batch) for batch in batches])
    given = torch.cat([forward(batch) for batch in batches])
    difference, largest = (given - expected).abs().max().item(), expected.abs().max().item()
    same = (given.argmax(1) == expected.argmax(1)).double().mean().item()
    sizes = ", ".join(str(len(batch)) for batch in batches)
    print(f"{name}: largest difference {difference:.2g} of logits up to {largest:.3g}, same top-1 {same:.1%}, ", end="")
    print(f"in batches of {sizes}")
    if not difference <= tolerance * largest:
        raise ValueError(
            f"{name} gives other logits than the model: {difference:.2g} of {largest:.3g} ({tolerance:g} is allowed)"
        )
