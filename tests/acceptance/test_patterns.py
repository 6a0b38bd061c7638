"""The example workflows, as ``docs/patterns.md`` tells them, and their worker killed in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tasks import (
    imports,
    invoices,
    refunds,
    research,
    restock,
    services,
    storefront,
    subscriptions,
    videos,
)
from tests.acceptance.shared import Shared, running
from tests.conftest import WORKERS
from tests.harness import WorkerNode, wait_for
from tests.harness.postgres import PostgresServer

CHILD = "SELECT child_pid FROM durable.workflow_runs WHERE id = %s AND status = 'running'"
CHILDREN = "SELECT count(*) FROM durable.workflow_runs WHERE parent_run_id = %s"
REFUSED = (
    "SELECT count(*) FROM durable.workflow_runs"
    " WHERE status = 'sleeping' AND available_at > now() + interval '10 s' AND id = ANY(%s::uuid[])"
)
TIME_PASSES = """
WITH wait AS (UPDATE durable.step_attempts SET due_at = now()
               WHERE status = 'running' AND workflow_run_id = ANY(%(runs)s::uuid[])),
     breaker AS (UPDATE durable.circuit_breakers SET next_probe_at = now()),
     run AS (UPDATE durable.workflow_runs SET available_at = now()
              WHERE status IN ('sleeping', 'waiting') AND id = ANY(%(runs)s::uuid[]))
SELECT pg_notify('durable', 'default')
"""
SOON = 15


T = TypeVar("T")


@dataclass
class World:
    """What the shop's outside world does, and what it has seen."""

    shared: Shared
    orders: Path
    journal: Path

    @contextmanager
    def ordered(self, what: str, call: str) -> Iterator[None]:
        """Have a call ``hold`` or ``fail``, given by the beginning of its line in the journal."""
        before = self.orders.read_text() if self.orders.exists() else ""
        self.orders.write_text(f"{before}{what}\t{call}\n")
        try:
            yield
        finally:
            self.orders.write_text(before)

    def calls(self, start: str) -> int:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return sum(line.startswith(start) for line in lines)

    def wait_for_call(self, start: str, times: int = 1) -> None:
        wait_for(lambda: self.calls(start) >= times, what=f"call {times} of {start!r}")

    def let_time_pass(self, *run_ids: str) -> None:
        """Bring the end of what these runs wait for, and the next probe of breakers."""
        self.shared.conn.execute(TIME_PASSES, {"runs": list(run_ids)})

    @property
    def worker(self) -> WorkerNode:
        return self.shared.workers[-1]

    def kill_during(self, start: Callable[[], T], *calls: str) -> T:
        """Kill the process that makes a call, before the call comes back; wait for it to be repeated.

        Held before ``start`` is called, which may be faster than the test; returns what it returns.
        """
        before = self.orders.read_text() if self.orders.exists() else ""
        holds = [f"hold\t{call}\n" for call in calls]
        self.orders.write_text(before + "".join(holds))
        try:
            started = start()
            for call in calls:
                self.held.unlink(missing_ok=True)
                self.wait_for_call(call)
                self.worker.kill_child(self._held(call))
                self.wait_for_call(call, times=2)
                holds.pop(0)
                self.orders.write_text(before + "".join(holds))
        finally:
            self.orders.write_text(before)
        return started

    @property
    def held(self) -> Path:
        return self.orders.with_name("held")

    def _held(self, call: str) -> int:
        """The process that makes a call which is held."""

        def process() -> str:
            pid, _, held = (
                self.held.read_text().partition("\t") if self.held.exists() else ("",) * 3
            )
            return pid if held.startswith(call) else ""

        return int(wait_for(process, what=f"call {call!r} to be held"))

    def start_worker(self) -> None:
        self.shared.start_worker(args=("--without-mingle", "--without-gossip"))


@pytest.fixture(scope="module")
def module_world(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("patterns")
    journal = directory / "journal.tsv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOP_JOURNAL", str(journal))
        patch.setattr(services, "take_time", services.take_time)  # the app puts its own there
        with running("tests.apps.patterns", postgres_server, directory) as shared:
            yield World(shared, directory / "orders", journal)


@pytest.fixture
def world(module_world: World, request: pytest.FixtureRequest) -> World:
    request.node.stash[WORKERS] = module_world.shared.workers
    return module_world


# --- the README's


def test_the_workflow_of_the_readme_does_what_it_says(world: World) -> None:
    run = world.shared.module.take_back.delay("o-7", ["mug", "teapot"])
    world.shared.wait_for_status(run.id, "sleeping")
    assert world.calls("mail\tcustomer@example.com: label for o-7") == 1
    assert world.shared.query(CHILD, run.id) is None

    world.let_time_pass(run.id)
    run.send_event("parcel", {"weight": 1.2})
    assert run.get(timeout=SOON) == {"cents": 900}
    assert [world.calls(f"inspect\t{sku}") for sku in ("mug", "teapot")] == [1, 1]


# --- approval


def yes(by: str) -> dict[str, Any]:
    return {"approved": True, "by": by}


def test_the_first_who_is_asked_decides(world: World) -> None:
    run = refunds.refund.delay("r-1", 990)
    world.wait_for_call("mail\tteam-lead@example.com: refund 9.90 of order r-1?")
    world.shared.wait_for_status(run.id, "waiting")
    run.send_event("approval", {"approved": "perhaps"})  # put aside: it does not fit the schema
    run.send_event("approval", yes("ada"))
    assert run.get(timeout=SOON)["approved"] is True
    assert world.calls("refund\tr-1") == 1
    assert world.calls("mail\thead-of-sales@example.com: refund 9.90 of order r-1?") == 0


def test_without_an_answer_the_next_level_is_asked_and_at_last_nothing_is_paid(
    world: World,
) -> None:
    answered = refunds.refund.delay("r-2", 990)
    world.shared.wait_for_status(answered.id, "waiting")
    world.let_time_pass(answered.id)
    world.wait_for_call("mail\thead-of-sales@example.com: refund 9.90 of order r-2?")
    answered.send_event("approval", yes("grace"))
    assert answered.get(timeout=SOON)["by"] == "grace"

    silent = refunds.refund.delay("r-3", 990, patience=0.1)
    nobody = {"approved": False, "by": "nobody answered in time", "refund": None}
    assert silent.get(timeout=SOON) == nobody
    assert world.calls("refund\tr-3") == 0


def test_an_approval_is_asked_for_once_whatever_dies_afterwards(world: World) -> None:
    run = refunds.refund.delay("r-4", 990)
    world.shared.wait_for_status(run.id, "waiting")
    world.let_time_pass(run.id)
    world.wait_for_call("mail\thead-of-sales@example.com: refund 9.90 of order r-4?")
    world.kill_during(lambda: run.send_event("approval", yes("grace")), "refund\tr-4")
    assert run.get(timeout=SOON)["approved"] is True
    assert world.calls("mail\tteam-lead@example.com: refund 9.90 of order r-4?") == 1
    assert world.calls("mail\thead-of-sales@example.com: refund 9.90 of order r-4?") == 1


# --- polling


def test_polling_holds_no_worker_and_ends_with_the_job(world: World) -> None:
    parked = videos.publish_video.delay("v-0", first_pause=3600.0)
    world.shared.wait_for_status(parked.id, "sleeping")
    assert world.shared.query(CHILD, parked.id) is None
    parked.revoke()

    run = videos.publish_video.delay("v-1", first_pause=0.05, longest_pause=0.1)
    assert run.get(timeout=SOON) == "https://videos.example.com/v-1"
    assert [step.name for step in run.steps() if step.kind == "sleep"] == ["sleep"] * 3


def test_polling_ends_with_our_patience(world: World) -> None:
    run = videos.publish_video.delay("v-2", first_pause=0.01, longest_pause=0.01, patience=0.02)
    with pytest.raises(videos.NotEncodedInTime, match=r"of v-2 still runs after 0\.02 s"):
        run.get(timeout=SOON)


def test_a_job_is_started_once_and_looked_at_where_it_was(world: World) -> None:
    before = world.calls("encoding_state")
    run = world.kill_during(
        lambda: videos.publish_video.delay("v-3", first_pause=0.01),
        "mail\teverybody@example.com: watch v-3",
    )
    assert run.get(timeout=SOON) == "https://videos.example.com/v-3"
    assert world.calls("start_encoding\tv-3") == 1
    assert world.calls("encoding_state") == before + 3


# --- batches with progress


def test_batches_report_progress_and_are_imported_once(world: World) -> None:
    run = imports.import_airports.delay(batch_size=1000)
    with world.ordered("hold", "index\tbatch 2"):
        world.wait_for_call("index\tbatch 2")
        assert run.info == {"current": 2000, "total": 3376, "batch": 1}
        world.worker.kill_child(world.shared.query(CHILD, run.id))
        world.wait_for_call("index\tbatch 2", times=2)
    assert run.get(timeout=SOON) == {"rows": 3376, "batches": 4}
    assert world.shared.query("SELECT count(*) FROM demo_airports") == 3376
    assert world.calls("index\tbatch 1") == 1


# --- circuit breaker


def test_a_service_that_is_down_is_spared_until_it_is_back(world: World) -> None:
    query = world.shared.query
    with world.ordered("fail", "exchange_rate\tUSD"):
        runs = [invoices.send_invoice.delay(f"i-{n}", 1000, "USD") for n in range(4)]
        ids = [run.id for run in runs]
        wait_for(lambda: query(REFUSED, ids) == 4, what="all runs to be refused")
    calls = world.calls("exchange_rate\tUSD")
    assert calls in {3, 4}  # the threshold, and the other process's call of that time
    assert invoices.exchange.state == "open"

    def all_sent() -> bool:
        world.let_time_pass(*ids)
        return all(run.ready() for run in runs)

    wait_for(all_sent, what="the service to be found again")
    assert runs[0].get() == {"order_id": "i-0", "amount": "10.80 USD"}
    assert invoices.exchange.state == "closed"
    assert world.calls("exchange_rate\tUSD") == calls + 4


def test_a_rate_is_asked_for_once(world: World) -> None:
    run = world.kill_during(
        lambda: invoices.send_invoice.delay("i-9", 1000, "GBP"),
        "mail\tcustomer@example.com: invoice of i-9: 8.50 GBP",
    )
    assert run.get(timeout=SOON)["amount"] == "8.50 GBP"
    assert world.calls("exchange_rate\tGBP") == 1


# --- graceful degradation


def test_a_page_goes_without_what_cannot_be_had_and_says_so(world: World) -> None:
    with world.ordered("fail", "recommendations\tmug"):
        run = world.kill_during(lambda: storefront.publish_page.delay("mug"), "publish\tmug")
    page = run.get(timeout=SOON)
    assert (page["recommendations"], page["degraded"]) == ([], ["recommendations"])
    assert page["reviews"] == ["Best mug ever."]
    # The failure is recorded too: the replay after the kill did not try again.
    assert [world.calls(f"{part}\tmug") for part in ("price", "reviews", "recommendations")] == [
        1,
        1,
        2,
    ]


def test_a_page_with_everything_is_not_degraded(world: World) -> None:
    page = storefront.publish_page.delay("teapot").get(timeout=SOON)
    assert (page["recommendations"], page["degraded"]) == (["teapot deluxe", "teapot cosy"], [])


# --- parent and child


def test_a_parent_waits_for_its_children_and_not_for_the_detached_one(world: World) -> None:
    with world.ordered("hold", "count_shelves\tsouth"):
        run = restock.restock.delay({"mug": 2, "unicorn": 1}, "south")
        done = run.get(timeout=SOON)
        assert list(done["orders"]) == ["mug"]
        assert done["unavailable"] == {"unicorn": "no supplier has a unicorn"}
        stocktaking = world.shared.app.AsyncResult(done["stocktaking"])
        assert not stocktaking.ready()
    assert stocktaking.get(timeout=SOON) == services._number("south") % 1_000


def test_a_child_that_loses_its_worker_costs_its_step_alone(world: World) -> None:
    run = world.kill_during(
        lambda: restock.restock.delay({"lamp": 5, "rug": 6}, "west"),
        "order_from_supplier\t5 x lamp",
    )
    assert set(run.get(timeout=SOON)["orders"]) == {"lamp", "rug"}
    assert world.shared.query(CHILDREN, run.id) == 3
    assert world.calls("order_from_supplier\t6 x rug") == 1
    assert world.calls("mail\twarehouse@example.com: rug") == 1


# --- idempotency


def test_a_renewal_charges_once_and_counts_once(world: World) -> None:
    taken = world.calls("money taken")
    run = world.kill_during(
        lambda: subscriptions.renew.delay("s-1", 990),
        "charge\ts-1",  # the provider has it, we do not know
        "index\ts-1",  # the row is written, not committed
    )
    done = run.get(timeout=SOON)
    assert done["months"] == 1
    assert world.calls("money taken") == taken + 1
    assert subscriptions.renew.delay("s-1", 990).get(timeout=SOON)["months"] == 2
    assert world.shared.query("SELECT months FROM demo_subscriptions WHERE id = 's-1'") == 2


# --- a model, its tools, and a person


def model_calls(world: World, topic: str) -> dict[str, int]:
    jobs = ["plan", "draft", *(f"research: {topic}: {each}" for each in research.model.QUESTIONS)]
    starts = {job: job if job.startswith("research") else f"{job}: {topic}" for job in jobs}
    return {job: world.calls(f"model\t{start}") for job, start in starts.items()}


def test_an_article_goes_back_and_forth_until_the_editor_is_content(world: World) -> None:
    run = research.write_article.delay("tea", seconds=0.02)
    world.wait_for_call("mail\teditor@example.com: round 1: tea")
    run.send_event("review", {"approved": False, "wish": "more on milk"})
    world.wait_for_call("mail\teditor@example.com: round 2: tea")
    run.send_event("review", {"approved": True})

    article = run.get(timeout=SOON)
    assert (article["published"], article["rounds"]) == (True, 2)
    assert "On tea: history: [tea: history (page 1)] [tea: history (page 2)]" in article["text"]
    assert article["text"].endswith("(amended: more on milk)")
    # Two drafts, and the first one's refusal for the rate limit: nothing else was asked again.
    per_question = {f"research: tea: {each}": 3 for each in research.model.QUESTIONS}
    assert model_calls(world, "tea") == {"plan": 1, "draft": 3, **per_question}


def test_a_silent_editor_ends_it_unpublished(world: World) -> None:
    article = research.write_article.delay("ink", patience=0.05).get(timeout=SOON)
    assert (article["published"], article["rounds"]) == (False, research.MOST_ROUNDS)
    assert world.calls("publish\tink") == 0


def test_no_answer_of_the_model_is_paid_for_twice(world: World) -> None:
    run = world.kill_during(
        lambda: research.write_article.delay("silk"), "read\tsilk: economy (page 2)"
    )
    world.wait_for_call("mail\teditor@example.com: round 1: silk")
    world.shared.wait_for_status(run.id, "waiting")

    world.worker.kill()  # all of it; it is all the same to a run that waits
    run.send_event("review", {"approved": True})
    world.start_worker()

    assert run.get(timeout=SOON)["published"] is True
    per_question = {f"research: silk: {each}": 3 for each in research.model.QUESTIONS}
    assert model_calls(world, "silk") == {"plan": 1, "draft": 2, **per_question}
    assert world.calls("search\tsilk") == 3
    assert world.calls("read\tsilk: economy (page 1)") == 1
    assert world.calls("mail\teditor@example.com: round 1: silk") == 1
    assert world.calls("publish\tsilk") == 1
