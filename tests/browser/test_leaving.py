"""Words that the explorer leaves out: the changes are those of the SDK for the same texts."""

from __future__ import annotations

import pytest
from attnserve_client import Client
from explored import Open
from serving import RunningServer

pytestmark = pytest.mark.browser

SENTENCE = "The buyer assumes all liabilities, and the seller keeps all rights to the plant."


def test_leaving_words_out_equals_the_faithfulness_of_the_sdk(minilm: RunningServer, opener: Open) -> None:
    opened = opener(minilm)
    opened.run(SENTENCE)
    opened.page.click(".token >> text=buyer")
    opened.page.click("text=Leave it out")
    opened.page.wait_for_selector("#leave p")
    with Client(minilm.target) as client:
        wanted = client.faithfulness("minilm", SENTENCE)
    drop = wanted.leave_one_out[wanted.words.index("buyer")]
    sentence = opened.page.locator("#leave p").text_content()
    assert f"is {1 - drop:.3f} instead of 1.000" in sentence
    opened.page.click("text=Leave out each word")
    opened.page.wait_for_selector("#leave table")
    assert f"{wanted.rank_agreement:.2f} (1:" in opened.page.locator("#leave p").text_content()
    rows = opened.page.locator("#leave tr").all()[1:]
    drops = [float(row.locator(".value >> nth=0").text_content()) for row in rows]
    assert drops == [round(float(f"{one:.3f}"), 3) for one in sorted(wanted.leave_one_out, reverse=True)]
    assert opened.page.locator("#leave .dropped").text_content() == SENTENCE
    painted = opened.page.locator("#leave .dropped span").evaluate_all(
        "all => all.map(one => [one.textContent, +one.title.split(' ')[1]])"
    )
    assert painted == [
        [word, float(f"{one:.3f}")] for word, one in zip(wanted.words, wanted.leave_one_out, strict=True)
    ]
    opened.page.click("text=Compare with random words")
    opened.page.wait_for_selector("#leave .figures")
    figures = opened.page.locator("#leave .figures tr").all()[1:]
    shown = [[cell.text_content() for cell in row.locator(".value").all()] for row in figures]
    assert [row[0] for row in shown] == [f"{wanted.comprehensiveness:.3f}", f"{wanted.sufficiency:.3f}"]
    expected = [
        (wanted.random_comprehensiveness, wanted.comprehensiveness_gain),
        (wanted.random_sufficiency, wanted.sufficiency_gain),
    ]
    for row, intervals in zip(shown, expected, strict=True):
        for cell, interval in zip(row[1:], intervals, strict=True):
            mean, low, high = (
                float(part) for part in cell.replace("(", "").replace(")", "").replace("to ", "").split()
            )
            assert low <= mean <= high
            # Other draws of 20: their mean is within twice the width of the interval of these.
            assert abs(mean - interval.mean) <= 2 * (interval.high - interval.low)
    gain = float(shown[0][2].split()[0])
    assert gain == pytest.approx(float(shown[0][0]) - float(shown[0][1].split()[0]), abs=2e-3), "map less random"


def test_label_that_changes_is_named_beside_the_word(tiny: RunningServer, opener: Open) -> None:
    words = ["cat", "sat", "cat", "cat"]
    texts = [" ".join(words), *(" ".join(words[:at] + words[at + 1 :]) for at in range(len(words)))]
    with Client(tiny.target) as client:
        whole, *rest = (each.labels.labels[0] for each in client.infer("classifier", texts, outputs=[], labels=True))
    expected = [
        (word, f"becomes {label.text}" if label.index != whole.index else "same")
        for word, label in zip(words, rest, strict=True)
    ]
    assert {text == "same" for _, text in expected} == {True, False}, "the label depends on some of the words"
    opened = opener(tiny, "#model=classifier")
    opened.run(texts[0])
    opened.page.click(".token:not([hidden]) >> nth=0")
    opened.page.click("text=Leave out each word")
    opened.page.wait_for_selector("#leave table")
    rows = opened.page.locator("#leave tr").all()[1:]
    found = [
        (row.locator("td >> nth=0").text_content().split(" (")[0], row.locator("td >> nth=-1").text_content())
        for row in rows
    ]
    assert sorted(found) == sorted(expected)
    changed = sum(text != "same" for _, text in expected)
    assert f"{changed} of 4 change" in opened.page.locator("#leave p").text_content()
    opened.page.click(".token:not([hidden]) >> nth=0")
    opened.page.click(".token:not([hidden]) >> nth=2")
    opened.page.click("text=Leave it out")
    opened.page.locator("#leave p", has_text="and the label becomes").wait_for()
