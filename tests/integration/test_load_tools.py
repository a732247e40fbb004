"""Load tools of others drive a real server with a payload that `attnserve payload` writes.

Needs h2load: `apt-get install -y --no-install-recommends nghttp2-client`.
"""

from __future__ import annotations

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
