"""Settings: their sources, and one error for all invalid ones.

A setting comes from a flag of `serve`, else from its variable, such as ATTNSERVE_GRPC_PORT, else it is the default. A
fixture removes these variables. Invalid settings raise SettingsInvalid, which lists all of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
from attnserve_server.cli._app import app
from attnserve_server.config import Settings, SettingsInvalid, flag_of, variable_of
from attnserve_server.config_bounds import size_text
from attnserve_server.domain import machine
from attnserve_server.domain.machine import cores, is_loopback
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable_of(name), raising=False)


def test_defaults_are_safe_and_expected() -> None:
    settings = Settings.load({})
    assert (settings.host, settings.grpc_port, settings.http_port) == ("127.0.0.1", 8001, 8002)
    assert settings.max_response_bytes < settings.max_request_bytes == 64 * 2**20


def test_flag_overrides_variable_and_variable_overrides_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_GRPC_PORT", "1")
    monkeypatch.setenv("ATTNSERVE_INSTANCES", "3")
    settings = Settings.load({"grpc_port": "2", "instances": None})
    assert (settings.grpc_port, settings.instances, settings.http_port) == (2, 3, 8002)


def test_models_are_split_at_commas_from_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_MODELS", "a, b/2,")
    assert Settings.load({}).models == ("a", "b/2")
    assert Settings.load({"models": "c"}).models == ("c",)
    assert Settings(models=("d",)).models == ("d",)


def test_empty_variable_leaves_an_optional_setting_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_REQUIRE_PROVIDER", "")
    monkeypatch.setenv("ATTNSERVE_PORTS_FILE", "")
    settings = Settings.load({"repository": "there"})
    assert (settings.require_provider, settings.ports_file, settings.repository) == (None, None, Path("there"))


def test_one_error_lists_all_faults_with_flag_variable_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_INSTANCES", "-1")
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load({"grpc_port": "70000", "log_level": "loud"})
    assert caught.value.faults == (
        "--grpc-port (ATTNSERVE_GRPC_PORT): input should be less than or equal to 65535, got '70000'",
        "--instances (ATTNSERVE_INSTANCES): input should be greater than or equal to 0, got '-1'",
        "--log-level (ATTNSERVE_LOG_LEVEL): input should be 'debug', 'info', 'warning' or 'error', got 'loud'",
    )


def test_ports_must_differ_unless_the_system_chooses_them() -> None:
    with pytest.raises(SettingsInvalid, match="grpc_port and http_port are both 9000; they must differ"):
        Settings.load({"grpc_port": "9000", "http_port": "9000"})
    assert Settings.load({"grpc_port": "0", "http_port": "0"}).http_port == 0


def test_variables_of_kubernetes_services_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    # Kubernetes sets these for a Service named attnserve.
    monkeypatch.setenv("ATTNSERVE_PORT", "tcp://10.0.0.1:8001")
    monkeypatch.setenv("ATTNSERVE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("ATTNSERVE_PORT_8001_TCP_ADDR", "10.0.0.1")
    # And these for one named attnserve-models.
    monkeypatch.setenv("ATTNSERVE_MODELS_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("ATTNSERVE_MODELS_PORT", "tcp://10.0.0.1:8001")
    assert Settings.load({}).grpc_port == 8001


def test_variable_that_is_no_setting_is_refused_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_MODLES", "minilm")
    monkeypatch.setenv("ATTNSERVE_QQQQ", "1")
    monkeypatch.setenv("ATTNSERVE_TOKEN", "of the client")
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load({"grpc_port": "x"})
    assert caught.value.faults[1:] == (
        "ATTNSERVE_MODLES: there is no such setting; did you mean ATTNSERVE_MODELS?",
        "ATTNSERVE_QQQQ: there is no such setting; `attnserve-server serve --help` lists them",
    )
    assert "--grpc-port" in caught.value.faults[0]


@pytest.mark.parametrize(("given", "expected"), [("256MiB", 2**28), ("0.5 GiB", 2**29), ("64kib", 2**16), ("7", 7)])
def test_sizes_have_units(monkeypatch: pytest.MonkeyPatch, given: str, expected: int) -> None:
    assert Settings.load({"max_queue_bytes": given}).max_queue_bytes == expected
    monkeypatch.setenv("ATTNSERVE_MAX_QUEUE_BYTES", given)
    assert Settings.load({}).max_queue_bytes == expected


@pytest.mark.parametrize("given", ["3MB", "MiB", "manyMiB", "nanMiB"])
def test_size_of_another_form_is_refused(given: str) -> None:
    with pytest.raises(SettingsInvalid, match=r"^--max-queue-bytes \(ATTNSERVE_MAX_QUEUE_BYTES\)"):
        Settings.load({"max_queue_bytes": given})


@pytest.mark.parametrize(("count", "text"), [(2**26, "64 MiB"), (2**31, "2 GiB"), (1025, "1025"), (0, "0")])
def test_defaults_are_shown_with_units(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_description_with_its_default(name: str) -> None:
    description = Settings.model_fields[name].description or ""
    assert "Default: " in description
    assert description.endswith(".")


def test_every_setting_is_a_flag_of_serve_and_serve_has_no_other() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    words = {word for line in shown.splitlines() for word in line.split() if word.startswith("--")}
    assert words == {flag_of(name) for name in Settings.model_fields} | {"--no-explorer", "--help"}


@pytest.mark.parametrize(
    ("isolation", "count", "several"),
    [
        ("auto", 3, False),
        ("auto", 4, True),
        ("auto", 64, True),
        ("process", 1, True),
        ("none", 64, False),
    ],
)
def test_a_server_is_several_processes_where_they_pay(
    monkeypatch: pytest.MonkeyPatch, isolation: str, count: int, several: bool
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: count)
    assert Settings.load({"isolation": isolation}).isolated is several


def test_this_process_has_a_core() -> None:
    assert cores() >= 1


def test_provider_options_are_pairs_and_an_error_names_the_wrong_one() -> None:
    assert Settings.load({"cuda_options": "use_tf32=1, gpu_mem_limit=5"}).cuda_options == {
        "use_tf32": "1",
        "gpu_mem_limit": "5",
    }
    with pytest.raises(SettingsInvalid, match=r"--tensorrt-options .*'trt_fp16_enable' is not key=value"):
        Settings.load({"tensorrt_options": "trt_fp16_enable"})


def test_device_ids_and_cuda_graphs_are_lists() -> None:
    settings = Settings.load({"device_ids": "0,2", "cuda_graphs": "1x32, 8x64"})
    assert (settings.device_ids, settings.cuda_graphs) == ((0, 2), ("1x32", "8x64"))
    with pytest.raises(SettingsInvalid, match="'8x0' is not a shape"):
        Settings.load({"cuda_graphs": "8x0"})


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan", "often"])
def test_share_of_verified_batches_is_between_0_and_1(share: str) -> None:
    with pytest.raises(SettingsInvalid, match=r"--verify-batches \(ATTNSERVE_VERIFY_BATCHES\)"):
        Settings.load({"verify_batches": share})


def test_action_on_a_mismatch_is_one_of_two() -> None:
    assert Settings.load({"verify_action": "isolate"}).verify_action == "isolate"
    with pytest.raises(SettingsInvalid, match=r"--verify-action .*'count' or 'isolate', got 'stop'"):
        Settings.load({"verify_action": "stop"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100000 100000\n", 1),
        ("50000 100000", 1),
        ("150000 100000", 2),
        ("900000 100000", 8),
        ("max 100000", 8),
        ("", 8),
    ],
    ids=["one core", "half a core", "one and a half", "more than there are", "no quota", "empty"],
)
def test_cores_are_bounded_by_the_quota_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    quota = tmp_path / "cpu.max"
    assert cores(quota) == 8, "without a file there is no quota"
    quota.write_text(text)
    assert cores(quota) == expected


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
    ],
)
def test_loopback_is_what_no_other_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


TLS = {"tls_cert": "c", "tls_key": "k"}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({}, "without TLS (set --tls-cert and --tls-key) and without a check of callers"),
        (TLS, "without a check of callers (set --tokens-file or --tls-client-ca)"),
        ({"tokens_file": "t"}, "without TLS (set --tls-cert and --tls-key); use 127.0.0.1"),
        (TLS | {"tokens_file": "t"}, ""),
        (TLS | {"tls_client_ca": "a"}, ""),
        ({"insecure": "true"}, ""),
        ({"tokens_file": "t", "insecure": True}, ""),
    ],
)
def test_an_address_that_others_reach_needs_tls_and_a_check_or_insecure(given: dict[str, str], fault: str) -> None:
    Settings.load({"host": "127.0.0.1", **given})
    if not fault:
        assert Settings.load({"host": "0.0.0.0", **given}).host == "0.0.0.0"
        return
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load({"host": "0.0.0.0", **given})
    assert str(caught.value).startswith("--host 0.0.0.0 can be reached from other machines, ")
    assert fault in str(caught.value)
    assert "--insecure (ATTNSERVE_INSECURE=true)" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"tls_cert": "c"}, "of --tls-cert and --tls-key only one is set; set both, or neither"),
        ({"tls_key": "k"}, "of --tls-cert and --tls-key only one is set; set both, or neither"),
        ({"tls_client_ca": "a"}, "--tls-client-ca needs TLS: set --tls-cert and --tls-key"),
    ],
)
def test_half_of_tls_is_refused(given: dict[str, str], fault: str) -> None:
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load(given)
    assert caught.value.faults == (fault,)


def test_insecure_is_a_flag_without_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    async def note(settings: Settings, _: object) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr("attnserve_server.cli.serve._serve", note)
    # It would be the logging of all tests.
    monkeypatch.setattr("attnserve_server.cli.serve.serving", lambda *_: contextlib.nullcontext())
    assert CliRunner().invoke(app, ["serve", "--insecure", "--host", "0.0.0.0"]).exit_code == 0
    assert seen[0].insecure


def test_tracing_without_its_packages_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsInvalid, match=r"--tracing .*: .*pip install 'attnserve\[otel\]'"):
        Settings.load({"tracing": True})
    assert not Settings.load({}).tracing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_tracing_by_another_exporter_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid, match=f"{name} is '{value}'"):
        Settings.load({"tracing": True})
    monkeypatch.setenv(name, "otlp" if name == "OTEL_TRACES_EXPORTER" else "grpc")
    assert Settings.load({"tracing": True}).tracing
