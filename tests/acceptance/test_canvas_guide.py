"""The examples of Celery's guide to canvas do what the guide says, with durable tasks."""

from __future__ import annotations

from collections.abc import Iterator

import celery.exceptions
import pytest
from celery import chord

from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS
from tests.harness import wait_for
from tests.harness.postgres import PostgresServer

EXAMPLES = (
    "calling_signatures",
    "partials",
    "callbacks",
    "simple_chain",
    "immutable_signatures",
    "simple_group",
    "simple_chord",
    "chord_with_an_immutable_body",
    "combined_chains",
    "a_group_in_a_chain_becomes_a_chord",
    "a_result_is_forwarded_to_a_group",
    "a_group_of_immutable_signatures",
    "parents_in_a_chain",
    "a_chain_by_pipes",
    "several_links",
    "group_results",
    "groups_in_groups_and_chains",
    "chains_of_groups",
    "chord_of_twenty",
    "nested_chords",
    "map_and_starmap",
    "starmaps_in_a_group",
    "chunks",
    "stamping",
)


@pytest.fixture(scope="module")
def module_shared(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("guide")
    with running("tests.apps.canvas_guide", postgres_server, directory, backend=True) as shared:
        assert tuple(shared.module.EXAMPLES) == EXAMPLES
        yield shared


@pytest.fixture
def shared(module_shared: Shared, request: pytest.FixtureRequest) -> Shared:
    request.node.stash[WORKERS] = module_shared.workers
    return module_shared


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_guide(shared: Shared, example: str) -> None:
    run, expected = shared.module.EXAMPLES[example]
    assert run() == expected


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_guide_in_the_body_of_a_workflow(shared: Shared, example: str) -> None:
    run = shared.module.in_a_body.delay(example)
    assert run.get(timeout=30) == shared.module.EXAMPLES[example][1]


def test_callbacks_get_the_result(shared: Shared) -> None:
    module = shared.module
    result = module.add.apply_async((2, 2), link=module.mul.s(16))
    assert result.get(timeout=20) == 4
    [child] = wait_for(lambda: result.children, what="the callback in the result backend")
    assert child.get(timeout=20) == 64
    assert [value for _, value in result.collect()] == [4, 64]


def test_several_callbacks(shared: Shared) -> None:
    module = shared.module
    signature = module.add.s(2, 2)
    signature.link(module.log_result.s())
    signature.link(module.log_result.si("immutable"))
    result = signature.delay()
    wait_for(
        lambda: sorted(map(str, shared.notes(result.id, "log_result"))) == ["['immutable']", "[4]"],
        what="both callbacks",
    )


def test_error_callbacks_get_the_id(shared: Shared) -> None:
    module = shared.module
    result = module.raising_task.apply_async(link_error=module.log_error.s())
    assert shared.wait_for_note(result.id, "log_error") == ["something something", True]


def test_the_errors_of_a_chord(shared: Shared) -> None:
    module = shared.module
    header = [module.add.s(4, 4), module.raising_task.s(), module.add.s(8, 8)]
    result = chord(header, module.xsum.s().on_error(module.on_chord_error.s()))()
    with pytest.raises(
        celery.exceptions.ChordError, match=r"Dependency .* raised ValueError\('something"
    ):
        result.get(timeout=20, follow_parents=False)
    assert "ChordError" in shared.wait_for_note(result.id, "on_chord_error")
    third = result.parent[2]
    assert third.get(timeout=20) == 16, "the rest of the header is executed all the same"


def test_a_group_tells_how_far_it_is(shared: Shared) -> None:
    from celery import group

    result = group([shared.module.add.s(n, n) for n in range(5)]).apply_async()
    wait_for(result.ready, what="the group to be ready")
    assert result.successful()
    assert not result.failed()
    assert not result.waiting()
    assert result.completed_count() == 5
