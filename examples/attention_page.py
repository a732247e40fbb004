"""Write the attention between the words of a text as an interactive HTML page, and print the strongest links.

The model must take text and have attention sites; a failed call raises an AttnserveError.
"""

import argparse
from pathlib import Path

from attnserve_client import AttentionSelection, Client

LAST_LAYER = AttentionSelection(layers=[-1], heads="mean", unit="word", special_tokens="drop")


def main(server: str, model: str, text: str, output: Path) -> None:
    """Request the last layer by word, mean over its heads; the page loads nothing, so it can be sent as one file."""
    with Client(server) as client:
        (attention,) = client.infer(model, text, outputs=[], attention=LAST_LAYER).attention
    output.write_text(attention.to_html(), encoding="utf-8")
    for link in attention.links(top=5):
        print(f"{link.query} looks at {link.key}: {link.weight:.2f}")
    print(f"wrote {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--text", default="The buyer agrees to assume all liabilities.")
    parser.add_argument("--output", type=Path, default=Path("map.html"))
    main(**vars(parser.parse_args()))
