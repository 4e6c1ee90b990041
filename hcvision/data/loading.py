"""Loading batches: order of an epoch, streams, and processes that outlive a signal."""

import atexit
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from hcvision.data.images import BadImage, Images
from hcvision.data.streaming import Lanes


class EpochSampler(DistributedSampler):
    """DistributedSampler that says the epoch with every index, and leaves out the first ``skip`` once."""

    skip = 0

    def __iter__(self) -> Iterator[Any]:
        indices, self.skip = itertools.islice(super().__iter__(), self.skip, None), 0
        return ((self.epoch, index) for index in indices)


class StreamedImages(Images):
    """Images of shards, which have to be asked for in ascending order."""

    base: Lanes

    def read(self, index: int | tuple[int, int]) -> tuple[Tensor, int | Tensor] | BadImage:
        self.base.epoch = index[0] if isinstance(index, tuple) else 0
        return super().read(index)


class Loader(DataLoader):
    """DataLoader that reads nothing until a batch is asked for: a run that goes on says only then where it was."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


class OutliveSignals:
    """Has loading processes leave Ctrl-C and SIGTERM, which reach all processes, to the one that trains.

    When that one leaves, SIGTERM ends them: multiprocessing sends it then, and waits.
    """

    def __init__(self) -> None:
        self.leaving = multiprocessing.RawValue("b", 0)
        atexit.register(self.leave)

    def leave(self) -> None:
        self.leaving.value = 1

    def __call__(self, _: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number: int, _: Any) -> None:
        if self.leaving.value:
            os._exit(0)


@cache
def outlive_signals() -> OutliveSignals:
    return OutliveSignals()
