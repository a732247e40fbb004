"""The reference of the parity tests: Hugging Face's eager attention, on sentences of mixed lengths.

`references` needs torch and transformers, and a folder of the MiniLM checkpoint. Without them it raises ImportError or
transformers' own error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# float32 sums in another order than torch's, over 384 terms and six layers.
OUTPUT_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-5

SENTENCES = (
    "Yes.",
    "The cat sat on the mat.",
    (
        "The buyer agrees to assume all liabilities, except those specifically excluded in Schedule B, which includes "
        "environmental damages from the 1995 incident."
    ),
    "if processed: result.append(processed)",
    (
        "Patient takes metformin for diabetes, started lisinopril last month for hypertension, and reports occasional "
        "dizziness since then."
    ),
    "Who?",
    "A café in Zürich serves crème brûlée, naïvely priced at 5 € apiece.",
    "Rain fell.",
    "The director said she was excited about the merger, but her tone suggested otherwise.",
    "return [transform(item) for item in items if item.is_valid()]",
    "In 1905 he published four papers, and each of them changed a different part of physics for good.",
    "Never mind.",
    "Section 4.2(b) survives termination of this Agreement for a period of five (5) years.",
    "Unbelievably, antidisestablishmentarianism was spelled correctly by the youngest of the contestants.",
    "Blood pressure 140/90, pulse 72, afebrile; continue current medication and review in two weeks.",
    "Stop the engine, wait for the light, and only then open the second valve by a quarter of a turn; " * 4,
)


@dataclass(frozen=True, slots=True)
class Reference:
    """One sentence's ids (N,), hidden states (N, 384), their mean (384,), and weights (layers, heads, N, N)."""

    text: str
    ids: Array
    last_hidden_state: Array
    embedding: Array
    weights: Array


def references(source: Path) -> list[Reference]:
    """Each sentence alone through the eager model, in float32, without padding."""
    import torch  # noqa: PLC0415 - heavy, and only needed here
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    made = []
    for sentence in SENTENCES:
        encoded = tokenizer(sentence, return_tensors="pt")
        with torch.inference_mode():
            answer = model(**encoded, output_attentions=True)
        hidden = answer.last_hidden_state[0].numpy()
        weights = np.stack([layer[0].numpy() for layer in answer.attentions])
        made.append(Reference(sentence, encoded["input_ids"][0].numpy(), hidden, hidden.mean(axis=0), weights))
    return made
