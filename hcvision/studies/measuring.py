"""Step time and memory of models, measured interleaved."""

import ctypes
import gc
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hcvision.training import ImageGenerator, TimmModule

Step = Callable[[], None]
WARM_UP = 2  # rounds
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # of the parameters, and of autocast
    "32": (torch.float32, None),
    "32-true": (torch.float32, None),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-true": (torch.float16, None),
    "bf16-true": (torch.bfloat16, None),
}


def keep_freed_memory() -> None:
    """Let freed memory stay with the process; for glibc, elsewhere nothing happens.

    Models of different sizes that take turns in one process make the allocator give pages back and fault them in
    again, round after round: 75,000 page faults in a step of a dhc4 trunk that takes 2 s, 0.3 to 0.7 s of them in the
    system, and none of it where one model trains alone.
    """
    if platform.system() != "Linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            library.mallopt(parameter, value)


def name_device(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()} ({threads} thread{'s' * (threads > 1)})"


def training_step(
    module: TimmModule,
    batch: tuple[Tensor, Tensor],
    precision: str,
    optimizer: torch.optim.Optimizer | None = None,
) -> Step:
    """A training step as a function: forward, backward, update; by AdamW if no optimizer is given."""
    dtype, autocast = PRECISIONS.get(precision, PRECISIONS["32"])
    module.model.to(dtype)
    images, targets = batch[0].to(dtype), batch[1]
    optimizer = optimizer or torch.optim.AdamW(module.model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            loss = module.batch_loss((images, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def inference_step(module: TimmModule, batch: tuple[Tensor, Tensor], precision: str) -> Step:
    """A forward pass as a function, in evaluation mode and without gradients."""
    dtype, autocast = PRECISIONS[precision]
    module.eval().model.to(dtype)
    inputs: tuple[Tensor, ...] = (batch[0].to(dtype),)
    if isinstance(module, ImageGenerator):
        inputs = (*inputs, module.diffusion.draw_time(len(batch[0]), batch[0].device), batch[1])

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(inputs[0].device.type, autocast, enabled=autocast is not None):
            module(*inputs)

    return step


def measure(
    names: list[str], build: Callable[[str], Step], rounds: int, device: str, tick: Callable[[], Any] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The times of steps that take turns, and the memory that each of them takes.

    Args:
        names: what is measured.
        build: makes the step of a name.
        rounds: that count, after those of warm-up.
        device: where the steps run.
        tick: called after every step that takes its turn.

    Returns:
        By name: seconds of a step, a value per round; and the peak of memory in bytes.
    """
    cuda = device.startswith("cuda")
    gc.collect()  # Lightning's modules hold themselves
    if cuda:
        build(names[0])()  # what libraries allocate with their first operations is no model's
        gc.collect()
    steps, peaks = {}, {}
    for name in names:
        before = torch.cuda.memory_allocated(device) if cuda else 0
        steps[name] = build(name)
        steps[name]()
        peaks[name] = peak_memory(steps[name], device) - before
    return interleaved_times(steps, rounds, device, tick), peaks


def interleaved_times(
    steps: dict[str, Step], rounds: int, device: str, tick: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each step, a value per round. The order changes from round to round."""

    def seconds(step: Step) -> float:
        began = time.perf_counter()
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            elapsed = seconds(steps[name])
            if number >= WARM_UP:
                times[name].append(elapsed)
            tick()
    return times


def ratios(times: list[float], first: list[float]) -> list[float]:
    """Times relative to those of the same round."""
    return [time / one for time, one in zip(times, first, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def peak_memory(step: Step, device: str) -> float:
    """Peak of the memory that tensors take in a step, in bytes."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with TensorMemory() as memory:
        step()
    return memory.peak


class TensorMemory(TorchDispatchMode):
    """Adds up the storages that operations touch while they live: what a GPU's allocator counts, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = self.peak = 0

    def _drop(self, address: int) -> None:
        self.now -= self.known.pop(address, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address not in self.known:
                self.known[address] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, address)
        self.peak = max(self.peak, self.now)
        return result


class OperationCount(TorchDispatchMode):
    """Counts multiply-adds of matmuls and convolutions, and the numbers that come out of them (timm's macts)."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.activations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        flops = flop_registry.get(function._overloadpacket)
        if flops is not None:
            self.macs += flops(*args, **(kwargs or {}), out_val=result) // 2
            for tensor in tree_leaves(result):  # a placeholder of connections takes no memory
                self.activations += min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
