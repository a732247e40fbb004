"""Progress of a command: named steps, shown as a live bar in a terminal and as one line per step elsewhere.

The exception of a step ends the run, and passes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

Work = TypeVar("Work")


@dataclass(frozen=True, slots=True)
class Step(Generic[Work]):
    """One named step of a command.

    Attributes:
        name: how code and tests refer to it.
        title: its progress line.
        run: does the work; reads and extends the state of the command.
    """

    name: str
    title: str
    run: Callable[[Work], None]


class Steps:
    """The progress of one command. One thread only. Nothing is printed without a console."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @classmethod
    def silent(cls) -> Self:
        """Return progress that prints nothing."""
        return cls(None)

    @contextmanager
    def shown(self, total: int) -> Iterator[None]:
        """Show the bar, over `total` steps, for the duration of the context."""
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

    def run(self, plan: Sequence[Step[Work]], work: Work) -> None:
        """Run steps in their order on the state of a command, and show each as it begins. An exception ends the run."""
        for step in plan:
            self.begin(step.title)
            step.run(work)

    def begin(self, title: str) -> None:
        """Show that a step begins. The step before it is complete."""
        if self._bar is not None and self._task is not None:
            started = bool(self._bar.tasks[0].description)
            self._bar.update(self._task, description=title, advance=1 if started else 0)
        elif self._console is not None:
            self._console.print(title, highlight=False, markup=False)

    def extend(self, count: int) -> None:
        """Add `count` steps to the total of the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=(self._bar.tasks[0].total or 0) + count)

    def note(self, progress: str) -> None:
        """Show progress within a step; in the live bar only."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=progress)

    def report(self, fact: str) -> None:
        """Print what the command found out, for example where a limit comes from."""
        if self._console is not None:
            self._console.print(fact, highlight=False, markup=False, soft_wrap=True)

    def warn(self, warning: str) -> None:
        """Print a warning. The command continues."""
        if self._console is not None:
            self._console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
