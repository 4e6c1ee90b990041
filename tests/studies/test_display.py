"""What a study shows while it works."""

import io
import sys
import types
from queue import SimpleQueue

import pytest

from hcvision.studies import display
from hcvision.studies.display import DONE, FIELDS, CellProgress, Display, empty_board, time_left
from hcvision.training.runs import show_seconds


@pytest.mark.parametrize(
    ("running", "waiting", "jobs", "seconds"),
    [
        ([], [], 2, 0.0),
        ([5.0], [], 2, 5.0),
        ([5.0, 2.0], [4.0], 2, 6.0),  # the third begins when the second ends
        ([5.0, 2.0], [4.0, 4.0], 2, 9.0),
        ([], [3.0, 3.0, 3.0], 2, 6.0),
        ([1.0], [3.0, 3.0], 1, 7.0),
    ],
)
def test_time_left(running, waiting, jobs, seconds):
    assert time_left(running, waiting, jobs) == seconds


def test_seconds_as_text():
    assert [show_seconds(seconds) for seconds in (0, 59.9, 61, 3600 * 25 + 62)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "25:01:02",
    ]


def step(progress, done, total, images=8):
    trainer = types.SimpleNamespace(
        world_size=2, global_step=done, estimated_stepping_batches=total, callback_metrics={"val_top1": 0.25}
    )
    progress.on_train_batch_end(trainer, None, None, (range(images),), 0)
    return trainer


def test_a_cell_writes_how_far_it_is(monkeypatch):
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    board = empty_board(2)
    progress = CellProgress(board, 1, "val_top1")
    progress.on_train_start(None, None)
    now = 102.0
    step(progress, 1, 4)
    assert board == [*empty_board(1), 0.25, 8.0, 0.0]
    now = 104.0
    trainer = step(progress, 3, float("inf"))  # a run without end
    progress.on_validation_end(trainer, None)
    assert board == [*empty_board(1), 0.0, 8.0, 0.25]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(board, jobs, said, **seconds):
    lines = SimpleQueue()
    shown = Display(["a seed 0", "b seed 0", "c seed 0"], board, jobs, lines, said.append, "top1 {:.2f}".format)
    return shown, lines


def test_the_time_left_follows_from_the_cells_that_were_seen():
    """Two at a time. What a cell that waits will take is the mean of those seen, here of 20 s and 16 s."""
    board = empty_board(3)
    shown, _ = show(board, 2, [])
    assert shown.look(0.0) == ([], None)
    board[0], board[FIELDS] = 0.0, 0.25
    assert shown.look(0.0) == ([0, 1], None)
    board[0], board[FIELDS] = 0.5, 0.875  # 20 s and 16 s for a whole cell; 10 s and 2 s are left
    running, left = shown.look(10.0)
    assert (running, left) == ([0, 1], 2.0 + 18.0)
    board[0] = DONE
    assert shown.look(10.0) == ([1], 18.0)  # beside the last of the second
    board[2 * FIELDS] = 0.0
    board[FIELDS] = DONE
    assert shown.look(11.0) == ([2], 18.0)


def test_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(display, "LOOK_EVERY", 0.001)
    monkeypatch.setattr(display, "LINE_AFTER", 0.0)
    monkeypatch.setattr(display, "LINE_EVERY", 1000.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    board, said = empty_board(3), []
    board[:FIELDS] = [0.25, 120.4, 0.5]
    board[FIELDS] = DONE
    shown, lines = show(board, 2, said)
    lines.put("first")
    with shown:
        while len(said) < 2:
            assert shown.thread.is_alive()
        lines.put("last")
    assert said == ["first", "1 of 3 cells: a seed 0 25 % (120 img/s, top1 0.50)", "last"]
    assert not shown.thread.is_alive()


def test_bars_on_a_terminal(monkeypatch):
    """A bar for each cell that trains and one for all; a line goes above them."""
    monkeypatch.setattr(display, "LOOK_EVERY", 0.001)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", terminal)
    board = empty_board(3)
    board[FIELDS : 2 * FIELDS] = [0.5, 120.4, 0.0]
    shown, lines = show(board, 2, [])
    lines.put("hello")
    with shown:
        while "17%" not in terminal.getvalue() or "hello\n" not in terminal.getvalue():
            assert shown.thread.is_alive()
    text = terminal.getvalue()
    assert "b seed 0                50%|" in text
    assert "120 img/s" in text
    assert "0 of 3 cells" in text
