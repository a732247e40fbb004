"""Tells a person how far a build is: a live bar in a terminal, one plain line per step elsewhere. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Steps:
    """The steps of one build, shown one after another. Written to from one thread only."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @classmethod
    def silent(cls) -> Self:
        """Shows nothing."""
        return cls(None)

    @contextmanager
    def shown(self, total: int) -> Iterator[None]:
        """Show the bar, over `total` steps, for as long as the context lasts."""
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
        """A step begins; the one before it is done."""
        if self._bar is not None and self._task is not None:
            started = bool(self._bar.tasks[0].description)
            self._bar.update(self._task, description=what, advance=1 if started else 0)
        elif self._console is not None:
            self._console.print(what, highlight=False, markup=False)

    def note(self, what: str) -> None:
        """How far the step is; shown in the live bar alone."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)

    def warn(self, what: str) -> None:
        """Something that the person should know, though the build goes on."""
        if self._console is not None:
            self._console.print(f"warning: {what}", style="yellow", highlight=False, markup=False, soft_wrap=True)
