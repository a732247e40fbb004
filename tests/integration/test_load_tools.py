"""Load tools of others drive a real server, as docs/load.md describes.

Needs h2load, `apt-get install -y --no-install-recommends nghttp2-client`, and perf_analyzer.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from attnserve.v1 import inference_service_pb2 as pb
from attnserve_client.cli._app import app
from processes import started
from tiny_bundle import write_tiny_files, write_tiny_repository
from typer.testing import CliRunner

H2LOAD = shutil.which("h2load")
PERF = shutil.which("perf_analyzer")


def write(*line: str) -> str:
    done = CliRunner().invoke(app, ["payload", *line])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(H2LOAD is None, reason="needs h2load: apt-get install -y --no-install-recommends nghttp2-client")
def test_h2load_gets_an_answer_to_every_unary_call(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    running = started(write_tiny_repository(tmp_path / "repository", write_tiny_files(tmp_path / "files")), tmp_path)
    try:
        target, file = f"127.0.0.1:{running.grpc_port}", tmp_path / "request.bin"
        written = write("tiny", str(file), "the cat", "--sequences", "2", "--server", target)
        body = file.read_bytes()
        assert f"{len(body)} bytes, one request of 2 sequences" in written
        assert body[0] == 0
        assert int.from_bytes(body[1:5]) == len(body) - 5
        assert [one.text.text for one in pb.InferRequest.FromString(body[5:]).sequences] == ["the cat"] * 2
        line = [str(H2LOAD), "-n", "200", "-c", "2", "-m", "8", "-d", str(file), "-H", "te: trailers"]
        line += ["-H", "content-type: application/grpc", f"http://{target}/attnserve.v1.InferenceService/Infer"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
        assert re.search(r"requests: 200 total, .* 200 succeeded, 0 failed, 0 errored", done.stdout), done.stdout
        # h2load counts HTTP statuses, which are 200 for failed calls too.
        assert running.sample("attnserve_requests_total", model="tiny", code="OK") == 200
    finally:
        running.process.terminate()
        assert running.process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.skipif(PERF is None, reason="needs perf_analyzer, as docs/load.md installs it")
def test_perf_analyzer_drives_the_open_inference_protocol(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    running = started(write_tiny_repository(tmp_path / "repository", write_tiny_files(tmp_path / "files")), tmp_path)
    try:
        data = tmp_path / "data.json"
        data.write_text(json.dumps({"data": [{"input_ids": [2, 4, 5, 6, 3], "attention_mask": [1] * 5}]}))
        line = [str(PERF), "-m", "tiny", "-u", f"127.0.0.1:{running.grpc_port}", "-i", "grpc", "-a"]
        line += ["--input-data", str(data), "--shape", "input_ids:5", "--shape", "attention_mask:5"]
        line += ["-H", "attnserve-outputs:model", "--concurrency-range", "4", "-p", "1000", "-s", "999", "-r", "3"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
        found = re.search(r"Concurrency: 4, throughput: ([\d.]+) infer/sec, latency \d+ usec", done.stdout)
        assert found is not None, done.stdout + done.stderr
        assert float(found[1]) > 0
        assert running.sample("attnserve_requests_total", model="tiny", code="OK") > 0
    finally:
        running.process.terminate()
        assert running.process.wait(30) == 0
