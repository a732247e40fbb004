"""Settings: where they come from, and that all faults are told at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from attnserve_server.cli._app import app
from attnserve_server.config import Settings, SettingsInvalid, cores, flag_of, variable_of
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable_of(name), raising=False)


def test_defaults_are_safe_and_expected() -> None:
    settings = Settings.load({})
    assert (settings.host, settings.grpc_port, settings.http_port) == ("127.0.0.1", 8001, 8002)
    assert settings.max_response_bytes < settings.max_request_bytes == 64 * 2**20


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_GRPC_PORT", "1")
    monkeypatch.setenv("ATTNSERVE_INSTANCES", "3")
    settings = Settings.load({"grpc_port": "2", "instances": None})
    assert (settings.grpc_port, settings.instances, settings.http_port) == (2, 3, 8002)


def test_models_are_split_at_commas_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_MODELS", "a, b/2,")
    assert Settings.load({}).models == ("a", "b/2")
    assert Settings.load({"models": "c"}).models == ("c",)
    assert Settings(models=("d",)).models == ("d",)


def test_an_empty_variable_leaves_an_optional_setting_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_REQUIRE_PROVIDER", "")
    monkeypatch.setenv("ATTNSERVE_PORTS_FILE", "")
    settings = Settings.load({"repository": "there"})
    assert (settings.require_provider, settings.ports_file, settings.repository) == (None, None, Path("there"))


def test_all_faults_are_told_at_once_with_flag_variable_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_INSTANCES", "-1")
    with pytest.raises(SettingsInvalid) as caught:
        Settings.load({"grpc_port": "70000", "log_level": "loud"})
    assert caught.value.faults == (
        "--grpc-port (ATTNSERVE_GRPC_PORT): input should be less than or equal to 65535, got '70000'",
        "--instances (ATTNSERVE_INSTANCES): input should be greater than or equal to 0, got '-1'",
        "--log-level (ATTNSERVE_LOG_LEVEL): input should be 'debug', 'info', 'warning' or 'error', got 'loud'",
    )


def test_two_ports_must_differ_unless_the_system_chooses() -> None:
    with pytest.raises(SettingsInvalid, match="grpc_port and http_port are both 9000; they must differ"):
        Settings.load({"grpc_port": "9000", "http_port": "9000"})
    assert Settings.load({"grpc_port": "0", "http_port": "0"}).http_port == 0


def test_variables_of_others_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    # Kubernetes sets these for a Service named attnserve.
    monkeypatch.setenv("ATTNSERVE_PORT", "tcp://10.0.0.1:8001")
    monkeypatch.setenv("ATTNSERVE_SERVICE_HOST", "10.0.0.1")
    assert Settings.load({}).grpc_port == 8001


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_does_and_why_its_default(name: str) -> None:
    description = Settings.model_fields[name].description or ""
    assert "Default: " in description
    assert description.endswith(".")


def test_every_setting_is_a_flag_of_serve_and_serve_has_no_other() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    words = {word for line in shown.splitlines() for word in line.split() if word.startswith("--")}
    assert words == {flag_of(name) for name in Settings.model_fields} | {"--help"}


def test_there_is_a_core() -> None:
    assert cores() >= 1


def test_options_of_a_provider_are_pairs_and_a_fault_names_the_one_at_fault() -> None:
    assert Settings.load({"cuda_options": "use_tf32=1, gpu_mem_limit=5"}).cuda_options == {
        "use_tf32": "1",
        "gpu_mem_limit": "5",
    }
    with pytest.raises(SettingsInvalid, match=r"--tensorrt-options .*'trt_fp16_enable' is no key=value"):
        Settings.load({"tensorrt_options": "trt_fp16_enable"})


def test_devices_and_shapes_of_graphs_are_lists() -> None:
    settings = Settings.load({"device_ids": "0,2", "cuda_graphs": "1x32, 8x64"})
    assert (settings.device_ids, settings.cuda_graphs) == ((0, 2), ("1x32", "8x64"))
    with pytest.raises(SettingsInvalid, match="'8x0' is no shape"):
        Settings.load({"cuda_graphs": "8x0"})


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan", "often"])
def test_share_of_verified_batches_is_a_share(share: str) -> None:
    with pytest.raises(SettingsInvalid, match=r"--verify-batches \(ATTNSERVE_VERIFY_BATCHES\)"):
        Settings.load({"verify_batches": share})


def test_action_on_a_mismatch_is_one_of_two() -> None:
    assert Settings.load({"verify_action": "isolate"}).verify_action == "isolate"
    with pytest.raises(SettingsInvalid, match=r"--verify-action .*'count' or 'isolate', got 'stop'"):
        Settings.load({"verify_action": "stop"})
