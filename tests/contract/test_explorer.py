"""The explorer over HTTP: its files, their headers, and when they are served. tests/browser has the rest."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path

import pytest
from attnserve_server.app import Application
from attnserve_server.config import Settings, SettingsInvalid
from attnserve_server.transport.rest.explorer import HEADERS, PAGE, contents
from http_calls import call

SOURCES = Path(str(files("attnserve_server"))) / "explorer"
NAMES = sorted(path.name for path in SOURCES.iterdir())


@pytest.fixture
async def off(settings: Settings) -> AsyncIterator[Application]:
    application = Application(settings.model_copy(update={"explorer": False}))
    await application.start()
    yield application
    await application.aclose()


async def test_every_file_is_served_with_its_type_and_policy(server: Application) -> None:
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for name in NAMES:
        if name == PAGE:
            continue
        answer = await call(server.rest_port, "GET", f"/explore/{name}")
        assert (answer.status, answer.body) == (200, (SOURCES / name).read_bytes())
        assert answer.headers["content-type"].split(";")[0] == kinds[Path(name).suffix]
        assert answer.headers.items() >= HEADERS.items()
    page = await call(server.rest_port, "GET", "/explore")
    assert (page.status, page.body) == (200, (SOURCES / PAGE).read_bytes())
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers.items() >= HEADERS.items()


def test_policy_allows_no_inline_code_and_no_other_origin() -> None:
    policy = HEADERS["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.search(r"https?:|\*|data:|blob:", policy)


def test_page_holds_no_inline_code_and_files_name_no_other_origin() -> None:
    page = (SOURCES / PAGE).read_text(encoding="utf-8")
    assert re.findall(r"<style|<script(?![^>]* src=)| on\w+=| style=", page) == []
    for name in NAMES:
        found = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", (SOURCES / name).read_text(encoding="utf-8")))
        assert found <= {"http://www.w3.org"}, f"{name}: the name of a format is no address"


def test_every_imported_module_is_there() -> None:
    for name in NAMES:
        imported = re.findall(r'from "\./([\w.]+)"', (SOURCES / name).read_text(encoding="utf-8"))
        assert set(imported) <= set(NAMES), name


@pytest.mark.parametrize(
    "path", ["/explore/../app.py", "/explore/nothing.js", f"/explore/{PAGE}", "/explore/", "/explore/%2e%2e/app.py"]
)
async def test_nothing_else_is_served(server: Application, path: str) -> None:
    answer = await call(server.rest_port, "GET", path)
    assert answer.status == 404
    assert b"attnserve_server" not in answer.body


async def test_root_leads_to_the_page_below_any_prefix(server: Application) -> None:
    answer = await call(server.rest_port, "GET", "/")
    assert (answer.status, answer.headers["location"]) == (307, "explore")


async def test_known_file_is_not_sent_again(server: Application) -> None:
    tag = (await call(server.rest_port, "GET", "/explore/explore.js")).headers["etag"]
    again = await call(server.rest_port, "GET", "/explore/explore.js", headers={"if-none-match": f'"x", {tag}'})
    assert (again.status, again.body) == (304, b"")
    other = await call(server.rest_port, "GET", "/explore/shared.css", headers={"if-none-match": tag})
    assert other.status == 200


async def test_explorer_that_is_off_has_no_path(off: Application) -> None:
    for path in ("/", "/explore", "/explore/explore.js"):
        assert (await call(off.rest_port, "GET", path)).status == 404


@pytest.mark.parametrize(
    ("host", "explorer", "served"),
    [
        ("127.0.0.1", None, True), ("::1", None, True), ("localhost", None, True), ("0.0.0.0", None, False),
        ("127.0.0.1", False, False), ("0.0.0.0", True, True),
    ],
)  # fmt: skip
def test_explorer_is_on_by_default_on_loopback_alone(
    tmp_path: Path, host: str, explorer: bool | None, served: bool
) -> None:
    assert Settings(repository=tmp_path, host=host, explorer=explorer, insecure=True).explores is served


def test_variable_turns_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSERVE_EXPLORER", "false")
    assert Settings.load({"repository": tmp_path}).explores is False
    monkeypatch.setenv("ATTNSERVE_EXPLORER", "perhaps")
    with pytest.raises(SettingsInvalid, match="explorer"):
        Settings.load({"repository": tmp_path})


def test_contents_are_those_of_the_folder() -> None:
    assert sorted(contents()) == NAMES
