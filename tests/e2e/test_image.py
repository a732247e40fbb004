"""The image serves requests when it runs hardened and without a shell, and stops as its signals require.

Needs the fixtures of tests/e2e/conftest.py: the built `image`, and `served` or `own_served`, a container of it with
MiniLM. They skip the tests without root or the container tools.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionSelection, AttnserveError, Client, NotServing, RetryPolicy
from containers import CommandFailed, Engine, run_hardened
from scraping import wait_until

pytestmark = pytest.mark.e2e

TEXT = "Patient takes metformin for diabetes, started lisinopril last month for hypertension."
# float32 sums of up to 512 weights.
ROW_SUM_TOLERANCE = 1e-5
GRACE_S = 30
CALLERS = 4
PROBE = ("python", "-m", "attnserve_server.observability.probe")


def test_text_comes_back_as_embedding_and_attention(served) -> None:
    with Client(served.target) as client:
        answer = client.infer("minilm", TEXT, attention=AttentionSelection(layers=[-1], heads="mean", unit="word"))
    assert answer.outputs["embedding"].shape == (384,)
    [attention] = answer.attention
    assert "metformin" in [token.text for token in attention.key_tokens]
    np.testing.assert_allclose(attention.weights.sum(axis=-1), 1.0, rtol=0, atol=ROW_SUM_TOLERANCE)
    assert answer.receipt.execution_provider == "CPUExecutionProvider"


def test_process_has_no_capabilities_and_cannot_write_files(served) -> None:
    status = served.container.exec("python", "-c", "print(open('/proc/1/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["65532"] * 4
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    for folder in ("/", "/tmp", "/models", "/opt/attnserve", "/var/tmp"):
        with pytest.raises(CommandFailed, match=r"Read-only file system|Permission denied"):
            served.container.exec("python", "-c", f"open('{folder}/written', 'w')")


def test_runtime_sends_no_telemetry(served) -> None:
    """With telemetry, the runtime logs that it cannot store its machine id on the read-only file system."""
    assert "telemetry" not in served.container.logs()


def test_no_shell_can_run_in_the_container(served) -> None:
    with pytest.raises(CommandFailed):
        served.container.exec("/bin/sh", "-c", "true")


def test_health_command_prints_ready_and_is_the_healthcheck_of_the_image(engine: Engine, image: str, served) -> None:
    assert served.container.exec("attnserve-server", "healthcheck").strip() == "ready"
    [described] = json.loads(engine.run("podman", "image", "inspect", image))
    assert described["Healthcheck"]["Test"] == ["CMD", *PROBE]
    assert described["Config"]["StopSignal"] in ("SIGTERM", "15")
    assert described["User"] == "65532:65532"
    assert served.container.exec(*PROBE).strip() == "ready"
    engine.run("podman", "healthcheck", "run", served.container.id)


def test_health_command_fails_without_a_server(served) -> None:
    with pytest.raises(CommandFailed, match="not ready: no answer from port 1"):
        served.container.exec("attnserve-server", "healthcheck", "--http-port", "1")


def test_image_contains_no_installers_and_no_build_dependencies(served) -> None:
    listed = served.container.exec(
        "python", "-c", "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    )
    names = {name.lower() for name in listed.split()}
    assert {"attnserve", "onnxruntime"} <= names
    assert names & {"pip", "setuptools", "torch", "transformers", "onnx", "onnxruntime-gpu", "pytest"} == set()


def test_invalid_settings_are_all_named_and_exit_with_2(engine: Engine, image: str) -> None:
    wrong = {"ATTNSERVE_GRPC_PORT": "70000", "ATTNSERVE_DRAIN_GRACE_S": "-1"}
    container = run_hardened(engine, image, env=wrong)
    try:
        wait_until(lambda: not container.running(), container.logs, 30)
        assert container.exit_code() == 2
        assert all(name in container.logs() for name in wrong)
        assert "Traceback" not in container.logs()
    finally:
        container.remove()


def test_cpu_image_refuses_to_start_where_a_gpu_is_required(engine: Engine, image: str, models: Path) -> None:
    required = {"ATTNSERVE_REQUIRE_PROVIDER": "CUDAExecutionProvider", "ATTNSERVE_HOST": "127.0.0.1"}
    required |= {f"ATTNSERVE_{name}_PORT": "0" for name in ("GRPC", "HTTP", "REST")}
    container = run_hardened(engine, image, env=required, volumes=[f"{models}:/models:ro"])
    try:
        wait_until(lambda: not container.running(), container.logs, 60)
        assert container.exit_code() == 2
        assert "CUDAExecutionProvider" in container.logs()
        assert "Traceback" not in container.logs()
    finally:
        container.remove()


def all_run(served) -> bool:
    """Return whether all callers' calls are at the server, and sequences of some run, from the server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.http_port}/metrics", timeout=10) as reply:
        text = reply.read().decode()

    def total(series: str, label: str) -> float:
        return sum(map(float, re.findall(rf'^{series}{{[^}}]*"{label}"[^}}]*}} (\S+)$', text, re.MULTILINE)))

    calls = total("grpc_server_started_total", "unary") - total("grpc_server_handled_total", "unary")
    return calls == CALLERS and total("attnserve_running_batches", "minilm") > 0


def end_during_calls(served, end: Callable[[], int]) -> tuple[int, Counter[str]]:
    """Start seconds of work, then end the server. Return its exit code and the calls' outcomes, without retries."""
    ended: Counter[str] = Counter()

    def call() -> None:
        # Seconds of work on two cores, in one request.
        with Client(served.target, retry=RetryPolicy(max_attempts=1)) as client:
            try:
                answers = client.infer(
                    "minilm", ["word " * 250] * 16, attention=AttentionSelection(layers=[-1], heads="mean")
                )
                ended["answered"] += len(answers) == 16
            except NotServing as error:
                # The server refuses a request that is not queued yet. In any other state, the connection broke.
                ended["refused" if error.state == "draining" else "lost"] += 1
            except AttnserveError:
                ended["lost"] += 1

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    wait_until(lambda: all_run(served), served.container.logs, 30)
    exit_code = end()
    for caller in callers:
        caller.join(timeout=60)
    return exit_code, ended


def test_sigterm_answers_running_calls_and_exits_0(own_served) -> None:
    exit_code, ended = end_during_calls(own_served, lambda: own_served.container.stop(GRACE_S))
    assert exit_code == 0, own_served.container.logs()
    assert ended["answered"] > 0
    assert ended["answered"] + ended["refused"] == CALLERS, ended


def test_sigkill_loses_running_calls(own_served) -> None:
    """The control of the test above: the calls are running when the signal arrives."""
    exit_code, ended = end_during_calls(own_served, own_served.container.kill)
    assert exit_code == 137
    assert ended["lost"] > 0


def test_promtool_accepts_the_exposition(served) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.http_port}/metrics", timeout=10) as reply:
        text = reply.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
