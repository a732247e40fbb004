"""The documentation site: which pages it has, and how their links are rewritten. `make check` builds it strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
from doc_scripts import script

site = script("site")
PAGE = Path("docs/how-to/explore.md")


def test_every_page_is_in_the_navigation() -> None:
    pages = {str(page.with_name("index.md") if page.name == "README.md" else page) for page in site.pages()}
    assert len(pages) > 50
    assert pages == site.listed()


@pytest.mark.parametrize(
    ("link", "target", "shown"),
    [
        ("https://example.org/README.md", "https://example.org/README.md", None),
        ("#read-it", "#read-it", None),
        ("call-from-python.md#get-labels", "call-from-python.md#get-labels", None),
        ("../../README.md#start", "../../index.md#start", None),
        ("../pictures/explorer-light.png", "../pictures/explorer-light.png", None),
        ("../../Makefile", "../../Makefile.md", "Makefile"),
        ("../../.github/workflows/ci.yml", "../../github/workflows/ci.yml.md", ".github/workflows/ci.yml"),
        ("../../examples/", "../../examples/index.md", "examples"),
    ],
)
def test_links_lead_to_pages_of_the_site(link: str, target: str, shown: str | None) -> None:
    found: set[Path] = set()
    assert site.target(PAGE, link, found) == target
    assert found == ({Path(shown)} if shown else set())


@pytest.mark.parametrize("link", ["none.md", "../../../outside.md"])
def test_link_to_no_file_is_refused(link: str) -> None:
    with pytest.raises(site.Broken, match=r"docs/how-to/explore\.md: .* leads to no file"):
        site.target(PAGE, link, set())


def test_code_keeps_its_brackets() -> None:
    text = "[a](../README.md)\n\n```python\nx = y[0](none)\n```\n\n[b](../README.md)\n"
    made = "".join(site.rewritten(PAGE, text, set()))
    assert made == text.replace("README.md", "index.md")


def test_what_a_page_loads_from_elsewhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "HTML", tmp_path)
    (tmp_path / "good.html").write_text('<a href="https://example.org">x</a><script src="a.js"></script>', "utf-8")
    assert site.loaded() == []
    (tmp_path / "bad.html").write_text('<link rel="stylesheet" href="https://example.org/a.css">', "utf-8")
    (tmp_path / "worse.html").write_text("<script defer src=//example.org/a.js></script>", "utf-8")
    (tmp_path / "bad.css").write_text("@font-face{src:url(https://example.org/f.woff2)}", "utf-8")
    assert site.loaded() == [
        "bad.css: https://example.org/f.woff2",
        "bad.html: https://example.org/a.css",
        "worse.html: //example.org/a.js",
    ]
