"""Verbs outside a run, and in the wrong place of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import durable
from durable.errors import NotInWorkflow
from tests.harness.ledger import Ledger

ANYWHERE = {
    "current": durable.current,
    "now": durable.now,
    "uuid4": durable.uuid4,
    "random": durable.random,
    "session": durable.session,
    "idempotency_key": durable.idempotency_key,
    "set_progress": lambda: durable.set_progress(1),
}
IN_STEPS = {"session": durable.session, "idempotency_key": durable.idempotency_key}


@pytest.mark.parametrize("verb", ANYWHERE)
def test_a_verb_outside_a_run_says_where_it_belongs(verb: str) -> None:
    with pytest.raises(NotInWorkflow) as caught:
        ANYWHERE[verb]()
    assert str(caught.value) == (
        f"durable.{verb}() needs a run: call it in a workflow (a task made with @workflow or"
        " base=durable.Workflow), or in a step that a workflow calls"
    )


@pytest.mark.parametrize("verb", IN_STEPS)
def test_a_verb_of_steps_in_a_body_says_why_not(verb: str) -> None:
    call: Callable[[], Any] = IN_STEPS[verb]
    error = Ledger().run(call).error
    assert isinstance(error, NotInWorkflow)
    assert str(error) == (
        f"durable.{verb}() belongs in a step: what the body of a workflow does outside its steps is"
        " done again on every replay"
    )


def test_one_run_does_not_leak_into_what_follows() -> None:
    Ledger().run(durable.current)
    with pytest.raises(NotInWorkflow):
        durable.current()
