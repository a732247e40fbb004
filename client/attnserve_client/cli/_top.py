"""The command `top`: a live view of a server, computed from two readings of its metrics page.

The page is that of `--http-port`, `/metrics`. `--metrics` names it; by default it is on port 8002 of `--server`'s first
host. A page that cannot be read ends the command with one sentence and exit code 8, one without a token or the scope
`metrics` with 13 or 14.
"""

from __future__ import annotations

import json
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Final, NoReturn, TypeAlias

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from attnserve_client._credentials import Tls, TokenFile
from attnserve_client.cli._options import DEFAULT_SERVER, AsJson, Server, shown
from attnserve_client.cli._text import clean, size_text

METRICS_PORT: Final = 8002
EXAMPLES: Final = (
    "Examples:\n\n"
    "attnserve top\n\n"
    "attnserve top --once --interval 10 --json\n\n"
    "attnserve --token-file metrics.txt top --metrics https://10.0.0.1:8002/metrics"
)
_SAMPLE: Final = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)(?: \d+)?$")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_QUANTILES: Final = (0.5, 0.99)

Labels: TypeAlias = tuple[tuple[str, str], ...]
Page: TypeAlias = dict[str, dict[Labels, float]]
"""Samples by name and labels."""


@dataclass(frozen=True, slots=True)
class Row:
    """One version of a model, over the seconds between two readings.

    A figure that nothing was measured for is None.

    Attributes:
        model: Its name.
        version: Its version.
        state: `ready`, `loading`, `draining` or `failed`; empty if the page has none.
        rate: Sequences a second.
        refused: Refused requests a second.
        queue: Sequences in the queue now.
        queue_s: Mean wait in the queue, in seconds.
        latency_p50_s: The medians of queue and compute time, from their histograms, added: an estimate, in seconds.
        latency_p99_s: The same of the 99th percentiles, which is about an upper bound.
        batch: Mean sequences of a run.
        padding: Share of computed tokens that are padding.
        attention_bytes: Bytes of attention a second.
    """

    model: str
    version: str
    state: str
    rate: float
    refused: float
    queue: int
    queue_s: float | None
    latency_p50_s: float | None
    latency_p99_s: float | None
    batch: float | None
    padding: float | None
    attention_bytes: float


def top(
    context: typer.Context,
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="URL", help="The metrics page.", show_default="port 8002 of --server")
    ] = "",
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the figures of one interval, and end.")] = False,
    server: Server = DEFAULT_SERVER,
    as_json: AsJson = False,
) -> None:
    """Show rates, queues, latencies, batches, padding and bytes of attention of a running server, until Ctrl-C."""
    credentials = shown(context)
    url = metrics or _default_url(server, encrypted=credentials["credentials"] is not None)

    def read() -> tuple[float, Page]:
        text = _fetch(url, credentials["credentials"], credentials["token"])
        return time.monotonic(), parse(text)

    before = read()
    if once or as_json:
        while True:
            before = _step(before, read, interval, as_json=as_json)
            if once:
                return
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                now = read()
                live.update(table_of(rows_of(before[1], now[1], now[0] - before[0]), url), refresh=True)
                before = now
        except KeyboardInterrupt:
            return


def _step(
    before: tuple[float, Page], read: Callable[[], tuple[float, Page]], interval: float, *, as_json: bool
) -> tuple[float, Page]:
    """Wait for an interval, print its figures, and return its last reading."""
    time.sleep(interval)
    now = read()
    elapsed_s = now[0] - before[0]
    rows = rows_of(before[1], now[1], elapsed_s)
    if as_json:
        sys.stdout.write(json.dumps({"seconds": elapsed_s, "models": [asdict(row) for row in rows]}) + "\n")
        sys.stdout.flush()
    else:
        Console(highlight=False).print(table_of(rows, f"over {elapsed_s:.1f} s"))
    return now


def parse(text: str) -> Page:
    """Return the samples of a page. Lines that are none are left out.

    Source: Prometheus, "Exposition formats", text-based format.
    """
    page: Page = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found:
            labels = tuple(sorted((name, _unescaped(value)) for name, value in _LABEL.findall(found[2] or "")))
            page.setdefault(found[1], {})[labels] = float(found[3])
    return page


def rows_of(before: Page, now: Page, elapsed_s: float) -> list[Row]:
    """Return a row for each version of a model that the later page has, by name and version.

    A counter that is lower than before belongs to a server that started again: it counts from 0.
    """
    keys = {(dict(labels)["model"], dict(labels)["version"]) for labels in now.get("attnserve_sequences_total", {})}
    return [_row(before, now, elapsed_s, model, version) for model, version in sorted(keys)]


def _row(before: Page, now: Page, elapsed_s: float, model: str, version: str) -> Row:
    def gained(name: str) -> float:
        late, early = (_sum(page, name, model, version) for page in (now, before))
        return late - early if late >= early else late

    def mean(name: str) -> float | None:
        count = gained(f"{name}_count")
        return gained(f"{name}_sum") / count if count else None

    def latency(share: float) -> float | None:
        parts = [
            quantile(_buckets(before, now, name, model, version), share)
            for name in ("attnserve_queue_seconds", "attnserve_compute_seconds")
        ]
        return None if None in parts else sum(part for part in parts if part is not None)

    computed = gained("attnserve_computed_tokens_total")
    states = now.get("attnserve_model_state", {})
    mine = {"model": model, "version": version}.items()
    state = next((dict(each)["state"] for each, value in states.items() if value and mine <= dict(each).items()), "")
    return Row(
        model=model,
        version=version,
        state=state,
        rate=gained("attnserve_sequences_total") / elapsed_s,
        refused=gained("attnserve_refused_total") / elapsed_s,
        queue=int(_sum(now, "attnserve_queue_depth", model, version)),
        queue_s=mean("attnserve_queue_seconds"),
        latency_p50_s=latency(_QUANTILES[0]),
        latency_p99_s=latency(_QUANTILES[1]),
        batch=mean("attnserve_batch_size"),
        padding=gained("attnserve_padding_tokens_total") / computed if computed else None,
        attention_bytes=gained("attnserve_attention_bytes_total") / elapsed_s,
    )


def quantile(buckets: list[tuple[float, float]], share: float) -> float | None:
    """Return a quantile of a histogram, linear within its bucket; the last finite bound if it is beyond. None if empty.

    Args:
        buckets: Upper bound and cumulative count of each bucket, ascending.
        share: From 0 to 1.

    Source: Prometheus, function `histogram_quantile`.
    """
    if not buckets or not buckets[-1][1]:
        return None
    wanted, low, below = share * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            return low if bound == float("inf") else low + (bound - low) * (wanted - below) / (count - below)
        low, below = (low if bound == float("inf") else bound), count
    return low


def table_of(rows: list[Row], title: str) -> Table:
    """Return the figures as a table of at most 80 columns for short names."""
    table = Table(title=clean(title), title_justify="left", box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for name in ("seq/s", "refused/s", "queue", "wait", "p50", "p99", "batch", "padding", "attention/s"):
        table.add_column(name, justify="right")
    for row in rows:
        state = Text(f"{clean(row.model)} {clean(row.version)}")
        if row.state and row.state != "ready":
            state.append(f" {clean(row.state)}", style="yellow")
        times = [_ms(each) for each in (row.queue_s, row.latency_p50_s, row.latency_p99_s)]
        batch = "-" if row.batch is None else f"{row.batch:.1f}"
        padding = "-" if row.padding is None else f"{row.padding:.0%}"
        figures = (f"{row.rate:.1f}", f"{row.refused:.1f}", str(row.queue), *times, batch, padding)
        table.add_row(state, *figures, size_text(row.attention_bytes))
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"


def _sum(page: Page, name: str, model: str, version: str) -> float:
    mine = {("model", model), ("version", version)}
    return sum(value for labels, value in page.get(name, {}).items() if mine <= set(labels))


def _buckets(before: Page, now: Page, name: str, model: str, version: str) -> list[tuple[float, float]]:
    mine, found = {("model", model), ("version", version)}, []
    earlier = before.get(f"{name}_bucket", {})
    for labels, value in now.get(f"{name}_bucket", {}).items():
        if mine <= set(labels):
            then = earlier.get(labels, 0.0)
            found.append((float(dict(labels)["le"]), value - then if value >= then else value))
    return sorted(found)


def _unescaped(value: str) -> str:
    return value.replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")


def _default_url(server: str, *, encrypted: bool) -> str:
    host = server.split(",", maxsplit=1)[0].strip().rpartition("/")[2]
    host = host.removeprefix("ipv4:").removeprefix("ipv6:").removeprefix("dns:")
    name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
    return f"http{'s' if encrypted else ''}://{name}:{METRICS_PORT}/metrics"


def _fetch(url: str, tls: Tls | None, token: str | TokenFile | None) -> str:
    """Return the text of a page."""
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"{url!r} is no http or https address", param_hint="--metrics")
    request = urllib.request.Request(url)  # noqa: S310 - the scheme was checked
    if token:
        request.add_header("Authorization", f"Bearer {token.token if isinstance(token, TokenFile) else token}")
    trust = None
    if url.startswith("https:"):
        trust = ssl.create_default_context(cafile=str(tls.ca) if tls and tls.ca else None)
        if tls and tls.cert:
            trust.load_cert_chain(str(tls.cert), str(tls.key))
    try:
        with urllib.request.urlopen(request, timeout=10, context=trust) as reply:  # noqa: S310 - the same
            return str(reply.read().decode("utf-8"))
    except urllib.error.HTTPError as error:
        error.close()
        code = {401: 13, 403: 14}.get(error.code, 8)
        _end(f"{url} answers {error.code}; --token and --token-file precede the command", code)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "reason", error)
        _end(f"cannot read {url}: {reason}; --metrics names the page of another port (serve --http-port)", 8)


def _end(sentence: str, code: int) -> NoReturn:
    sys.stderr.write(f"attnserve: {clean(sentence)}\n")
    raise typer.Exit(code) from None
