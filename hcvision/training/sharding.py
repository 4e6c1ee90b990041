"""Weights in parts: FSDP2 (``torch.distributed.fsdp.fully_shard``), as Lightning's ModelParallelStrategy runs it.

Every process holds a part of each block's weights, of their gradients and of the optimizer's state; a block's weights
are whole only while it is computed.
"""

import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from hcvision.models import BLOCKS, own_class


def shard(module: pl.LightningModule, model: nn.Module) -> None:
    """Give every process a part of the weights of each block of the model, and of what is around the blocks.

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
    if module.hparams["ema_decay"] is not None:
        raise ValueError("ema_decay does not work with ModelParallelStrategy, whose processes hold parts of weights")
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # which nothing changes in place
    for part in [*model.modules()]:
        if own_class(part) in BLOCKS:
            fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def hold_whole(model: nn.Module, whole: bool = True) -> None:
    """Hold whole weights, to evaluate: not every process has the same number of batches. Or parts again."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            if part is not model:  # which keeps its own until then anyway
                part.set_reshard_after_forward(not whole, recurse=False)
            part.unshard() if whole else part.reshard()


def number_by_module(state: dict[str, Any], optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Number the parameters of an optimizer's state as ModelParallelStrategy does; the others take any numbers."""
    places = {id(parameter): place for place, parameter in enumerate(module.parameters())}
    numbers: dict[int, int] = {}
    for group, saved in zip(optimizer.param_groups, state.get("param_groups", ()), strict=False):
        numbers |= zip(saved["params"], (places[id(p)] for p in group["params"]), strict=True)
        saved["params"] = [numbers[number] for number in saved["params"]]
    state["state"] = {numbers[number]: value for number, value in state.get("state", {}).items()}
