"""What a busy neighbour costs `hcvision fit`: images per second alone, and beside a process that wants a core.

    python benchmarks/neighbour.py --root data

Trains the small ViT of the demo for some steps, in processes of their own, alone and beside a loop that never ends,
in turns; once as the command line sets things, and for comparison as OpenMP does by default (threads that spin). The
medians of the rounds are compared. Fashion-MNIST has to be in --root; `make data` puts it there.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytorch_lightning as pl

HERE = Path(__file__).parent
WARM_UP = 5  # steps
WAYS = {
    "as hcvision sets it": {},
    "with one thread": {"OMP_NUM_THREADS": "1"},
    "threads that spin briefly": {"GOMP_SPINCOUNT": "1000"},
    "threads that spin": {"GOMP_SPINCOUNT": "300000"},  # what libgomp does when nothing is said
}


class Speed(pl.Callback):
    """Prints images per second of the steps after the first few."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step == WARM_UP:
            self.began = time.perf_counter()
        elif trainer.global_step == trainer.max_steps:
            images = len(batch[0]) * (trainer.max_steps - WARM_UP)
            print(f"speed {images / (time.perf_counter() - self.began)}", flush=True)


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(root: str, steps: int, way: dict[str, str]) -> float:
    """Images per second of `hcvision fit` on the demo's model."""
    unset = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    usual = {name: value for name, value in os.environ.items() if name not in unset}
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        command = ["fit", f"--config={HERE.parent}/configs/fashion_mnist.yaml", f"--data.root={root}"]
        command += [f"--run={folder}/run", "--model.connection=residual", "--trainer.accelerator=cpu"]
        command += [f"--trainer.max_steps={steps}", "--model.warmup_steps=2", "--trainer.callbacks+=neighbour.Speed"]
        command += ["--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
        done = subprocess.run(
            [sys.executable, "-m", "hcvision_command", *command],
            env={**usual, **way, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    speeds = [line for line in done.stdout.splitlines() if line.startswith("speed ")]
    if not speeds:
        raise SystemExit(f"hcvision fit ended with {done.returncode}:\n{done.stderr}")
    return float(speeds[0].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="where Fashion-MNIST is")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="of training, per process")
    options = parser.parse_args()
    speeds: dict[tuple[str, bool], list[float]] = {(name, beside): [] for name in WAYS for beside in (False, True)}
    for _ in range(options.rounds):
        for name, beside in speeds:
            with busy_process() if beside else contextlib.nullcontext():
                speeds[name, beside].append(measure(options.root, options.steps, WAYS[name]))
    print(f"{os.cpu_count()} cores; images per second, medians of {options.rounds}\n")
    print("| | alone | beside a busy process | share kept |\n|---|---|---|---|")
    for name in WAYS:
        alone, beside = (statistics.median(speeds[name, busy]) for busy in (False, True))
        print(f"| {name} | {alone:.0f} | {beside:.0f} | {beside / alone:.2f} |")


if __name__ == "__main__":
    main()
