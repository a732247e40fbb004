"""The demo of `make demo`: serve a model, run three texts, show where it looked, and stop the server.

The repository must have MiniLM as `minilm`. Exits with a message if the server does not start, or ends with another
code than 0. A server that runs 30 s after SIGTERM raises `subprocess.TimeoutExpired`, and a failed call the client's
AttnserveError.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from attnserve_client import AttentionMap, AttentionSelection, Client
from rich.console import Console
from rich.table import Table

SENTENCES = {
    "contract": (
        "The buyer agrees to assume all liabilities, except those specifically excluded in Schedule B, which includes "
        "environmental damages from the 1995 incident."
    ),
    "patient": (
        "Patient takes metformin for diabetes, started lisinopril last month for hypertension, and reports occasional "
        "dizziness since then."
    ),
    "code": "if processed: result.append(processed)",
}
START_TIMEOUT_S = 60.0
SHOWN_METRICS = (
    "attnserve_sequences_total",
    "attnserve_useful_tokens_total",
    "attnserve_computed_tokens_total",
    "attnserve_padding_tokens_total",
    "attnserve_attention_bytes_total",
    "attnserve_compute_seconds_sum",
    "attnserve_execution_provider_info",
)


@contextmanager
def running_server(repository: Path) -> Iterator[tuple[int, int]]:
    """Run `attnserve-server serve` on free loopback ports, yield its gRPC and HTTP ports, and stop it with SIGTERM."""
    with tempfile.TemporaryDirectory() as folder:
        ports_file, log = Path(folder, "ports.json"), Path(folder, "server.log")
        command = [str(Path(sys.executable).with_name("attnserve-server")), "serve", "--repository", str(repository)]
        command += ["--grpc-port", "0", "--http-port", "0", "--rest-port", "0", "--ports-file", str(ports_file)]
        with log.open("wb") as stream:
            server = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + START_TIMEOUT_S
            while not ports_file.exists():
                if server.poll() is not None or time.monotonic() > until:
                    sys.exit(f"the server did not start within {START_TIMEOUT_S:g} s; its log:\n{log.read_text()}")
                time.sleep(0.05)
            ports = json.loads(ports_file.read_text())
            yield ports["grpc"], ports["http"]
        finally:
            server.send_signal(signal.SIGTERM)
            exit_code = server.wait(timeout=30)
        if exit_code != 0:
            sys.exit(f"the server exited with {exit_code} instead of 0; its log:\n{log.read_text()}")


def show(console: Console, name: str, text: str, client: Client, output: Path) -> None:
    """Run one text, print its strongest word links, and write its map as HTML and PNG."""
    # One map of the last layer by word: the mean over heads, without [CLS] and [SEP].
    selection = AttentionSelection(layers=[-1], head_reduction="mean", unit="word", special_tokens="drop")
    result = client.infer("minilm", text, attention=selection)
    attention: AttentionMap = result.attention[0]
    norm = float(np.linalg.norm(result.outputs["embedding"]))
    console.rule(f"[bold]{name}")
    console.print(text, style="italic")
    console.print(f"embedding: {result.outputs['embedding'].shape[0]} dimensions, norm {norm:.4f}")
    console.print("strongest links between words (last layer, mean over heads):")
    table = Table("query", "looks at", "weight")
    names = attention.names(text)  # with positions where a word repeats
    for link in attention.links(top=8):
        table.add_row(names[link.query_token], names[link.key_token], f"{link.weight:.3f}")
    console.print(table)
    html, png = output / f"{name}.html", output / f"{name}.png"
    html.write_text(attention.to_html(), encoding="utf-8")
    attention.plot().savefig(png, dpi=120, bbox_inches="tight")
    console.print(f"wrote {html} and {png}\n")


def main() -> None:
    """Serve the bundle, show each text, and print a part of the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="folder of bundles, with a model named minilm")
    parser.add_argument("--output", type=Path, required=True, help="folder for the HTML and PNG files")
    options = parser.parse_args()
    console = Console(highlight=False)
    with running_server(options.repository) as (grpc_port, http_port):
        with Client(f"127.0.0.1:{grpc_port}") as client:
            while not client.ready("minilm"):
                time.sleep(0.05)
            for name, text in SENTENCES.items():
                show(console, name, text, client, options.output)
        console.rule(f"[bold]some of http://127.0.0.1:{http_port}/metrics")
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics") as reply:
            for line in reply.read().decode().splitlines():
                if line.startswith(SHOWN_METRICS):
                    console.print(line)


if __name__ == "__main__":
    main()
