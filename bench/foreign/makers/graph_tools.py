"""Makes ONNX files by tools that rewrite a graph: simplifiers, optimizers, a converter to float16, and quantizers.

`python graph_tools.py FOLDER [--short]` writes a case for each tool and model: the file, its inputs and, for tools that
do not round, the answers and attention weights of the model in torch. `bench.foreign` serves and compares them. All run
in this project's environment. A tool that fails makes a case without a file, which states the error. A case that FOLDER
already has raises FileExistsError, and a tool whose package is not installed PackageNotFoundError; both end the script.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cases import Cases, quiet
from models import Tiny, bert, gpt2, vit

Rewrite = Callable[[Path, Path, Tiny], None]


def slim(source: Path, target: Path, _: Tiny) -> None:
    """Simplify by onnxslim."""
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def simplified(source: Path, target: Path, _: Tiny) -> None:
    """Simplify by onnxsim."""
    import onnxsim

    model, same = onnxsim.simplify(onnx.load(source))
    if not same:
        raise ValueError("the simplified file answers differently")
    onnx.save(model, target)


def optimized(source: Path, target: Path, _: Tiny) -> None:
    """Run every pass of onnxoptimizer that fuses or eliminates."""
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(source), onnxoptimizer.get_fuse_and_elimination_passes()), target)


def half(source: Path, target: Path, _: Tiny) -> None:
    """Convert to float16 by onnxconverter-common, with inputs and outputs in float32."""
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(source), keep_io_types=True), target)


def dynamic(source: Path, target: Path, _: Tiny) -> None:
    """Quantize dynamically."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})


def static(form: str, activations: str) -> Rewrite:
    """Return a static quantization: `form` QDQ or QOperator, `activations` QInt8 or QUInt8, with int8 weights."""

    def run(source: Path, target: Path, tiny: Tiny) -> None:
        from onnxruntime import quantization

        quantization.quantize_static(
            source,
            target,
            _Reader(tiny),
            quant_format=quantization.QuantFormat[form],
            activation_type=quantization.QuantType[activations],
            weight_type=quantization.QuantType.QInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )

    return run


def four_bits(source: Path, target: Path, _: Tiny) -> None:
    """Quantize the weights of products to 4 bits: MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=16, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)


class _Reader:
    """Calibration data: the model's own sequences, one at a time."""

    def __init__(self, tiny: Tiny) -> None:
        self._rows: Iterator[Any] = iter(tiny.sequences)

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        row = next(self._rows, None)
        return None if row is None else {name: array[None] for name, array in row.items()}

    def set_range(self, start_index: int, end_index: int) -> None:
        """Take no range: the data is small."""


EXACT: tuple[tuple[str, str, Rewrite], ...] = (
    ("onnxslim", "onnxslim", slim),
    ("onnxsim", "onnxsim", simplified),
    ("onnxoptimizer", "onnxoptimizer", optimized),
)
"""Tools whose files must answer as the model does."""
ROUNDED: tuple[tuple[str, str, Rewrite], ...] = (
    ("onnxconverter-common float16", "onnxconverter-common", half),
    ("quantize_dynamic", "onnxruntime", dynamic),
    ("quantize_static QDQ U8S8", "onnxruntime", static("QDQ", "QUInt8")),
    ("quantize_static QDQ S8S8", "onnxruntime", static("QDQ", "QInt8")),
    ("quantize_static QOperator", "onnxruntime", static("QOperator", "QUInt8")),
    ("MatMulNBits", "onnxruntime", four_bits),
)
"""Tools whose files round: their own answers are the reference."""
SHORT = {"BERT"}
"""The models of the short run, with every tool; other models are made by the first tool alone."""


def make(cases: Cases, *, short: bool) -> None:
    """Write every case."""
    for build in (bert, gpt2, vit):
        tiny = build()
        outputs, weights = tiny.answers()
        plain = tiny.export(cases.folder / f"{tiny.name}.onnx")
        for tool, package, rewrite in (*EXACT, *ROUNDED):
            exact = (tool, package, rewrite) in EXACT
            if short and tiny.name not in SHORT and tool != EXACT[0][0]:
                continue

            def write(place: Path, rewrite: Rewrite = rewrite, plain: Path = plain, tiny: Tiny = tiny) -> Path:
                target = place / "model.onnx"
                with quiet():
                    rewrite(plain, target, tiny)
                return target

            cases.add(
                tool,
                package,
                tiny.name,
                write,
                tiny.sequences,
                outputs=outputs if exact else (),
                weights=weights if exact else (),
                sites=tiny.layers,
            )
        plain.unlink()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    make(Cases(options.folder), short=options.short)


if __name__ == "__main__":
    main()
