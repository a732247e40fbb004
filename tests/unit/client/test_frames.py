"""Maps as pandas and xarray have them: numbers, names of rows and columns, and what happens without the libraries."""

from __future__ import annotations

import builtins
from collections.abc import Iterator

import numpy as np
import pytest
from attnserve_client import AttentionMap, AttentionSelection, Client
from attnserve_client.testing import FakeServer


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with FakeServer() as server, Client(server.target) as opened:
        yield opened


def map_of(client: Client, **selection: object) -> AttentionMap:
    chosen = AttentionSelection(layers=[-1], unit="word", **selection)
    return client.infer("fake", "a wonderful text", attention=chosen).attention[0]


def test_a_table_has_a_row_for_each_query_and_a_column_for_each_key(client: Client) -> None:
    pytest.importorskip("pandas")
    found = map_of(client, special_tokens="drop")
    table = found.to_pandas(head=2)
    assert list(table.index) == list(table.columns) == ["a", "wonderful", "text"]
    assert (table.index.name, table.columns.name) == ("query", "key")
    np.testing.assert_array_equal(table.to_numpy(), found.weights[2])
    np.testing.assert_array_equal(found.to_pandas().to_numpy(), found.head_weights())
    with pytest.raises(ValueError, match="head 9 is not in this map"):
        found.to_pandas(head=9)


def test_an_array_has_heads_queries_and_keys_with_their_texts(client: Client) -> None:
    pytest.importorskip("xarray")
    found = map_of(client)
    array = found.to_xarray()
    assert array.dims == ("head", "query", "key")
    np.testing.assert_array_equal(array.to_numpy(), found.weights)
    assert array.coords["head"].to_numpy().tolist() == [0, 1, 2, 3]
    assert array.coords["query_text"].to_numpy().tolist() == [token.text for token in found.query_tokens]
    assert (array.attrs["model"], array.attrs["layer"], array.name) == ("fake", 1, "weights")
    chosen = array.sel(head=3, key=2)
    np.testing.assert_array_equal(chosen.to_numpy(), found.weights[3, :, 2])


def test_joined_heads_have_no_numbers_and_dropped_units_keep_their_indices(client: Client) -> None:
    pytest.importorskip("xarray")
    found = map_of(client, heads="mean", special_tokens="drop")
    array = found.to_xarray()
    assert "head" not in array.coords
    assert array.coords["key"].to_numpy().tolist() == [token.index for token in found.key_tokens]


@pytest.mark.parametrize(("name", "method"), [("pandas", "to_pandas"), ("xarray", "to_xarray")])
def test_without_the_library_the_extra_is_named(
    client: Client, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    real = builtins.__import__

    def missing(wanted: str, *rest: object) -> object:
        if wanted == name:
            raise ImportError(wanted)
        return real(wanted, *rest)

    found = map_of(client)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=rf"pip install 'attnserve\[{name}\]'"):
        getattr(found, method)()
