"""`attnserve-server token`: what it makes works in a file, it checks as `serve` does, and errors change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attnserve_server.access.tokens import digest_of, parse
from attnserve_server.cli._app import app
from typer.testing import CliRunner, Result


def token(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["token", *map(str, arguments)], env={"COLUMNS": "200"})


def test_new_prints_the_token_once_and_its_line_apart() -> None:
    made = token("new", "nightly", "--scopes", "infer,attention", "--rate", "50")
    assert made.exit_code == 0
    secret = made.stdout.strip()
    line = made.stderr.splitlines()[-1]
    (read,) = parse(line.encode(), "x")
    assert (read.name, read.scopes, read.rate, read.burst) == ("nightly", ("infer", "attention"), 50, 50)
    assert read.digest == digest_of(secret)
    assert secret not in line


def test_new_adds_to_a_file_that_only_its_owner_may_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    first = json.loads(token("new", "a", "--file", file, "--json").stdout)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    token("new", "b", "--file", file, "--expires", "2999-01-01")
    assert file.stat().st_mode & 0o777 == 0o640
    assert [(one.name, one.expires) for one in parse(file.read_bytes(), "x")] == [("a", ""), ("b", "2999-01-01")]
    assert first["token"] not in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("b", "--scopes", "all"), "scopes has 'all'; allowed are infer,attention,metrics,admin"),
        (("B",), "the name 'B' is not"),
        (("a",), "the name 'a' is used before"),
        (("b", "--rate", "many"), "rate is 'many'; it must be a number from 0.001"),
        (("b", "--expires", "soon"), "expires is 'soon'; write a day as 2027-06-30"),
    ],
)
def test_a_wrong_token_is_refused_and_the_file_stays_as_it_was(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    file = tmp_path / "tokens.txt"
    token("new", "a", "--file", file)
    before = file.read_bytes()
    refused = token("new", *arguments, "--file", file)
    assert refused.exit_code == 2
    assert words in refused.stderr
    assert refused.stdout == ""
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.txt"]


def test_check_lists_tokens_and_warns_of_rights(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    token("new", "a", "--file", file, "--rate", "3")
    token("new", "old", "--file", file, "--expires", "2020-01-01")
    shown = token("check", file)
    assert shown.exit_code == 0
    assert "3/s, 3 at once" in shown.stdout
    assert "expired" in shown.stdout
    assert shown.stderr == ""
    file.chmod(0o666)
    assert "chmod go-w tokens.txt" in token("check", file).stderr
    listed = json.loads(token("check", file, "--json").stdout)
    assert listed["others_may_write"]
    assert [(one["name"], one["state"]) for one in listed["tokens"]] == [("a", "valid"), ("old", "expired")]


def test_check_reports_all_faults(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("x\ny\n")
    refused = token("check", file)
    assert refused.exit_code == 2
    assert "line 1" in refused.stderr
    assert "line 2" in refused.stderr
    assert token("check", tmp_path / "none").exit_code == 2


def test_revoke_removes_one_line_and_keeps_comments(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("# kept\n")
    token("new", "a", "--file", file)
    token("new", "ab", "--file", file)
    assert token("revoke", "a", "--file", file).exit_code == 0
    assert file.read_text().startswith("# kept\nab ")
    assert "no token 'a'" in token("revoke", "a", "--file", file).stderr
    last = token("revoke", "ab", "--file", file)
    assert (last.exit_code, "its only token" in last.stderr) == (2, True)


@pytest.mark.parametrize("command", ["new", "check", "revoke"])
def test_help_has_an_example_and_the_exit_codes(command: str) -> None:
    shown = token(command, "--help").stdout
    assert f"attnserve-server token {command}" in shown
    assert "Exit codes" in shown
