"""The image as an operator runs it: hardened, without a shell, and still able to do all that the server does."""

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


def test_process_has_no_rights_and_nowhere_to_write(served) -> None:
    status = served.container.exec("python", "-c", "print(open('/proc/1/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["65532"] * 4
    assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    for folder in ("/", "/tmp", "/models", "/opt/attnserve", "/var/tmp"):
        with pytest.raises(CommandFailed, match=r"Read-only file system|Permission denied"):
            served.container.exec("python", "-c", f"open('{folder}/written', 'w')")


def test_runtime_does_not_try_to_report_to_its_makers(served) -> None:
    """It would say so in the log: it finds no place to keep its mark of the machine in."""
    assert "telemetry" not in served.container.logs()


def test_no_shell_can_run_in_it(served) -> None:
    with pytest.raises(CommandFailed):
        served.container.exec("/bin/sh", "-c", "true")


def test_image_s_health_command_says_ready_and_is_its_healthcheck(engine: Engine, image: str, served) -> None:
    assert served.container.exec("attnserve-server", "healthcheck").strip() == "ready"
    [described] = json.loads(engine.run("podman", "image", "inspect", image))
    assert described["Healthcheck"]["Test"] == ["CMD", *PROBE]
    assert described["Config"]["StopSignal"] in ("SIGTERM", "15")
    assert described["User"] == "65532:65532"
    assert served.container.exec(*PROBE).strip() == "ready"
    engine.run("podman", "healthcheck", "run", served.container.id)


def test_health_command_fails_where_nothing_answers(served) -> None:
    with pytest.raises(CommandFailed, match="not ready: no answer from port 1"):
        served.container.exec("attnserve-server", "healthcheck", "--http-port", "1")


def test_image_holds_neither_installers_nor_what_only_building_needs(served) -> None:
    listed = served.container.exec(
        "python", "-c", "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    )
    names = {name.lower() for name in listed.split()}
    assert {"attnserve", "onnxruntime"} <= names
    assert names & {"pip", "setuptools", "torch", "transformers", "onnx", "onnxruntime-gpu", "pytest"} == set()


def test_settings_that_cannot_be_are_all_named_and_end_with_2(engine: Engine, image: str) -> None:
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
    required |= {"ATTNSERVE_GRPC_PORT": "0", "ATTNSERVE_HTTP_PORT": "0"}
    container = run_hardened(engine, image, env=required, volumes=[f"{models}:/models:ro"])
    try:
        wait_until(lambda: not container.running(), container.logs, 60)
        assert container.exit_code() == 2
        assert "CUDAExecutionProvider" in container.logs()
        assert "Traceback" not in container.logs()
    finally:
        container.remove()


def calls_under_way(served) -> int:
    """Unary calls that the server has taken and not ended yet, by its own count."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.http_port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    counts = {
        end: sum(map(float, re.findall(rf'^grpc_server_{end}_total{{[^}}]*"unary"[^}}]*}} (\S+)$', text, re.MULTILINE)))
        for end in ("started", "handled")
    }
    return int(counts["started"] - counts["handled"])


def outcomes_of_calls_under_way_when(served, end: Callable[[], int]) -> tuple[int, Counter[str]]:
    """Has seconds of work begin, then ends the server. Returns its exit code and how the calls ended, untried again."""
    ended: Counter[str] = Counter()

    def call() -> None:
        # Seconds of work on two cores, in one request.
        with Client(served.target, retry=RetryPolicy(max_attempts=1)) as client:
            try:
                answers = client.infer(
                    "minilm", ["word " * 300] * 12, attention=AttentionSelection(layers=[-1], heads="mean")
                )
                ended["answered"] += len(answers) == 12
            except NotServing as error:
                # Told so by the server, before anything of it ran: it was not in the queue yet. Else the line broke.
                ended["refused" if error.state == "draining" else "lost"] += 1
            except AttnserveError:
                ended["lost"] += 1

    callers = [threading.Thread(target=call) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    wait_until(lambda: calls_under_way(served) == CALLERS, served.container.logs, 30)
    exit_code = end()
    for caller in callers:
        caller.join(timeout=60)
    return exit_code, ended


def test_sigterm_answers_what_is_under_way_and_exits_0(own_served) -> None:
    exit_code, ended = outcomes_of_calls_under_way_when(own_served, lambda: own_served.container.stop(GRACE_S))
    assert exit_code == 0, own_served.container.logs()
    assert ended["answered"] > 0
    assert ended["answered"] + ended["refused"] == CALLERS, ended


def test_sigkill_loses_what_is_under_way(own_served) -> None:
    """The control of the test above: its calls really are under way when the signal comes."""
    exit_code, ended = outcomes_of_calls_under_way_when(own_served, own_served.container.kill)
    assert exit_code == 137
    assert ended["lost"] > 0


def test_promtool_finds_no_fault_in_the_exposition(served) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.http_port}/metrics", timeout=10) as reply:
        text = reply.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
