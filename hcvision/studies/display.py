"""What a study shows while it works: its cells that are training, and the time left for all of them."""

import heapq
import sys
import threading
import time
from collections.abc import Callable, MutableSequence, Sequence
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from tqdm import tqdm

from hcvision.training import show_seconds

WAITING, DONE = -1.0, 2.0
FIELDS = 3  # of a cell on the board: its part (WAITING, 0 to 1, DONE), images per second, and its score (0: none yet)
BAR = "{desc} {percentage:3.0f}%|{bar:24}| {unit}"
LOOK_EVERY = 0.5  # seconds
LINE_AFTER, LINE_EVERY = 10.0, 60.0  # seconds, where there is no terminal to draw bars on


class CellProgress(Callback):
    """Writes how far the training of a cell is on the board of its study.

    Args:
        board: ``FIELDS`` numbers per cell, shared by the processes of the study.
        cell: the cell's number.
        metric: its score, by the name that the module logs.
    """

    def __init__(self, board: MutableSequence[float], cell: int, metric: str):
        self.board, self.place, self.metric = board, cell * FIELDS, metric
        self.began, self.images = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began, self.images = time.monotonic(), 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        self.images += len(batch[0]) * trainer.world_size
        self.board[self.place] = min(trainer.global_step / trainer.estimated_stepping_batches, 1.0)
        self.board[self.place + 1] = self.images / max(time.monotonic() - self.began, 1e-9)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.metric in trainer.callback_metrics:
            self.board[self.place + 2] = float(trainer.callback_metrics[self.metric])


def empty_board(cells: int) -> list[float]:
    """The board of a study whose cells all wait."""
    return [WAITING, 0.0, 0.0] * cells


class Display:
    """One display of all cells of a study: a bar for each that is training, and one for the whole study.

    Where stderr is no terminal it says a line now and then instead. Used as a context, in one process of the study.

    Args:
        titles: of the cells, in their order.
        board: what ``CellProgress`` writes.
        jobs: cells that train at the same time.
        lines: a queue of what the processes of the study say, which is shown above the bars.
        say: shows a line where there are no bars.
        show_score: a cell's score as text.
    """

    def __init__(
        self,
        titles: Sequence[str],
        board: Sequence[float],
        jobs: int,
        lines: SimpleQueue,
        say: Callable[[str], None] = print,
        show_score: Callable[[float], str] = str,
    ):
        self.titles, self.board, self.jobs, self.show_score = titles, board, jobs, show_score
        self.lines, self.say = lines, say
        self.bars: list[Any] = []
        self.begun: dict[int, tuple[float, float]] = {}  # when a cell was first seen training, and at which part
        self.seconds: dict[int, float] = {}  # what a cell takes from its start to its end, as far as it is known
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def __enter__(self) -> "Display":
        if sys.stderr.isatty():
            more: dict[str, Any] = {"bar_format": "{desc}", "leave": False, "dynamic_ncols": True}
            self.bars = [tqdm(total=1.0, position=place, **more) for place in range(self.jobs + 1)]
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.thread.join()
        for bar in reversed(self.bars):
            bar.close()
        self.bars = []
        self.say_lines()

    def work(self) -> None:
        due = time.monotonic() + LINE_AFTER
        while not self.ended.wait(LOOK_EVERY):
            self.say_lines()
            now = time.monotonic()
            running, left = self.look(now)
            if self.bars:
                self.draw(running, left)
            elif running and now > due:
                self.say(f"{self.describe_all(left)}: {', '.join(map(self.describe, running))}")
                due = now + LINE_EVERY

    def say_lines(self) -> None:
        while not self.lines.empty():
            (tqdm.write if self.bars else self.say)(self.lines.get())

    def part(self, cell: int) -> float:
        return self.board[cell * FIELDS]

    def look(self, now: float) -> tuple[list[int], float | None]:
        """The cells that are training, and the seconds left for the study where that can be told."""
        running = [cell for cell in range(len(self.titles)) if WAITING < self.part(cell) < DONE]
        for cell in running:
            since, first = self.begun.setdefault(cell, (now, self.part(cell)))
            if self.part(cell) > first and now > since:
                self.seconds[cell] = (now - since) / (self.part(cell) - first)
        if not self.seconds:
            return running, None
        usual = sum(self.seconds.values()) / len(self.seconds)
        ends = [self.seconds.get(cell, usual) * (1 - self.part(cell)) for cell in running]
        waiting = sum(self.part(cell) == WAITING for cell in range(len(self.titles)))
        return running, time_left(ends, [usual] * waiting, self.jobs)

    def draw(self, running: list[int], left: float | None) -> None:
        shown = [(self.part(cell), self.titles[cell], self.describe_speed(cell)) for cell in running[: self.jobs]]
        shown += [(0.0, "", "")] * (self.jobs - len(shown))
        parts = [min(max(self.part(cell), 0.0), 1.0) for cell in range(len(self.titles))]
        left_over = "" if left is None else f"{show_seconds(left)} left"
        shown.append((sum(parts) / len(parts), self.describe_all(None), left_over))
        for bar, (part, title, about) in zip(self.bars, shown, strict=True):
            bar.bar_format = BAR if title else "{desc}"
            bar.n, bar.unit = part, about  # a postfix would begin with a comma
            bar.set_description_str(title.ljust(22) if title else "", refresh=False)
            bar.refresh()

    def describe(self, cell: int) -> str:
        speed = self.describe_speed(cell)
        return f"{self.titles[cell]} {100 * self.part(cell):.0f} %{f' ({speed})' if speed else ''}"

    def describe_speed(self, cell: int) -> str:
        speed, score = self.board[cell * FIELDS + 1 : cell * FIELDS + 3]
        return ", ".join([f"{speed:.0f} img/s"] * (speed > 0) + [self.show_score(score)] * (score != 0))

    def describe_all(self, left: float | None) -> str:
        done = sum(self.part(cell) == DONE for cell in range(len(self.titles)))
        return f"{done} of {len(self.titles)} cells" + ("" if left is None else f", about {show_seconds(left)} left")


def time_left(running: Sequence[float], waiting: Sequence[float], jobs: int) -> float:
    """Seconds until all work is done, where each of ``jobs`` takes the next that waits as soon as it is free.

    Args:
        running: seconds that each piece under way still takes.
        waiting: seconds that each of the others takes.
        jobs: pieces at a time.
    """
    ends = [*running, *[0.0] * (jobs - len(running))]
    heapq.heapify(ends)
    for seconds in waiting:
        heapq.heappush(ends, heapq.heappop(ends) + seconds)
    return max(ends)
