"""How far long work is: a bar on a terminal; elsewhere (logs, CI, notebooks) a line at the start, at the end and every 30 seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 30.0  # seconds, at most, between two lines
COUNTS = 0.8  # of it: lines with counts come before those that only say that work goes on

Item = TypeVar("Item")


def bar(shown: bool = True) -> Progress:
    """A rich progress bar on standard error, or `Lines` where that is no terminal; tasks need an ``info`` field."""
    console = Console(stderr=True)
    if shown and not _is_terminal(console):
        return Lines()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    return Progress(*columns, console=console, disable=not shown)


def counted(items: Sequence[Item], description: str, shown: bool = True) -> Iterator[Item]:
    """The ``items`` one by one, with a bar of how many are done."""
    with bar(shown) as progress:
        task = progress.add_task(description, total=len(items), info="")
        for item in items:
            yield item
            progress.update(task, advance=1)


class Lines(Progress):
    """The tasks of a `Progress` as lines: what is done, what is left, and the rate."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self._began: dict[TaskID, tuple[float, float]] = {}  # time, and what was done before
        self._clock = _Clock(self._say_all, COUNTS * EVERY, lambda: 0.0)

    def add_task(
        self, description: str, start: bool = True, total: float | None = 100.0, completed: int = 0, visible: bool = True, **fields: Any
    ) -> TaskID:
        task = super().add_task(description, start, total, completed, visible, **fields)
        self._began[task] = (time.monotonic(), completed)
        self._say(task)
        return task

    def start(self) -> None:
        self._clock.start()

    def stop(self) -> None:
        if self._clock.stop():
            self._say_all()

    def _say_all(self) -> None:
        for task in self.task_ids:
            self._say(task)

    def _say(self, task: TaskID) -> None:
        work, (began, before) = self._tasks[task], self._began[task]
        _say(line(work.description, work.completed, work.total, before, time.monotonic() - began, work.fields.get("info", "")))


def line(description: str, done: float, total: float | None, before: float, seconds: float, info: str = "") -> str:
    """One line about work of which ``before`` was done ``seconds`` ago."""
    parts = [f"{description}: {done:.0f} of {total:.0f}, {total - done:.0f} left" if total is not None else f"{description}: {done:.0f}"]
    rate = (done - before) / seconds if seconds > 0 else 0.0
    if rate > 0:
        parts.append(f"{rate:.1f} a second" if rate >= 1 else f"{rate * 60:.2g} a minute")
        if total is not None and done < total:
            parts.append(f"{duration((total - done) / rate)} to go")
    if seconds >= 1:
        parts.append(f"{duration(seconds)} so far")
    return ", ".join(parts) + (f"; {info}" if info else "")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextmanager
def step(name: str, shown: bool = True) -> Iterator[None]:
    """Work that has no count of its own: where there is no terminal it is said to go on, unless something within says more."""
    if not shown or _is_terminal(Console(stderr=True)):
        yield
        return
    began = time.monotonic()
    clock = _Clock(lambda: _say(f"{name}: {duration(time.monotonic() - began)} so far"), EVERY, lambda: _last_said)
    clock.start()
    try:
        yield
    finally:
        clock.stop()


class _Clock:
    """Calls ``call`` from a thread of its own whenever ``every`` seconds have passed since its last call and since ``last()``."""

    def __init__(self, call: Callable[[], None], every: float, last: Callable[[], float]) -> None:
        self._call, self._every, self._last, self._over = call, every, last, threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._over.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """End the thread; whether there was one."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._over.set()
            thread.join()
        return thread is not None

    def _run(self) -> None:
        called = time.monotonic()
        while not self._over.wait(max(0.01, max(called, self._last()) + self._every - time.monotonic())):
            if time.monotonic() - max(called, self._last()) >= self._every:
                self._call()
                called = time.monotonic()


_last_said = 0.0


def _say(text: str) -> None:
    global _last_said
    _last_said = time.monotonic()
    print(text, file=sys.stderr, flush=True)


def _is_terminal(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal
