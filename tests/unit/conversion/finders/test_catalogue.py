"""Every attention operator of the installed onnx and onnxruntime is found, listed or refused, each with its reason.

A release of either library that adds an attention operator fails here, until one of the catalogue's tables has it.
`refuse_without_kernel` raises BuildRefused for operators that the runtime cannot run.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx.defs
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.convert import PrepareRequest, prepare_bundle
from attnserve_server.conversion.finders.catalogue import (
    FOUND,
    PARTS,
    UNTAPPED,
    WITHOUT_KERNEL,
    refuse_without_kernel,
)
from attnserve_server.conversion.graphs.operators import OPSETS
from microsoft_graphs import MultiHead
from onnxruntime.capi import _pybind_state as runtime

ATTENTION = re.compile(r"attention|attn|delta ?net|mamba", re.IGNORECASE)
TABLES = (FOUND, UNTAPPED, WITHOUT_KERNEL, PARTS)


def schemas() -> set[tuple[str, str]]:
    """Return the operators of both libraries whose name or document mentions attention, by domain and name."""
    every = [*onnx.defs.get_all_schemas_with_history(), *runtime.get_all_operator_schema()]
    return {(each.domain, each.name) for each in every if ATTENTION.search(f"{each.name} {each.doc or ''}")}


def test_every_attention_operator_is_in_one_table() -> None:
    # A new release of either library fails here: add its operators to the table that they belong to.
    known = [key for table in TABLES for key in table]
    assert len(known) == len(set(known))
    assert schemas() - set(known) == set()
    assert set(known) - schemas() == set()


def test_operators_without_a_kernel_are_those_that_the_runtime_cannot_run() -> None:
    kernels = {(each.domain, each.op_name) for each in runtime.get_all_opkernel_def()}
    assert {key for key in WITHOUT_KERNEL if key in kernels} == set()
    # These two have a definition, which the runtime or the conversion writes out.
    written_out = {("", "LinearAttention"), ("ai.onnx.preview", "FlexAttention")}
    assert {key for key in (*FOUND, *UNTAPPED) if key not in kernels} == written_out


def test_newest_opset_with_an_attention_operator_is_supported() -> None:
    versions = [each.since_version for each in onnx.defs.get_all_schemas_with_history() if not each.domain]
    assert max(versions) <= OPSETS[1] == 28


@pytest.mark.parametrize("operator", [name for domain, name in WITHOUT_KERNEL if domain])
def test_operator_without_a_kernel_is_refused_by_name(operator: str) -> None:
    model = MultiHead().model()
    model.graph.node[0].op_type = operator
    with pytest.raises(BuildRefused, match=f"uses com.microsoft.{operator}: .*no kernel for it on the CPU; export"):
        refuse_without_kernel(model, "model.onnx")


def test_file_with_an_operator_without_a_kernel_is_refused_before_it_runs(tmp_path: Path) -> None:
    model = MultiHead().model()
    model.graph.node[0].op_type = "PackedMultiHeadAttention"
    onnx.save(model, tmp_path / "packed.onnx")
    with pytest.raises(BuildRefused, match=r"packed\.onnx uses com\.microsoft\.PackedMultiHeadAttention"):
        prepare_bundle(PrepareRequest(name="packed", repository=tmp_path / "models", file=tmp_path / "packed.onnx"))
