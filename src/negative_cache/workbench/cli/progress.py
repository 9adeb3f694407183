"""Progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from negative_cache.workbench.cli.terminal import Terminal, escape

if TYPE_CHECKING:
    from negative_cache.workbench.evaluation import OnProgress
    from negative_cache.workbench.training.record import Metrics, RunRecord

OnStep = Callable[[int, int, dict[str, float]], None]

BAR_WIDTH = 20  # columns
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
        self._bar = _bar(console, TimeElapsedColumn(), is_transient=True)
        self._task = self._bar.add_task("preparing", total=None)

    def __enter__(self) -> ComparisonBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str, num_left: int) -> None:
        """A run begins; `num_left` runs are left, including this one."""
        self._bar.reset(self._task, total=None, description=f"{num_left} runs left  {name}")

    def step(self, step: int, steps: int) -> None:
        """A step is done, or `step` of `steps` documents are encoded."""
        self._bar.update(self._task, completed=step, total=steps)

    def end(self, name: str, found: RunRecord | Metrics, is_old: bool) -> None:
        """A run has ended, or a baseline is measured; with `is_old`, that was in an earlier call."""
        from negative_cache.workbench.compare.table import line_of

        text = f"{name}: {line_of(found)}{' (already done)' if is_old else ''}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _bar(console: Console, *columns: ProgressColumn, is_transient: bool = False) -> Progress:
    first = (TextColumn("{task.description}"), BarColumn(bar_width=BAR_WIDTH), MofNCompleteColumn())
    return Progress(*first, *columns, console=console, transient=is_transient)
