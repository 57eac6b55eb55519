"""How far long work is: a bar on a terminal; elsewhere (logs, CI, notebooks) a line at the start, at the end and every
30 seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self, TypeVar

from tqdm import tqdm

from .terminal import is_terminal

EVERY = 30.0  # seconds, at most, between two lines
COUNTS = 0.8  # of it: lines with counts come before those that only say that work goes on
BAR = "{desc} {bar} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"

Item = TypeVar("Item")


@dataclass
class Task:
    """Work with a count: what is done of how much, since when, and how much was done before that."""

    description: str
    total: float
    completed: float
    info: str
    began: float
    before: float


class Progress:
    """Counts of tasks, within ``with`` or between `start` and `stop`. This class shows nothing; its subclasses do."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def add_task(self, description: str, total: float, completed: float = 0, info: str = "") -> int:
        """Begin a task of which ``completed`` was done before; returns its number."""
        self.tasks.append(Task(description, total, completed, info, time.monotonic(), completed))
        return len(self.tasks) - 1

    def update(self, task: int, *, advance: float = 0, completed: float | None = None, info: str | None = None) -> None:
        """Set what is done of a task, or add to it, and what is said beside it."""
        work = self.tasks[task]
        work.completed = work.completed + advance if completed is None else completed
        work.info = work.info if info is None else info

    def start(self) -> None:
        """Begin to show."""

    def stop(self) -> None:
        """Show the last counts and end."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Bars(Progress):
    """The tasks as bars on a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: list[tqdm[None]] = []

    def add_task(self, description: str, total: float, completed: float = 0, info: str = "") -> int:
        options = {"desc": description, "total": total, "initial": completed, "bar_format": BAR}
        self._bars.append(tqdm(**options, file=sys.stderr, dynamic_ncols=True))
        return super().add_task(description, total, completed, info)

    def update(self, task: int, *, advance: float = 0, completed: float | None = None, info: str | None = None) -> None:
        super().update(task, advance=advance, completed=completed, info=info)
        work, drawn = self.tasks[task], self._bars[task]
        drawn.set_postfix_str(work.info, refresh=False)
        # tqdm takes what is new since its last count
        drawn.update(work.completed - drawn.n)

    def stop(self) -> None:
        for drawn in self._bars:
            drawn.close()


class Lines(Progress):
    """The tasks as lines: what is done, what is left, and the rate."""

    def __init__(self) -> None:
        super().__init__()
        # counts wait for no other lines: the time of these is far back
        self._clock = _Clock(self._say_all, COUNTS * EVERY, lambda: 0.0)

    def add_task(self, description: str, total: float, completed: float = 0, info: str = "") -> int:
        task = super().add_task(description, total, completed, info)
        self._say(self.tasks[task])
        return task

    def start(self) -> None:
        self._clock.start()

    def stop(self) -> None:
        if self._clock.stop():
            self._say_all()

    def _say_all(self) -> None:
        for work in self.tasks:
            self._say(work)

    def _say(self, work: Task) -> None:
        seconds = time.monotonic() - work.began
        _say(line(work.description, work.completed, work.total, work.before, seconds, work.info))


def bar(shown: bool = True) -> Progress:
    """What shows tasks on standard error: bars on a terminal, lines elsewhere, nothing unless ``shown``."""
    if not shown:
        return Progress()
    return Bars() if is_terminal(sys.stderr) else Lines()


def counted(items: Sequence[Item], description: str, shown: bool = True) -> Iterator[Item]:
    """The ``items`` one by one, with a bar of how many are done."""
    with bar(shown) as progress:
        task = progress.add_task(description, total=len(items))
        for item in items:
            yield item
            progress.update(task, advance=1)


def line(description: str, done: float, total: float | None, before: float, seconds: float, info: str = "") -> str:
    """One line about work of which ``before`` was done ``seconds`` ago."""
    parts = [
        f"{description}: {done:.0f} of {total:.0f}, {total - done:.0f} left"
        if total is not None
        else f"{description}: {done:.0f}"
    ]
    # of this process alone: what was done before took none of these seconds
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
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


@contextmanager
def step(name: str, shown: bool = True) -> Iterator[None]:
    """Work that has no count of its own: where there is no terminal it is said to go on, unless something within says
    more.
    """
    # on a terminal the bars within are enough
    if not shown or is_terminal(sys.stderr):
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
    """Calls ``call`` from a thread of its own whenever ``every`` seconds have passed since its last call and since
    ``last()``.
    """

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
        # `stop` ends the wait
        while not self._over.wait(max(0.01, max(called, self._last()) + self._every - time.monotonic())):
            # ``last`` may have moved while this thread slept
            if time.monotonic() - max(called, self._last()) >= self._every:
                self._call()
                called = time.monotonic()


_last_said = 0.0


def _say(text: str) -> None:
    global _last_said
    _last_said = time.monotonic()
    print(text, file=sys.stderr, flush=True)
