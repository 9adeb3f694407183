"""Progress bars."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from negative_cache.workbench.cli.terminal import Terminal, escape
from negative_cache.workbench.counting import counted

if TYPE_CHECKING:
    from negative_cache.workbench.evaluation import OnProgress
    from negative_cache.workbench.training.record import Metrics, RunRecord

OnStep = Callable[[int, int, dict[str, float]], None]

BAR_WIDTH = 20  # columns
SECONDS_PER_LINE = 30.0  # without a terminal
FIRST_UPDATES = 6  # after which the time is estimated
SECONDS_OF_SPEED = 300.0  # the time left is estimated from; updates may be a minute apart
SHOWN = {"loss": "loss", "cache/staleness": "staleness", "cache/fill": "fill"}  # key of the logs -> name


@contextlib.contextmanager
def counting_bar(terminal: Terminal, what: str) -> Iterator[OnProgress]:
    """Show a progress bar. Yields a function of (done, total)."""
    with _bar(terminal.progress, TimeRemainingColumn(), is_transient=True) as bar:
        task = bar.add_task(escape(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def training_bar(terminal: Terminal, title: str) -> Iterator[tuple[OnStep, OnProgress]]:
    """Show a run. Yields a function of (step, steps, logs), and one of (done, total) for encoded documents."""
    with _bar(terminal.progress, TextColumn("{task.fields[metrics]}"), TimeRemainingColumn()) as bar:
        task = bar.add_task(f"{title}: preparing", total=None, metrics="")
        last: dict[str, Any] = {}

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, metrics="documents", description=f"{title}: encoding")

        def on_step(step: int, steps: int, logs: dict[str, float]) -> None:
            metrics = [f"{name} {logs[key]:.3g}" for key, name in SHOWN.items() if key in logs]
            room = terminal.progress.width - len(f"{title} {steps}/{steps}  0:00:00 ") - BAR_WIDTH
            while len("  ".join(metrics)) > room:
                metrics.pop()
            last.update(completed=step, total=steps, metrics="  ".join(metrics), description=title)
            bar.update(task, **last)

        yield on_step, on_progress
        bar.update(task, **last)


class ComparisonBar:
    """Shows a comparison: a bar for the steps of the current run, and a line for each run that has ended."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.is_shown = not console.quiet
        self._bar = _bar(console, TimeElapsedColumn(), TextColumn("{task.fields[metrics]}"), is_transient=True)
        self._task = self._bar.add_task("preparing", total=None, metrics="")
        self._end_of_all: float | None = None

    def __enter__(self) -> ComparisonBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def plan(self, lines: Sequence[str]) -> None:
        """Print what the comparison will cost."""
        for line in lines:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, name: str, num_left: int, seconds_left: float | None) -> None:
        """A run begins; `num_left` runs are left, including this one, which take `seconds_left`, if that is known."""
        self._end_of_all = None if seconds_left is None else time.monotonic() + seconds_left
        description = f"{counted(num_left, 'run')} left  {name}"
        self._bar.reset(self._task, total=None, description=description, metrics=self._time_left())

    def step(self, step: int, steps: int) -> None:
        """A step is done, or `step` of `steps` documents are encoded."""
        self._bar.update(self._task, completed=step, total=steps, metrics=self._time_left())

    def _time_left(self) -> str:
        """The time until all runs have ended."""
        if self._end_of_all is None:
            return ""
        of_this_run = self._bar.tasks[0].time_remaining or 0
        left = int(max(self._end_of_all - time.monotonic(), of_this_run))
        return f"all runs: about {timedelta(seconds=left)} left" if left > 0 else "longer than estimated"

    def end(self, name: str, found: RunRecord | Metrics, is_old: bool) -> None:
        """A run has ended, or a baseline is measured; with `is_old`, that was in an earlier call."""
        from negative_cache.workbench.compare.table import line_of

        text = f"{name}: {line_of(found)}{' (already done)' if is_old else ''}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _bar(console: Console, *columns: ProgressColumn, is_transient: bool = False) -> Progress:
    first = (TextColumn("{task.description}"), BarColumn(bar_width=BAR_WIDTH), MofNCompleteColumn())
    is_invisible = is_transient and not console.is_terminal  # rich would print an empty line at the end
    return _BarOrLines(*first, *columns, console=console, transient=is_transient, disable=is_invisible)


class _BarOrLines(Progress):
    """A progress bar; without a terminal, such as in a batch job, a line now and then.

    The first line of what takes long comes after a few updates, with the expected time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, speed_estimate_period=SECONDS_OF_SPEED, **kwargs)
        self._said = time.monotonic()
        self._phase: tuple[str, float | None] | None = None
        self._updates = 0  # in this phase

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See `Progress.update`."""
        super().update(task_id, **changes)
        if self.console.is_terminal:
            return
        task = next(task for task in self.tasks if task.id == task_id)
        self._updates = self._updates + 1 if self._phase == (task.description, task.total) else 1
        self._phase = (task.description, task.total)
        is_estimate = self._updates == FIRST_UPDATES and (task.time_remaining or 0) > SECONDS_PER_LINE
        if not is_estimate and time.monotonic() < self._said + SECONDS_PER_LINE:
            return
        self._said = time.monotonic()
        parts = [f"{task.description} {task.completed:.0f}/{'?' if task.total is None else f'{task.total:.0f}'}"]
        if task.time_remaining is not None:
            parts.append(f"{timedelta(seconds=int(task.time_remaining))} left")
        parts += [task.fields["metrics"]] if task.fields.get("metrics") else []
        self.console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)
