"""What a person does in the explorer, in Chromium, compared with what the SDK returns for the same request.

Weights of both are those of one server: they are equal in the three decimals that are shown.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from attnserve_client import AttentionSelection, Client
from credentials import Tokens
from explored import LABELS, Open
from serving import RunningServer, serve

pytestmark = pytest.mark.browser

SENTENCE = "The buyer assumes all liabilities, and the seller keeps all rights to the plant."
CAT = "the cat sat on a mat"
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "\"quoted\" 'single' &lt;b&gt;",
    "</script><script>alert(1)</script>",
    "\u202eright to left\u202c \u05d0\u05d1 end",
)


def links_of(server: RunningServer, text: str, **selected: Any) -> list[tuple[str, str, str]]:
    """The strongest links by the SDK, as the page writes them."""
    choice = {"layers": -1, "heads": "mean", "unit": "word", "special_tokens": "drop", **selected}
    with Client(server.target) as client:
        shown = client.infer("minilm", text, attention=AttentionSelection(**choice)).attention[0]
    names = shown.names(text)
    links = shown.links(top=14)
    return [(names[one.query_token], names[one.key_token], f"{one.weight:.3f}") for one in links]


def test_root_leads_to_the_explorer(tiny: RunningServer, opener: Open) -> None:
    assert opener(tiny, path="/").page.url.startswith(f"http://127.0.0.1:{tiny.rest_port}/explore#model=")


def test_typed_text_shows_the_links_of_the_sdk(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    assert opened.words[:4] == ["The", "buyer", "assumes", "all"]
    assert opened.links == links_of(minilm, SENTENCE)


@pytest.mark.parametrize(
    ("change", "selected"),
    [
        ("#controls >> text=tokens >> nth=0", {"unit": "token"}),
        ("#controls >> text=special tokens", {"special_tokens": "keep"}),
    ],
)
def test_chips_change_the_selection(minilm: RunningServer, opener: Open, change: str, selected: dict[str, str]) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    opened.page.click(change)
    opened.settled()
    opened.page.locator("#facts", has_text=next(iter(selected.values()))).wait_for()
    links = links_of(minilm, SENTENCE, **selected)
    if "special_tokens" not in selected:
        assert opened.links == links


@pytest.mark.parametrize(
    ("layer", "heads", "selected"),
    [
        ("2", "7", {"layers": 2, "heads": [7], "head_reduction": "mean"}),
        ("0", "max", {"layers": 0, "heads": "max"}),
        ("rollout", "mean", {"layers": (), "layer_reduction": "rollout", "heads": "mean"}),
    ],
)
def test_layers_and_heads_show_the_links_of_the_sdk(
    minilm: RunningServer, opener: Open, layer: str, heads: str, selected: dict[str, Any]
) -> None:
    opened = opener(minilm, f"#layer={layer}&heads={heads}")
    opened.run(SENTENCE)
    assert opened.links == links_of(minilm, SENTENCE, **selected)
    opened.page.click("#depth > summary")
    assert opened.page.locator("#layers select >> nth=0").input_value() == layer
    assert opened.page.locator("#layers select >> nth=1").input_value() == heads


def test_word_shows_what_it_looks_at_by_pointer_by_keyboard_and_pinned(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    page, summary = opened.page, opened.page.locator(".summary >> nth=-1")
    page.hover(".token >> text=buyer")
    assert summary.text_content().startswith("buyer looks at ")
    page.focus(".token >> nth=0")
    tokens = page.locator(".token:not([hidden])")
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert summary.text_content().startswith("buyer looks at "), "the arrow keys move"
    page.keyboard.press("Enter")
    page.mouse.move(5, 5)
    assert tokens.nth(1).get_attribute("aria-pressed") == "true"
    assert summary.text_content().startswith("buyer looks at "), "the pinned word stays"
    assert "pin=" in page.url
    page.keyboard.press("Escape")
    assert tokens.nth(1).get_attribute("aria-pressed") == "false"
    stops = page.evaluate("document.querySelectorAll('.token[tabindex=\"0\"]').length")
    assert stops == 1, "one stop of the Tab key for all words"
    page.click("text=what looks at it")
    page.hover(".token >> text=plant")
    assert summary.text_content().startswith("plant is looked at by ")


def test_heads_are_fetched_when_they_are_opened_in_two_requests(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    before = len(opened.runs)
    opened.page.click("#depth > summary")
    opened.page.wait_for_selector(".thumb")
    assert len(opened.runs) - before == 2
    assert opened.page.locator(".thumb").count() == 72
    opened.page.click(".thumb >> nth=15")
    opened.settled()
    assert (
        opened.page.locator('.thumb[aria-pressed="true"]')
        .get_attribute("aria-label")
        .startswith("layer 1, head 3: entropy ")
    )
    assert opened.links == links_of(minilm, SENTENCE, layers=1, heads=[3], head_reduction="mean")
    opened.page.select_option("#grid select", "mean_distance")
    distances = opened.page.locator(".thumb").evaluate_all(
        "all => all.map(one => +one.title.match(/distance ([\\d.]+)/)[1])"
    )
    assert distances == sorted(distances, reverse=True)


def test_threshold_and_top_leave_weights_out(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    every = links_of(minilm, SENTENCE)
    bound = float(every[5][2])
    opened.page.fill("#controls input >> nth=0", str(bound))
    opened.page.press("#controls input >> nth=0", "Tab")
    assert opened.links == [one for one in every if float(one[2]) >= bound]


def test_search_marks_words_and_moves_to_them(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    opened.page.fill("input[type=search]", "all")
    assert opened.page.locator(".token.found").all_text_contents() == ["all", "all"]
    assert "2 found" in opened.page.locator("#controls").text_content()
    opened.page.press("input[type=search]", "Enter")
    assert opened.page.evaluate("document.activeElement.textContent") == "all"


def test_hostile_text_and_labels_stay_text(tiny: RunningServer, opener: Open) -> None:
    opened = opener(tiny, "#model=classifier")
    opened.page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    shown = ""
    for text in HOSTILE:
        opened.run(text)
        shown += "".join(opened.words)
        assert opened.page.locator("main img, main svg, main script").count() == 0
    assert shown == "".join(HOSTILE).replace(" ", "")
    listed = opened.page.locator("#result .isolated").all_text_contents()
    assert sorted(listed) == sorted(LABELS), "labels come with the answer, as text"
    for word in opened.page.locator(".token").all():
        assert word.evaluate("one => getComputedStyle(one).unicodeBidi") == "isolate"


def test_control_the_policy_blocks_an_injected_script_and_the_tests_notice_it(
    tiny: RunningServer, opener: Open
) -> None:
    opened = opener(tiny)
    opened.page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { window.refused = true } }"
    )
    opened.page.evaluate(
        "() => document.head.append(Object.assign(document.createElement('style'), {textContent: 'a{}'}))"
    )
    assert opened.page.evaluate("window.refused") is True
    assert set(opened.page.evaluate("window.violations.splice(0)")) == {"require-trusted-types-for", "style-src-elem"}
    opened.expected |= {"Content Security Policy", "TrustedHTML", "Trusted Type"}


def test_token_is_requested_and_kept_in_memory_alone(tiny_repository: Path, tmp_path: Path, opener: Open) -> None:
    tokens = Tokens(tmp_path / "tokens.txt")
    tokens.add("reader", "infer,attention")
    flags = ("--isolation", "none", "--instances", "1", "--tokens-file", str(tokens.path), "--insecure")
    with serve(tiny_repository, tmp_path, *flags) as server:
        opened = opener(server)
        opened.expected.add("401")
        page = opened.page
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        page.locator("#status", has_text="does not accept").wait_for()
        page.fill("#token", tokens.secrets["reader"])
        page.press("#token", "Enter")
        page.wait_for_selector("#sign", state="hidden")
        opened.run(CAT)
        assert opened.words == CAT.split()
        kept = page.evaluate(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, document.body.innerHTML])"
        )
        assert tokens.secrets["reader"] not in kept
        assert not any(tokens.secrets["reader"] in url for url in opened.requests)
        page.reload()
        page.wait_for_selector("#sign", state="visible")


def test_link_has_the_view_but_the_text_only_if_ticked(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    opened.page.click(".token >> text=seller")
    opened.page.click("#controls >> text=tokens >> nth=0")
    opened.settled()
    assert "unit=token" in opened.page.url
    assert "buyer" not in opened.page.url
    opened.page.check("text=with the text in the link")
    again = opener(minilm, "#" + opened.page.url.partition("#")[2])
    again.settled()
    assert again.words == opened.words
    assert again.links == opened.links


def test_second_text_is_shown_beside_the_first_with_the_difference(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm, "#other=text")
    opened.page.fill("#second", SENTENCE.replace("buyer", "lender"))
    opened.run(SENTENCE)
    assert opened.page.locator(".board").count() == 3
    assert "Cosine of both embeddings: 0." in opened.page.locator("#relation").text_content()
    shared = opened.page.locator(".board >> nth=2").locator(".token").all_text_contents()
    assert "buyer" not in shared
    assert "seller" in shared
    opened.page.locator(".board >> nth=0").locator(".token >> text=plant").hover()
    pointed = opened.page.locator(".token.at").all_text_contents()
    assert pointed == ["plant"] * 3, "all boards point at the same word"
    with Client(minilm.target) as client:
        choice = AttentionSelection(layers=-1, heads="mean", unit="word", special_tokens="drop")
        texts = [SENTENCE, SENTENCE.replace("buyer", "lender")]
        one, other = (each.attention[0].weights[0] for each in client.infer("minilm", texts, attention=choice))
    kept = [at for at in range(len(one)) if at != 1]
    difference = (other - one)[kept][:, kept]
    strongest = opened.page.locator(".board >> nth=2").locator(".links .value >> nth=0").text_content()
    listed = opened.page.locator(".board >> nth=2").locator(".links .link").count()
    assert listed > 0
    assert abs(float(strongest)) <= abs(difference).max() + 1e-3


def test_two_versions_are_compared(tiny: RunningServer, opener: Open) -> None:
    opened = opener(tiny, "#model=tiny&version=1&other=model&otherModel=tiny&otherVersion=2")
    opened.run(CAT)
    titles = opened.page.locator(".board h2").all_text_contents()
    assert [title for title in titles if "tiny" in title] == ["Where it looks: tiny 1", "Where it looks: tiny 2"]


def test_exports_hold_the_map_on_screen(minilm: RunningServer, opener: Open, tmp_path: Path) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    saved = {}
    for name in ("PNG", "SVG", "CSV", "JSON"):
        with opened.page.expect_download() as download:
            opened.page.click(f"#exports >> text={name}")
        saved[name] = Path(download.value.path()).read_bytes()
    content = json.loads(saved["JSON"])
    table = list(csv.reader(io.StringIO(saved["CSV"].decode())))
    assert [[float(one) for one in row[1:]] for row in table[1:]] == content["weights"]
    assert content["receipt"]["model"] == "minilm"
    assert saved["PNG"].startswith(b"\x89PNG")
    assert saved["SVG"].startswith(b"<svg")
    opened.page.click("text=as Python")
    program = opened.page.locator(".code").text_content()
    compile(program, "program", "exec")
    program = program.replace('Client("127.0.0.1")', f'Client("{minilm.target}")')
    printed = io.StringIO()
    exec(program, {"print": lambda line: printed.write(line + "\n")})
    first = opened.links[0]
    assert printed.getvalue().splitlines()[0].split(": ")[1] == first[2]


def test_line_of_a_shell_holds_the_request(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm, "#top=2")
    opened.run("the buyer's rights")
    opened.page.click("text=as curl")
    line = shlex.split(opened.page.locator(".code").text_content())
    assert line[:2] == ["curl", "--json"]
    sent = urllib.request.Request(line[3], line[2].encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(sent, timeout=30) as answer:
        found = json.load(answer)
    weights = found["results"][0]["attention"]["maps"][0]["links"]["weights"]["data"]
    assert len(weights) == 2 * len(opened.words)
    assert {link[2] for link in opened.links} <= {f"{weight:.3f}" for weight in weights}


def test_print_has_the_digest_and_no_controls(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    page = opened.page
    with Client(minilm.target) as client:
        digest = client.model("minilm").digest
    assert not page.is_visible("#printed")
    page.emulate_media(media="print")
    assert page.is_visible("#printed")
    assert digest in page.locator("#printed").text_content()
    assert page.is_visible(".sentence")
    assert page.is_visible("#caveat")
    hidden = ["#ask", "#controls", "#exports", ".zoom"]
    assert [one for one in hidden if page.is_visible(one)] == []
    heights = page.locator(".scroll").first.evaluate("one => [one.clientHeight, one.scrollHeight]")
    assert heights[0] == heights[1], "no part of the map is behind an edge"


def test_model_that_takes_tensors_is_refused_with_the_remedy(tiny: RunningServer, opener: Open) -> None:
    opened = opener(tiny, "#model=plain")
    opened.page.fill("#text", CAT)
    opened.page.click("#run")
    opened.page.wait_for_selector(".status.wrong")
    assert "plain takes tensors" in opened.page.locator("#status").text_content()


def test_refusal_of_the_server_is_shown(tiny: RunningServer, opener: Open) -> None:
    opened = opener(tiny, "#model=tiny")
    opened.expected.add("400")
    opened.page.fill("#text", "the cat " * 40)
    opened.page.click("#run")
    opened.page.wait_for_selector(".status.wrong")
    assert "32" in opened.page.locator("#status").text_content(), "the limit"
