"""What the positions along one axis of a sequence stand for: tokens, patches of an image, or only positions."""

from __future__ import annotations

import numpy as np

from attnserve_server.domain.values import AxisUnits
from attnserve_server.model.manifest import NUMPY_DTYPES, AxisSpec, InputRole, Manifest
from attnserve_server.transport.intake import Inputs, Intake


def axis_units(axis: str, inputs: Inputs, intake: Intake, *, words: bool) -> AxisUnits:
    """The units along an axis, as far as the model, its tokenizer and what the caller sent tell them.

    `words`: whether those of token ids are wanted; of text they are known anyway.
    """
    if axis in inputs.units:
        return inputs.units[axis]
    text = intake.manifest.text
    ids = intake.manifest.input_of_role(InputRole.TOKEN_IDS, axis)
    if intake.tokenizer and ids and text and axis in text.axes:
        return intake.tokenizer.units_of_ids(inputs.tensors[ids.name], axis, words=words)
    spec = intake.manifest.axis(axis)
    if spec.grid is not None:
        return patch_units(spec)
    length = inputs.lengths[axis]
    if text is not None and _holds_no_text(spec, intake.manifest):
        # So that words can be asked of the other side of cross-attention.
        return AxisUnits(axis=axis, length=length, special=(False,) * length, word_ids=(-1,) * length)
    return AxisUnits(axis=axis, length=length)


def patch_units(spec: AxisSpec) -> AxisUnits:
    """The patches of an image, row by row, named after their places; what leads them counts as special."""
    assert spec.grid is not None
    rows, columns = spec.grid
    leading = tuple(f"[{position}]" for position in range(spec.leading))
    patches = tuple(f"r{row} c{column}" for row in range(1, rows + 1) for column in range(1, columns + 1))
    return AxisUnits(
        axis=spec.symbol,
        length=spec.max_length,
        texts=leading + patches,
        special=(True,) * len(leading) + (False,) * len(patches),
        word_ids=(-1,) * spec.max_length,
        grid=spec.grid,
        leading=spec.leading,
    )


def _holds_no_text(spec: AxisSpec, manifest: Manifest) -> bool:
    """Whether an axis is fixed, or that of features: of audio frames, say."""
    return spec.fixed or any(
        spec.symbol in given.shape and np.issubdtype(NUMPY_DTYPES[given.dtype], np.floating)
        for given in manifest.inputs
    )
