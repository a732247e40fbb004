"""The tokens file: what a line holds, what is refused with which words, and that no secret is stored."""

from __future__ import annotations

from datetime import date

import pytest
from attnserve_server.access.tokens import (
    MAX_FILE_BYTES,
    MAX_TOKENS,
    PREFIX,
    TokensInvalid,
    digest_of,
    made,
    new_secret,
    parse,
)

DIGEST = "sha256:" + "a" * 64


def faults(text: str) -> tuple[str, ...]:
    with pytest.raises(TokensInvalid) as caught:
        parse(text.encode(), "tokens.txt")
    return caught.value.faults


def test_a_token_is_new_random_text_with_a_prefix() -> None:
    found = {new_secret() for _ in range(1000)}
    assert len(found) == 1000
    assert all(one.startswith(PREFIX) and len(one) == len(PREFIX) + 43 for one in found)


def test_a_line_is_read_as_it_was_written_and_holds_no_secret() -> None:
    secret = new_secret()
    token = made("night-job", secret, scopes="infer,attention", rate="2.5", burst="10", expires="2027-06-30")
    assert parse(token.line().encode(), "x") == (token,)
    assert token.digest == digest_of(secret)
    assert secret not in token.line()
    assert secret.removeprefix(PREFIX) not in repr(token)


def test_burst_is_as_the_rate_and_at_least_one() -> None:
    assert made("a", "x", scopes="infer", rate="50").burst == 50
    assert made("a", "x", scopes="infer", rate="0.5").burst == 1


def test_comments_and_empty_lines_are_left_out() -> None:
    text = f"# all\n\n  one {DIGEST} scopes=metrics # the scraper\n"
    assert [token.name for token in parse(text.encode(), "x")] == ["one"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("One " + DIGEST + " scopes=infer", "the name 'One' is not 1 to 63 of"),
        ("x" * 64 + " " + DIGEST + " scopes=infer", "is not 1 to 63 of"),
        ("one", "the second word is not sha256:"),
        ("one sha256:abc scopes=infer", "the second word is not sha256:"),
        (f"one {DIGEST.upper()} scopes=infer", "the second word is not sha256:"),
        (f"one {DIGEST}", "scopes= is missing; give some of infer,attention,metrics,admin"),
        (f"one {DIGEST} scopes=", "scopes has ''"),
        (f"one {DIGEST} scopes=infer,all", "scopes has 'all'; allowed are infer,attention,metrics,admin"),
        (f"one {DIGEST} scopes=attention", "scopes has 'attention' without 'infer'"),
        (f"one {DIGEST} scopes=infer scopes=admin", "scopes= is given twice"),
        (f"one {DIGEST} scopes=infer quota=3", "'quota=3' is not scopes=, rate=, burst= or expires="),
        (f"one {DIGEST} scopes=infer rate=0", "rate is '0'; it must be a number from 0.001 to 1e+06"),
        (f"one {DIGEST} scopes=infer rate=nan", "rate is 'nan'"),
        (f"one {DIGEST} scopes=infer rate=inf", "rate is 'inf'"),
        (f"one {DIGEST} scopes=infer rate=1 burst=0.5", "burst is '0.5'; it must be a number from 1 to 1e+06"),
        (f"one {DIGEST} scopes=infer burst=5", "burst= needs rate="),
        (f"one {DIGEST} scopes=infer expires=2027-13-01", "expires is '2027-13-01'; write a day as 2027-06-30"),
        (f"one {DIGEST} scopes=infer expires=20270630", "expires is '20270630'"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number_and_what_is_allowed(line: str, fault: str) -> None:
    found = faults(f"# first\n{line}\n")[0]
    assert found.startswith("line 2: ")
    assert fault in found


def test_a_token_in_place_of_its_digest_is_not_repeated_in_the_message() -> None:
    secret = new_secret()
    assert secret not in " ".join(faults(f"one {secret} scopes=infer"))


def test_all_faults_are_reported_together() -> None:
    found = faults(f"A {DIGEST} scopes=infer\none {DIGEST} scopes=x\n")
    assert [one.split(":")[0] for one in found] == ["line 1", "line 2"]


def test_names_and_digests_are_used_once() -> None:
    other = "sha256:" + "b" * 64
    (name,) = faults(f"one {DIGEST} scopes=infer\none {other} scopes=infer")
    (digest,) = faults(f"one {DIGEST} scopes=infer\ntwo {DIGEST} scopes=infer")
    assert "'one' is used before" in name
    assert "'two' has the digest of 'one'" in digest


def test_files_that_are_empty_too_large_or_no_text_are_refused() -> None:
    assert "holds no token" in faults("# nothing\n")[0]
    assert str(MAX_FILE_BYTES) in faults("#" * (MAX_FILE_BYTES + 1))[0]
    with pytest.raises(TokensInvalid, match="byte 2 is not UTF-8"):
        parse(b"# \xff", "x")
    many = "\n".join(f"t{number} sha256:{number:064x} scopes=infer" for number in range(MAX_TOKENS + 1))
    assert faults(many) == (f"holds {MAX_TOKENS + 1} tokens; at most {MAX_TOKENS} are allowed",)


def test_a_token_is_valid_through_its_last_day() -> None:
    token = made("a", "x", scopes="infer", expires="2027-06-30")
    assert not token.expired(date(2027, 6, 30))
    assert token.expired(date(2027, 7, 1))
    assert not made("a", "x", scopes="infer").expired(date(9999, 1, 1))
