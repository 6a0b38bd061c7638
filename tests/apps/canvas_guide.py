"""The examples of "Canvas: Designing Work-flows" in Celery's user guide, of durable tasks.

Each is a function that a client can call, and the body of a workflow too.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Celery, chain, chord, group, signature
from celery.canvas import StampingVisitor

import durable
from durable import Durable, Workflow
from tests.apps import settings_from_environment

settings = settings_from_environment()
TRACE = Path(settings.pop("trace", os.devnull))

app = Celery("guide")
app.conf.update(settings)
Durable(app)
task = functools.partial(app.task, shared=False, base=Workflow)


def note(run_id: str | None, what: str, value: object = None) -> None:
    """Write a line, in one write, so that processes do not mix theirs."""
    with TRACE.open("a") as file:
        file.write(json.dumps([run_id, what, value], default=repr) + "\n")


@task()
def add(x: int, y: int, debug: bool = False) -> int:
    durable.sleep(0.01)
    return -(x + y) if debug else x + y


@task()
def mul(x: int, y: int) -> int:
    return x * y


@task()
def xsum(numbers: list[int]) -> int:
    return sum(numbers)


@task()
def raising_task() -> None:
    raise ValueError("something something")


@task(bind=True)
def log_result(self: Any, *result: Any) -> Any:
    note(self.request.root_id, "log_result", result)
    return result


@task()
def log_error(task_id: str) -> None:
    result = app.AsyncResult(task_id)
    note(task_id, "log_error", [str(result.result), "ValueError" in str(result.traceback)])


@app.task(shared=False)
def on_chord_error(request: Any, exc: BaseException, traceback: str) -> None:
    note(request.id, "on_chord_error", repr(exc))


@task(bind=True)
def create_user(self: Any, username: str, **names: str) -> str:
    return f"{username} {names['first']} {names['last']}"


@task()
def import_contacts(user: str) -> str:
    return f"contacts of {user}"


@task()
def send_welcome_email(user: str) -> str:
    return f"welcome {user}"


@task()
def notify_complete(import_id: str) -> str:
    return f"{import_id} is complete"


@task(bind=True)
def stamps_of(self: Any, *_: Any) -> Any:
    request = self.request
    return {key: request.stamps[key] for key in sorted(request.stamped_headers or ())}


class MonitoringIdStampingVisitor(StampingVisitor):  # type: ignore[misc]
    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"monitoring_id": "m-1", "stamped_headers": ["monitoring_id"]}


EXAMPLES: dict[str, tuple[Callable[[], Any], Any]] = {}


def gives(expected: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Note what an example is documented to return."""

    def note_example(example: Callable[[], Any]) -> Callable[[], Any]:
        EXAMPLES[example.__name__] = example, expected
        return example

    return note_example


@task()
def in_a_body(example: str) -> Any:
    return EXAMPLES[example][0]()


# --- signatures


@gives([4, 4, 4, 4, 4])
def calling_signatures() -> Any:
    results = [
        signature(add.name, args=(2, 2), countdown=0.05, app=app).apply_async(),
        add.signature((2, 2)).delay(),
        add.s(2, 2).apply_async(countdown=0.05),
        add.s(2, 2).set(countdown=0.05).delay(),
    ]
    return [result.get() for result in results] + [(~add.s(2, 2))]


@gives([6, 6, -4, -4, 4, -6])
def partials() -> Any:
    partial, whole = add.s(2), add.s(2, 2)
    return [
        partial.delay(4).get(),
        partial.apply_async((4,)).get(),
        whole.delay(debug=True).get(),
        whole.apply_async(kwargs={"debug": True}).get(),
        add.signature((2, 2), countdown=60).apply_async(countdown=0.05).get(),
        add.s(2).clone(args=(4,), kwargs={"debug": True}).delay().get(),
    ]


@gives([4, 4, 4])
def callbacks() -> Any:
    return [
        add.apply_async((2, 2), link=add.s(8)).get(),
        add.apply_async((2, 2), link=log_result.si()).get(),
        add.apply_async((2, 2), link=log_result.signature(immutable=True)).get(),
    ]


# --- the primitives


@gives([16, 16])
def simple_chain() -> Any:
    return [
        chain(add.s(2, 2), add.s(4), add.s(8))().get(),
        (add.s(2, 2) | add.s(4) | add.s(8))().get(),
    ]


@gives([16, 8, 4])
def immutable_signatures() -> Any:
    # The guide has add.s(8, 8) last, which would be given three numbers.
    result = (add.si(2, 2) | add.si(4, 4) | add.si(8, 8))()
    return [result.get(), result.parent.get(), result.parent.parent.get()]


@gives([0, 2, 4, 6, 8, 10, 12, 14, 16, 18])
def simple_group() -> Any:
    return group(add.s(i, i) for i in range(10))().get(timeout=30)


@gives(90)
def simple_chord() -> Any:
    return chord((add.s(i, i) for i in range(10)), xsum.s())().get()


@gives("i-1 is complete")
def chord_with_an_immutable_body() -> Any:
    return chord((import_contacts.s(c) for c in "ab"), notify_complete.si("i-1"))().get()


@gives([160, 352])
def combined_chains() -> Any:
    first = add.s(4) | mul.s(8)
    second = add.s(4, 16) | mul.s(2) | (add.s(4) | mul.s(8))
    return [first(16).get(), second().get()]


@gives(90)
def a_group_in_a_chain_becomes_a_chord() -> Any:
    return (group(add.s(i, i) for i in range(10)) | xsum.s())().get()


@gives(["contacts of artv Art Vandelay", "welcome artv Art Vandelay"])
def a_result_is_forwarded_to_a_group() -> Any:
    flow = create_user.s() | group(import_contacts.s(), send_welcome_email.s())
    return flow.delay(username="artv", first="Art", last="Vandelay").get()


@gives([[0, 2, 4, 6, 8, 10, 12, 14, 16, 18], 8])
def a_group_of_immutable_signatures() -> Any:
    result = (add.s(4, 4) | group(add.si(i, i) for i in range(10)))()
    return [result.get(), result.parent.get()]


# --- chains


@gives([640, 64, 8])
def parents_in_a_chain() -> Any:
    result = chain(add.s(4, 4), mul.s(8), mul.s(10))()
    return [result.get(), result.parent.get(), result.parent.parent.get()]


@gives(320)
def a_chain_by_pipes() -> Any:
    return (add.s(2, 2) | mul.s(8) | mul.s(10)).apply_async().get()


@gives(4)
def several_links() -> Any:
    linked = add.s(2, 2)
    linked.link(mul.s(4))
    linked.link(log_result.s())
    return linked.delay().get()


# --- groups


@gives([[4, 8], [4, 8, 16, 32, 64], [4, 8, 16, 32, 64]])
def group_results() -> Any:
    result = group([add.s(n, n) for n in (2, 4, 8, 16, 32)]).apply_async()
    return [group(add.s(2, 2), add.s(4, 4))().get(), result.get(), result.join()]


@gives([[2, 4], 6, [7, 12]])
def groups_in_groups_and_chains() -> Any:
    nested = group(group(add.s(1, 1)), group(add.s(2, 2)))
    return [
        nested().get(),
        chain(group(add.s(1, 1), add.s(2, 2)), xsum.s()).delay().get(),
        chain(add.s(1, 2), group(add.s(4), mul.s(4))).delay().get(),
    ]


@gives([13, [9, 81]])
def chains_of_groups() -> Any:
    """Each group that something follows is a chord; the last one is a group."""
    flow = group(add.s(1, 1), add.s(2, 2)) | xsum.s() | group(add.s(3), mul.s(13)) | xsum.s()
    ends_in_group = group(add.s(1, 1), add.s(3, 4)) | xsum.s() | group(add.si(4, 5), mul.s(9))
    return [flow().get() - 74, ends_in_group().get()]


# --- chords


@gives([380, 380])
def chord_of_twenty() -> Any:
    header = [add.s(i, i) for i in range(20)]
    return [chord(add.s(i, i) for i in range(20))(xsum.s()).get(), chord(header)(xsum.s()).get()]


@gives([24, 24])
def nested_chords() -> Any:
    inner = chord([add.s(1, 1), add.s(2, 2)], xsum.s())
    outer = chord([inner, chain(add.s(3, 3), mul.s(2))], xsum.s())
    deep = chord([add.s(1, 1)], chord([xsum.s(), xsum.s()], xsum.s()))
    return [outer().get() + 6, deep().get() + 20]


# --- map, starmap, chunks


@gives([[45, 4950], [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]])
def map_and_starmap() -> Any:
    return [
        ~xsum.map([list(range(10)), list(range(100))]),
        ~add.starmap(zip(range(10), range(10), strict=True)),
    ]


@gives([[0, 2], [2, 4]])
def starmaps_in_a_group() -> Any:
    maps = (add.starmap([(n, n), (n + 1, n + 1)]) for n in range(2))
    return group(maps).apply_async(countdown=0.05).get()


@gives([[[2 * n for n in range(10 * part, 10 * part + 10)] for part in range(10)]] * 2)
def chunks() -> Any:
    numbers = [(n, n) for n in range(100)]
    return [
        add.chunks(numbers, 10)().get(),
        add.chunks(numbers, 10).group().skew(0, 0.1, 0.01)().get(),
    ]


# --- stamping


@gives([{"stamp": "your value"}, [{"monitoring_id": "m-1"}] * 2, {"monitoring_id": "m-1"}])
def stamping() -> Any:
    one = stamps_of.s()
    one.stamp(stamp="your value")
    many = group(stamps_of.s(), stamps_of.s())
    many.stamp(visitor=MonitoringIdStampingVisitor())
    line = chain(add.s(1, 1), stamps_of.s())
    line.stamp(MonitoringIdStampingVisitor())
    return [one.delay().get(), many().get(), line().get()]
