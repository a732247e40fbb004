#!/usr/bin/env bash
# CircuitsVis hides every weight above the diagonal unless mask_upper_tri=False, and attention_patterns cannot show them.
#
# Versions: circuitsvis 1.43.3, torch 2.13.0.
# Source: https://github.com/TransformerLensOrg/CircuitsVis, the parameter mask_upper_tri of attention_heads and
# attention_pattern: "Should be true for causal attention, false for bidirectional attention".
# Expected by most: a parameter whose default is None changes nothing, and all weights that are passed are drawn.
# Observed: None is left out of the properties of the component, whose own default is true. The weights of an encoder
# above the diagonal are sent to the page and not drawn: half of a map of BERT is blank, without a message.
# attention_patterns has no such parameter, so that it never shows them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps circuitsvis==1.43.3
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 importlib-metadata==10.2.0
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import inspect
import re
from pathlib import Path

import circuitsvis
import numpy as np
from circuitsvis.attention import attention_heads, attention_patterns

tokens, weights = ["a", "dog"], np.array([[[0.25, 0.75], [0.5, 0.5]]])
shown = attention_heads(weights, tokens).local_src
assert "0.75" in shown, "the control: the weight above the diagonal is in the page"
stated = {
    "default": re.findall(r'"maskUpperTri": \w+', shown),
    "False": re.findall(r'"maskUpperTri": \w+', attention_heads(weights, tokens, mask_upper_tri=False).local_src),
}
script = (Path(circuitsvis.__file__).parent / "dist/cdn/iife.js").read_text(encoding="utf-8")
defaults = re.findall(r"maskUpperTri:\w+=(![01])", script)
print(f"the page states {stated['default'] or 'nothing'} by default, {stated['False']} with False")
print(f"the defaults of its two components: {['true' if each == '!0' else 'false' for each in defaults]}")
assert stated == {"default": [], "False": ['"maskUpperTri": false']}, "the control: False is passed on"
assert "mask_upper_tri" not in inspect.signature(attention_patterns).parameters
if defaults != ["!0", "!0"]:
    raise SystemExit("nothing is hidden by default: the behaviour is no longer there")
PYTHON
