"""Draw a load test while it runs, and print its report. Nothing here calls the server."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from attnserve_client.bench.load import Sample
from attnserve_client.bench.report import Report, spread
from attnserve_client.bench.run import Plan
from attnserve_client.cli._text import clean

_DRAW_EVERY_S: Final = 0.25
_RECENT: Final = 2000
"""Number of the latest answers that the live rate and latencies cover."""


class Display:
    """Draw the running load test on a terminal; draw nothing if the console is no terminal. Event loop only."""

    def __init__(self, plan: Plan, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan = plan
        self._clock = clock
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._phase = ""
        self._begun = self._drawn = clock()
        self._count = 0
        self._errors: Counter[str] = Counter()
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, phase: str, sample: Sample) -> None:
        """Count one finished request, and redraw if the last drawing is old enough."""
        if self._live is None:
            return
        now = self._clock()
        if phase != self._phase:
            self._phase, self._begun, self._count = phase, now, 0
            self._errors.clear()
            self._recent.clear()
        self._count += 1
        if sample.outcome.error:
            self._errors[sample.outcome.error] += 1
        else:
            self._recent.append((now, sample.latency_s))
        if now - self._drawn >= _DRAW_EVERY_S:
            self._drawn = now
            self._live.update(self._picture(now), refresh=True)

    def _picture(self, now: float) -> Group:
        passed = now - self._begun
        planned = self._plan.warm_up_s if self._phase == "warm-up" else self._plan.duration_s
        share = passed / planned
        if self._plan.requests is not None and self._phase != "warm-up":
            share = max(share, self._count / self._plan.requests)
        line = Text(f"{self._phase:<10}", style="bold").append(f"{passed:5.1f} s  {self._count:,} requests", style="")
        if len(self._recent) > 1:
            took = self._recent[-1][0] - self._recent[0][0]
            figures = spread([latency for _, latency in self._recent])
            rate = (len(self._recent) - 1) / took if took else 0.0
            line.append(f"  {rate:,.0f}/s  p50 {1e3 * figures['p50']:.1f} ms  max {1e3 * figures['max']:.1f} ms")
        if self._errors:
            line.append(f"  {self._errors.total():,} refused", style="red")
        return Group(line, ProgressBar(total=1.0, completed=min(1.0, share), width=60))


def show_report(console: Console, what: str, plan: Plan, report: Report) -> None:
    """Print the figures as tables, then each reason for which the run is invalid."""
    load = f"{plan.callers} callers in a closed loop" if plan.rate is None else f"{plan.rate:g} arrivals/s (Poisson)"
    way = "streams" if plan.stream else "calls"
    console.print(Text(clean(what), style="bold"))
    console.print(Text(f"{load}, {plan.connections} connection(s), {way}, {report.duration_s:.1f} s", style="dim"))
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in _rows(report):
        table.add_row(name, Text(value, justify="right"))
    console.print(table)
    latencies = {"answered": report.latency_s, "refused": report.error_latency_s, "queue in the server": report.queue_s}
    if plan.rate is not None:
        latencies["sent late"] = report.sent_late_s
    console.print(_latency_table(latencies))
    for reason, count in report.errors.items():
        console.print(Text(f"refused: {count:,} x {clean(reason)}", style="red"))
    for reason in report.invalid:
        console.print(Text(f"INVALID: {reason}", style="bold red"))


def _rows(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{report.requests:,}"),
        ("answered", f"{report.answered:,}"),
        ("requests/s", f"{report.requests_per_s:,.1f}"),
        ("sequences/s", f"{report.sequences_per_s:,.1f}"),
    ]
    if report.tokens_per_s is not None:
        rows.append(("tokens/s", f"{report.tokens_per_s:,.0f}"))
    rows.append(("answers, MB/s", f"{report.bytes_per_s / 1e6:,.2f}"))
    if report.batch_size is not None and report.computed_over_useful is not None:
        rows.append(("sequences in a run", f"{report.batch_size:.1f}"))
        rows.append(("computed/useful tokens", f"{report.computed_over_useful:.3f}"))
    rows.append(("client, cores", f"{report.client_cores:.2f}"))
    rows.append(("client, loop busy", f"{report.client_loop_busy:.0%}"))
    return rows


def _latency_table(latencies: Mapping[str, Mapping[str, float]]) -> Table:
    known = {name: figures for name, figures in latencies.items() if figures}
    names = list(dict.fromkeys(name for figures in known.values() for name in figures))
    names.sort(key=lambda name: (name == "max", name != "mean", name))
    table = Table("ms", *names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for label, figures in known.items():
        table.add_row(label, *(f"{1e3 * figures[name]:.1f}" if name in figures else "" for name in names))
    return table
