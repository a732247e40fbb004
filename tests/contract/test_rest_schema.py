"""schemathesis sends requests that it generates from the OpenAPI document: none is an internal error.

The answers have the statuses, the media types and the forms that the document states. Each operation gets `EXAMPLES`
requests, valid ones and others, most of which name a model of the server. Needs schemathesis.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from ranking_bundle import write_ranking_repository
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import RunningServer, serve

EXAMPLES = 20
OPERATIONS = 26
MODELS = ("tiny", "tiny", "plain", "ranker", "")
"""Names that replace those of generated requests; the empty one leaves them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    repository = write_ranking_repository(tmp_path_factory.mktemp("ranking"), tmp_path_factory.mktemp("files"))
    flags = ("--isolation", "none", "--instances", "1", "--openai-token-ids")
    with serve(repository, tmp_path_factory.mktemp("server"), *flags) as running:
        yield running


def name_models(case: Any, model: str) -> None:
    """Let a generated request name a model of the server, in its path and in its body."""
    if not model:
        return
    parameters = case.path_parameters
    for place, value in (("name", model), ("version", "1")):
        if parameters and place in parameters:
            parameters[place] = value
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = model


@pytest.mark.slow
@pytest.mark.parametrize("place", range(OPERATIONS))
def test_generated_requests_get_answers_of_the_document(server: RunningServer, place: int) -> None:
    address = f"http://127.0.0.1:{server.rest_port}"
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == OPERATIONS
    operation = operations[place]

    changes = "/repository/models/" in operation.path  # 501, because the server has no --admin
    reached = set()

    @hypothesis.given(case=operation.as_strategy(), model=st.sampled_from(MODELS))
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    def check(case: Any, model: str) -> None:
        name_models(case, model)
        answer = case.call(base_url=address, timeout=60)
        reached.add(answer.status_code)
        for holds in (
            not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
        ):  # fmt: skip
            # 504: a tiny timeout.
            if holds is not not_a_server_error or (answer.status_code != 504 and not changes):
                case.validate_response(answer, checks=[holds])
        assert answer.status_code not in {500, 503}
        assert answer.status_code != 501 or changes
        assert b"Traceback" not in answer.content
        assert b"attnserve_server" not in answer.content

    check()
    wanted = {200} if operation.method.upper() == "GET" else {200, 400, 501}
    assert reached & wanted, f"all requests ended with {reached}"
