"""Processes of their own, forked from one that has imported the command line: importing it takes seconds."""

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch

from hcvision_command import main

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hcvision.cli", "processes"])


class Started:
    """``function(*arguments)`` in a process, a process group and a folder of its own, with one thread.

    ``environment`` is added to that of the tests.
    """

    def __init__(self, function: Callable, *arguments: Any, folder: str | Path = ".", **environment: str):
        self.outputs = tempfile.TemporaryDirectory(prefix="hcvision-test-")
        self.files = [Path(self.outputs.name, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process = SERVER.Process(target=_enter, args=(function, arguments, folder, self.files, environment))
        self.process.start()
        self.pid = self.process.pid

    def wait_for(self, is_so: Callable[[], bool], timeout: float = 300) -> None:
        """Wait until something is so; the test fails where the process ends before."""
        deadline = time.monotonic() + timeout
        while not is_so():
            assert self.process.is_alive(), f"it ended too early: {self.wait().stderr[-3000:]}"
            assert time.monotonic() < deadline, f"it did nothing of the kind within {timeout} s"
            time.sleep(0.01)

    def kill(self) -> None:
        """End it at once, and wait until it is gone."""
        self.process.kill()
        self.wait()

    def wait(self, timeout: float = 300) -> CompletedProcess:
        """Its exit code and what it printed; it is killed and the test fails where it takes too long."""
        self.process.join(timeout)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        stdout, stderr = (file.read_text() if file.exists() else "" for file in self.files)
        self.outputs.cleanup()
        assert not late, f"it did not end within {timeout} s: {stderr[-3000:]}"
        return CompletedProcess([], self.process.exitcode, stdout, stderr)


def _enter(function: Callable, arguments: tuple, folder: Path, files: list[Path], environment: dict[str, str]) -> None:
    os.setpgid(0, 0)
    for number, path in enumerate(files, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def run_command(*arguments: str) -> None:
    """What ``python train.py`` does with these arguments."""
    sys.argv = [str(ROOT / "train.py"), *arguments]
    main(list(arguments))


def start(*arguments: Any, folder: str | Path = ".", **environment: str) -> Started:
    """Start a command of hcvision."""
    return Started(run_command, *map(str, arguments), folder=folder, **environment)


def run(*arguments: Any, folder: str | Path = ".", check: bool = True) -> CompletedProcess:
    """Run a command of hcvision; it has to succeed unless ``check`` is false."""
    done = start(*arguments, folder=folder).wait()
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def run_twice(*arguments: Any, folder: str | Path = ".") -> CompletedProcess:
    """Run a command in two processes that share its work, as ``torchrun`` starts them. Returns the first's output."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    return wait_for_all(
        start(*arguments, folder=folder, LOCAL_RANK=str(rank), RANK=str(rank), **meeting) for rank in range(2)
    )[0]


def wait_for_all(started: Iterable[Started]) -> list[CompletedProcess]:
    """Wait for processes that have been started; each has to succeed."""
    done = [one.wait() for one in list(started)]
    assert all(one.returncode == 0 for one in done), "\n".join(one.stderr[-3000:] for one in done)
    return done
