"""Progress of a conversion: a live bar in a terminal, one plain line for each step elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Steps:
    """Displays the steps of one conversion in order. Only one thread may use it."""

    def __init__(self, console: Console | None = None) -> None:
        """Display progress on a console; None: display nothing."""
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @classmethod
    def silent(cls) -> Self:
        """Return an instance that displays nothing."""
        return cls(None)

    @contextmanager
    def shown(self, total: int) -> Iterator[None]:
        """Display the bar, over `total` steps, while the context lasts."""
        if self._console is None or not self._console.is_terminal:
            yield
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=total)
            yield
        self._bar = self._task = None

    def begin(self, what: str) -> None:
        """Begin a step, and count the one before it as done."""
        if self._bar is not None and self._task is not None:
            started = bool(self._bar.tasks[0].description)
            self._bar.update(self._task, description=what, advance=1 if started else 0)
        elif self._console is not None:
            self._console.print(what, highlight=False, markup=False)

    def note(self, what: str) -> None:
        """Display how far the step is, in the live bar only."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)

    def warn(self, what: str) -> None:
        """Print a warning; the conversion goes on."""
        if self._console is not None:
            self._console.print(f"warning: {what}", style="yellow", highlight=False, markup=False, soft_wrap=True)
