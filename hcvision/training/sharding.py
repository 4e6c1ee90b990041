"""Weights in parts: FSDP2 (``torch.distributed.fsdp.fully_shard``), as Lightning's ModelParallelStrategy runs it.

Every process holds a part of each block's weights, of their gradients and of the optimizer's state; a block's weights
are whole only while it is computed. An average of the weights is in the same parts.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hcvision.models import BLOCKS, own_class


def shard(module: pl.LightningModule, model: nn.Module) -> None:
    """Give every process a part of the weights of each block of the model, of what is around them and beside the model.

    Raises:
        ValueError: a setting that does not work with parts of weights.
    """
    if isinstance(model, FSDPModule):
        return
    mesh: Any = module.device_mesh
    data, tensor = (mesh[name].size() for name in ("data_parallel", "tensor_parallel"))
    if tensor > 1:
        raise ValueError(
            f"data_parallel_size must be {data * tensor} and tensor_parallel_size 1, got {data} and {tensor}"
        )
    if module.trainer.strategy._save_distributed_checkpoint:  # type: ignore[attr-defined]
        raise ValueError("save_distributed_checkpoint must be false: the checkpoint of a run is one file")
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # which nothing changes in place
    for part in [*model.modules()]:
        if own_class(part) in BLOCKS:
            fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    for part in module.children():
        if part is not model and any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh["data_parallel"])


def hold_whole(model: nn.Module, whole: bool = True) -> None:
    """Hold whole weights, to evaluate: not every process has the same number of batches. Or parts again."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            if part is not model:  # which keeps its own until then anyway
                part.set_reshard_after_forward(not whole, recurse=False)
            part.unshard() if whole else part.reshard()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; all of one that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Parts:
    """The average of a module's weights, each part where the weights' own part is.

    It stands for the ``AveragedModel`` of Lightning's callback: same numbers, same state.
    """

    def __init__(self, module: pl.LightningModule, average: Callable[..., Tensor]):
        self.module, self.average = module, average
        self.current: dict[str, Tensor] = module.state_dict(keep_vars=True)  # the parts, whatever is whole later on
        with torch.no_grad():
            self.averaged = {id(tensor): local(tensor).clone() for tensor in self.current.values()}
        self.count = torch.zeros((), dtype=torch.long)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Averaged and current parts; a parameter of two names is in it once."""
        unique = {id(tensor): tensor for tensor in self.current.values()}
        return [(self.averaged[key], local(tensor.detach())) for key, tensor in unique.items()]

    def update_parameters(self, module: nn.Module) -> None:
        """Take the current weights into the average; the first ones are the average."""
        for averaged, current in self.pairs():
            averaged.copy_(current if self.count == 0 else self.average(averaged, current, self.count))
        self.count += 1

    def swap(self) -> None:
        """Exchange the average and the current weights."""
        for averaged, current in self.pairs():
            before = averaged.clone()
            averaged.copy_(current)
            current.copy_(before)

    def state_dict(self) -> dict[str, Tensor]:
        """Gathered, tensor by tensor, in the first process's memory; all processes have to call it."""
        state: dict[str, Tensor] = {"n_averaged": self.count}
        for name, tensor in self.current.items():
            whole = self.averaged[id(tensor)]
            if isinstance(tensor, DTensor):
                whole = DTensor.from_local(
                    whole, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
                ).full_tensor()
            if self.module.global_rank == 0:
                state[f"module.{name}"] = whole.cpu()
        return state


class AverageInParts(EMAWeightAveraging):
    """Lightning's moving average for weights in parts: kept in parts, evaluated and saved as ever.

    The checkpoint is the one of a single process, which reads it, and the other way round.
    """

    @property
    def state_key(self) -> str:
        return EMAWeightAveraging.__qualname__

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing: weights are not in parts yet."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.parts = Parts(pl_module, self._kwargs["avg_fn"])
        self._average_model: Any = self.parts

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exchange the parts before the module makes its weights whole."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: see ``on_validation_start``."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: see ``on_validation_end``."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exchange them back, before anything is saved."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        release(pl_module)
        self.parts.swap()

    def _copy_average_to_current(self, pl_module: pl.LightningModule) -> None:
        release(pl_module)
        for averaged, current in self.parts.pairs():
            current.copy_(averaged)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the average from the weights that have been loaded, and the current weights from beside them."""
        if self._average_model is None:  # only to evaluate
            return
        for averaged, current in self.parts.pairs():
            averaged.copy_(current)
        if "current_model_state" in checkpoint:
            self.parts.count = checkpoint["averaging_state"]["n_averaged"].clone()
            whole = StateDictOptions(full_state_dict=True)
            set_model_state_dict(pl_module, dict(checkpoint["current_model_state"]), options=whole)


def release(module: nn.Module) -> None:
    """Have no weights of a module whole: they would be those of before."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def number_by_module(state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Number the parameters of an optimizer's state as ModelParallelStrategy does; the others take any numbers."""
    places = {id(parameter): place for place, parameter in enumerate(module.parameters())}
    numbers: dict[int, int] = {}
    for group, saved in zip(optimizer.param_groups, state.get("param_groups", ()), strict=False):
        numbers |= zip(saved["params"], (places[id(p)] for p in group["params"]), strict=True)
        saved["params"] = [numbers[number] for number in saved["params"]]
    state["state"] = {numbers[number]: value for number, value in state.get("state", {}).items()}
