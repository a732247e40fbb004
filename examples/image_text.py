"""Print the patch of an image at which each word of a text looks most, for a model of text and images.

A model without attention to patches raises IndexError, and a failed call an AttnserveError.
"""

import argparse
from pathlib import Path

import numpy as np
from attnserve_client import AttentionSelection, Client


def main(server: str, model: str, text: str, pixels: Path) -> None:
    """Select the last site whose keys are image patches, and arrange its weights as in the image.

    A model without such a site raises IndexError, and a failed call an AttnserveError.

    Args:
        server: Address of the server.
        model: A model that takes text and the input `pixel_values`.
        text: The text.
        pixels: A `.npy` file with the preprocessed image, float32 (channels, height, width).
    """
    with Client(server) as client:
        description = client.model(model)
        patches = {axis.symbol for axis in description.axes if axis.grid is not None}
        sites = [each for each in description.sites if each.key_axis in patches and each.query_axis not in patches]
        selection = AttentionSelection(sites=[sites[-1].name], heads="mean")
        result = client.infer(model, (text, {"pixel_values": np.load(pixels)}), outputs=[], attention=selection)
    for panel in result.attention[0].over_patches():
        row, column = np.unravel_index(np.nanargmax(panel.weights), panel.weights.shape)
        print(f"{panel.token.text:12} row {row + 1}, column {column + 1}: {panel.weights[row, column]:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:8001")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--pixels", type=Path, required=True)
    main(**vars(parser.parse_args()))
