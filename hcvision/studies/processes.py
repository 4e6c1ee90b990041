"""Processes that train the cells of a study side by side."""

import contextlib
import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch

from hcvision.data import keep_freed_memory
from hcvision.training import StopCleanly, Stopped, quieten, shorten_sockets


@contextlib.contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Have this process compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stop(number: int, _: Any) -> NoReturn:
    """End as asked, where no training is under way that would keep a checkpoint first."""
    raise Stopped(128 + number, "stopped")


def help_along(study: Any, threads: int, board: Any, lines: Any) -> None:
    """Run cells of a study in a process of its own, which ends with the one that started it."""
    study.board, study.lines = board, lines
    say = print if lines is None else lines.put
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it was killed before that
        sys.exit(128 + signal.SIGTERM)
    quieten()
    keep_freed_memory()
    shorten_sockets()
    torch.set_num_threads(threads)
    StopCleanly.patient = True  # Ctrl-C goes to all processes, and the first one's SIGTERM follows it
    try:
        study.run_cells(say)
    except Stopped as stop:
        sys.exit(stop.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:  # the first process takes the cell up again, and says why
        say(f"one of {study.jobs} processes ended: {error}")
        sys.exit(1)


@contextlib.contextmanager
def helpers(study: Any, jobs: int) -> Iterator[None]:
    """All but one of so many processes that run cells of a ``Study``; they end with what is done meanwhile."""
    context = multiprocessing.get_context("spawn")
    arguments = (study, study.threads, study.board, study.lines)
    processes = [context.Process(target=help_along, args=arguments) for _ in range(jobs - 1)]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if processes:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; this one stops the others
            for process in processes:
                process.start()
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            signal.signal(signal.SIGTERM, stop)
        with limit_threads(study.threads):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in [one for one in processes if one.pid is not None]:
            process.terminate()  # where it is still at work, it keeps a checkpoint and stops
            process.join()
