"""``hcvision sample``."""

import difflib
from pathlib import Path
from typing import Any

from hcvision.data import is_first_process
from hcvision.diffusion import (
    Sampling,
    columns_of,
    describe_samples,
    draw_samples,
    enlarge,
    grid,
    load_vae,
    read_samples,
    write_npz,
)
from hcvision.models import TRUNK, read_sizes
from hcvision.training import ImageGenerator, last_checkpoint, load_module, pick_weights, read_checkpoint, read_weights


def sample(
    checkpoint: str,
    out: str = "samples",
    number: int = 64,
    classes: list[str | int] | None = None,
    guidance: float = 1.0,
    guided_channels: int | None = 3,
    guidance_interval: tuple[float, float] | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    coefficient: str | None = None,
    last_step: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    npz: bool = False,
    model: str | None = None,
    model_args: dict[str, Any] | None = None,
    connection: str | None = None,
    objective: str = "ddpm",
    vae: str | None = None,
    accelerator: str = "auto",
    devices: str = "auto",
    strategy: str = "auto",
    precision: str = "32-true",
) -> None:
    """Draw images with a diffusion model. A run that was killed goes on where it was.

    Args:
        checkpoint: a run's folder, a checkpoint of ours, or, together with --model, a file of weights.
        out: folder for samples.png (a grid of the first 64 at most), samples.npz and the parts of the run.
        number: images; image i is of class i modulo the number of classes.
        classes: names or numbers of the classes wanted; all if not given.
        guidance: scale of classifier-free guidance; 1 is none.
        guided_channels: of the first channels only; the published DiT numbers are with 3; null for all.
        guidance_interval: two numbers from 0 (noise) to 1 (image) between which to guide; everywhere if not given.
        steps: of the sampler; 250 for ddpm, 50 for the others if not given.
        sampler: ddpm, ddim, dpm++ or unipc (of diffusers); heun, euler or sde for velocity and image.
        coefficient: diffusion coefficient of sde: constant (1), sigma (1 - t, if not given) or path ((1 - t) / t).
        last_step: size of the last step of sde, which adds no noise; 0.04 if not given.
        seed: of the noise; image i depends on it and on i alone.
        batch_size: images at a time, per device.
        npz: write samples.npz too: arr_0, (N, H, W, 3), uint8, as ADM's evaluator reads it.
        model: timm name of a DiT, for a file of weights that is no checkpoint of ours. The number of classes, the
            size and the channels are read in the file.
        model_args: more arguments of the model that the file is of.
        connection: the same file's connection.
        objective: the same file's objective: ddpm, velocity or image.
        vae: name or folder of the VAE; the checkpoint's if not given.
        accelerator: Lightning's.
        devices: Lightning's.
        strategy: Lightning's.
        precision: Lightning's.
    """
    module = load_generator(checkpoint, model, model_args, connection, objective, vae)
    names = module.class_names or [str(i) for i in range(module.hparams["num_classes"])]
    plan = Sampling(steps, sampler, guidance, guided_channels, seed, guidance_interval, coefficient, last_step)
    wanted = [find_class(str(name), names) for name in classes] if classes else list(range(len(names)))
    count = int(devices) if devices.lstrip("-").isdigit() else devices
    trainer = {"accelerator": accelerator, "devices": count, "strategy": strategy, "precision": precision}
    folder = draw_samples(module, Path(out), plan, number, wanted, batch_size, trainer)
    if not is_first_process():
        return
    columns = columns_of(wanted)
    shown = min(number, max(columns, 64 // columns * columns))
    enlarge(grid(read_samples(folder, shown), columns), 640).save(Path(out) / "samples.png")
    if npz:
        write_npz(Path(out) / "samples.npz", folder, number)
    print(f"drawn by {describe_samples(Path(out))}")
    print(f"{number} images of {len(set(wanted))} classes are in {out}: samples.png{' and samples.npz' if npz else ''}")


def load_generator(
    path: str,
    model: str | None,
    model_args: dict[str, Any] | None,
    connection: str | None,
    objective: str,
    vae: str | None,
) -> ImageGenerator:
    """The diffusion model of a run, of a checkpoint, or of a file of weights."""
    file = last_checkpoint(Path(path)) if Path(path).is_dir() else Path(path)
    if file is None or not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: neither a file nor the folder of a run")
    if model is not None:
        sizes = read_sizes(pick_weights(read_weights(str(file))[0], TRUNK))
        classes = sizes.pop("num_classes", 1000)
        module = ImageGenerator(
            model, connection=connection, objective=objective, vae=vae, num_classes=classes,
            model_args={**sizes, **(model_args or {})},
        )  # fmt: skip
        lacking = module.load_weights(str(file))
        if lacking:
            raise ValueError(
                f"{file} holds other weights than a {model}: {lacking[0]} is not in it, or of another size"
            )
        return able_to_draw(module)
    hparams = read_checkpoint(file).get("hyper_parameters", {})
    if "objective" not in hparams:
        what = "a classifier" if "model" in hparams else "no checkpoint of ours (--model says what weights are of)"
        raise ValueError(f"{file} is {what}; `hcvision sample` draws with diffusion models")
    generator, checkpoint = load_module(file, vae=vae or hparams["vae"])
    assert isinstance(generator, ImageGenerator)
    generator.data_config |= checkpoint.get("data_config", {})
    generator.class_names = checkpoint.get("class_names")
    return able_to_draw(generator)


def able_to_draw(module: ImageGenerator) -> ImageGenerator:
    """The same. Raises ValueError when it draws latents and nothing says which VAE makes images of them."""
    channels = module.data_config["input_size"][0]
    if module.hparams["vae"] is None and channels not in (1, 3):
        raise ValueError(
            f"the model draws latents of {channels} channels; --vae names the VAE that makes images of them"
        )
    if module.hparams["vae"] is not None:
        load_vae(module.hparams["vae"])
    return module.eval()


def find_class(name: str, names: list[str]) -> int:
    """The number of a class that is given by name or number."""
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(names):
        return int(name)
    near = difflib.get_close_matches(name, names, n=3)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"there are {', '.join(names[:10])}" + ", ..." * (len(names) > 10)
    )
    raise ValueError(f"unknown class {name!r}; {hint}")
