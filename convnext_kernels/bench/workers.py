"""The processes that run the items of `verify`.

A kernel that hangs, crashes or leaves the GPU unusable costs one item: its process is ended, and a new one goes on with
the next item.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process
from typing import Any

from convnext_kernels.bench import steps
from convnext_kernels.bench.results import plain
from convnext_kernels.tuning import cache

MOST_PROCESSES = 16
DONE, END = "done", "end"  # what a process says after an item: ready for the next one, or not usable any more


def _serve(pipe: connection.Connection, device: str, folder: str, threads: int | None, compilers: int | None) -> None:
    """The process that runs items, until its parent ends."""
    os.environ[cache.ENVIRONMENT_VARIABLE] = folder
    os.dup2(2, 1)  # stdout belongs to the results
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the parent alone; what this process starts can be ended with it

    def end_with_parent() -> None:
        connection.wait([parent_process().sentinel])
        _kill(os.getpid())

    threading.Thread(target=end_with_parent, daemon=True).start()
    if compilers is not None:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(compilers))  # read when inductor is imported
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    running = steps.Running(device)

    def emit(kind: str, value: object) -> None:
        pipe.send((kind, plain(value)))

    while (message := pipe.recv()) is not None:
        item, seconds = message
        steps.run(running, item, emit, seconds)
        if device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:  # an illegal access: every later call of this process would fail
                emit("failure", {"item": item.name, "reason": f"{error}".partition("\n")[0]})
                pipe.send(END)
                return
        pipe.send(DONE)


def _kill(pid: int) -> None:
    """End a process of `_serve` and all that it has started."""
    if hasattr(os, "killpg") and os.getpgid(pid) == pid:
        os.killpg(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGTERM)


class Worker:
    """A process that runs items; it starts with the first one and again after it was ended.

    `folder`: where the choices of `tune` are kept.
    """

    def __init__(self, device: str, folder: str, threads: int | None = None, compilers: int | None = None) -> None:
        self.settings = device, folder, threads, compilers
        self.process: Any = None
        self.pipe: Any = None
        self.item: steps.Item | None = None  # that runs

    def send(self, item: steps.Item, seconds: float) -> None:
        """Start an item."""
        if self.process is None or not self.process.is_alive():
            self.end()
            context = get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=_serve, args=(other, *self.settings))
            self.process.start()
            other.close()
        self.item = item
        with suppress(BrokenPipeError):  # it has just ended: `receive` tells
            self.pipe.send((item, seconds))

    def receive(self) -> tuple[str, dict] | None:
        """The next result of the item, a failure if it ends the process; None at its end."""
        if self.item is None:
            return None
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code, name = self.process.exitcode, self.item.name
            self.end()
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return "failure", {"item": name, "reason": f"the process that ran it ended with {reason}"}
        if message not in (DONE, END):
            return message
        self.item = None
        if message == END:
            self.end()
        return None

    def results(self, seconds: float) -> Iterator[tuple[str, dict]]:
        """The results of the item that was sent; if it takes longer than `seconds`, its process is ended."""
        end = time.monotonic() + seconds
        while self.item is None or self.pipe.poll(max(0.0, end - time.monotonic())):
            if (message := self.receive()) is None:
                return
            yield message
        name = self.item.name
        self.end()
        yield "cut", {"item": name, "reason": f"no result after {seconds:.0f} s, ended"}

    def end(self) -> None:
        """End the process, if there is one; an idle one ends by itself."""
        if self.process is None:
            return
        if self.item is None:
            with suppress(OSError):
                self.pipe.send(None)
            self.process.join(5)
        if self.process.is_alive():
            _kill(self.process.pid)
        self.process.join()
        self.pipe.close()
        self.process = self.item = None


def run_all(todo: list[steps.Item], device: str, folder: str, end: float) -> int:
    """Run items that have no results in parallel processes until `end` (``time.monotonic()``); how many were done.

    What fails here fails again where it is used, and is told there.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(MOST_PROCESSES, cores, len(todo)))
    workers = [Worker(device, folder, 1, max(1, cores // count)) for _ in range(count)]
    left, done = list(reversed(todo)), 0
    try:
        for worker in workers:
            worker.send(left.pop(), steps.MOST_SECONDS)
        while (busy := {w.pipe: w for w in workers if w.item}) and (remaining := end - time.monotonic()) > 0:
            for pipe in connection.wait(list(busy), remaining):
                worker = busy[pipe]
                worker.receive()
                if worker.item is None:
                    done += 1
                    if left:
                        worker.send(left.pop(), steps.MOST_SECONDS)
    finally:
        for worker in workers:
            worker.end()
    return done
