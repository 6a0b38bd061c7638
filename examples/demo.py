"""Two workflows, a worker killed in the middle, and proof that nothing was lost or done twice.

Run it with ``make demo``. Needs no server: Postgres comes from a wheel, and
the broker is a directory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES)]

from demo_evidence import Evidence, Snapshot  # noqa: E402 - found through the path above
from demo_report import Report  # noqa: E402
from demo_worker import Worker, WorkerDied  # noqa: E402

ORDER = "o-42"
PAUSE = 0.25
PATIENCE = 50.0
#: Committed batches and shipped parcels after which the worker is killed.
BATCHES, PARCELS = 5, 1


class DemoFailed(Exception):
    """Something that has to hold did not; the message says what."""


def main() -> int:
    """Run the demo in a process and a directory of its own; 0 when everything held.

    The directory is removed after that process: then nobody uses the embedded
    Postgres in it any more.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep database, journal and logs")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.home:
        return perform(options.home)
    home = Path(tempfile.mkdtemp(prefix="durable-demo-"))
    home.chmod(0o711)  # Postgres does not run as root: if that is us, another user passes here
    with subprocess.Popen([sys.executable, __file__, "--home", str(home)]) as performance:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other one's to handle
        code = performance.wait()
    if code or options.keep:
        print(f"Database, journal and logs are kept in {home}")
    else:
        remove(home)
    return code


def remove(home: Path) -> None:
    """Remove the directory once Postgres has let go of it."""
    server = home / "durable" / "postgres" / "postmaster.pid"
    deadline = time.monotonic() + 15
    while server.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    shutil.rmtree(home, ignore_errors=True)


def perform(home: Path) -> int:
    """Play, and turn what goes wrong into an exit code."""
    report = Report()
    configure(home)
    try:
        play(home, report)
    except (DemoFailed, WorkerDied) as failure:
        report.failure(str(failure))
        return 1
    except KeyboardInterrupt:
        report.say("Stopped.")
        return 130
    return 0


def configure(home: Path) -> None:
    """Point this process and the workers to a place of their own."""
    for name in [name for name in os.environ if name.startswith(("DURABLE_", "CELERY_"))]:
        del os.environ[name]
    os.environ["DURABLE_EMBEDDED_DIR"] = str(home / "durable")
    os.environ["SHOP_JOURNAL"] = str(home / "journal.tsv")
    os.environ["SHOP_PAUSE"] = str(PAUSE)


def play(home: Path, report: Report) -> None:
    """Tell the story from beginning to end."""
    report.title("celery-durable: two workflows survive kill -9")
    report.step("Starting Postgres (embedded, in a temporary directory)")
    from celery_app import app  # it reads the environment
    from tasks.imports import import_airports
    from tasks.orders import fulfil

    with Evidence(app.durable.database.url, home / "journal.tsv") as evidence:
        report.step("Sending two workflows: nobody works on them yet")
        order, load = fulfil.delay(ORDER), import_airports.delay()
        evidence.watch(order=str(order.id), load=str(load.id))
        report.say(f'fulfil.delay("{ORDER}")      run {order.id}')
        report.say(f"import_airports.delay()   run {load.id}")
        with Worker(home / "worker-1.log") as worker:
            report.step(f"Starting a worker: {worker.command}")
            before = kill_in_the_middle(worker, evidence, report)
        with Worker(home / "worker-2.log") as worker:
            report.step("Starting another worker")
            report.say("It takes the two runs over as soon as the dead one counts as dead:")
            report.say("when it has been silent for one lease (10 s by default).")
            wait_for(evidence.ended, worker, evidence, report, what="the end of both runs")
            conclude(evidence, before, report)


def kill_in_the_middle(worker: Worker, evidence: Evidence, report: Report) -> Snapshot:
    """Wait until both runs are half done, and kill the worker and its children."""
    wait_for(
        lambda: (
            evidence.finished("import_batch") >= BATCHES and evidence.finished("ship") >= PARCELS
        ),
        worker,
        evidence,
        report,
        what=f"{BATCHES} imported batches and {PARCELS} shipped parcel",
    )
    worker.kill()
    before = evidence.snapshot()
    report.step("kill -9: the worker and its two children are gone, in the middle of both runs")
    report.say(f"{len(before.finished)} steps were finished; what was under way is lost.")
    if evidence.ended():
        raise DemoFailed("the runs had already ended when the worker was killed")
    return before


def wait_for(
    condition: Callable[[], bool], worker: Worker, evidence: Evidence, report: Report, *, what: str
) -> None:
    """Show progress until the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        report.progress(evidence.progress())
        worker.check()
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {PATIENCE:.0f} s in vain for {what}")
        time.sleep(0.02)
    report.progress(evidence.progress(), last=True)


def conclude(evidence: Evidence, before: Snapshot, report: Report) -> None:
    """Show what happened, and judge it."""
    report.step("What the runs did, from durable.step_attempts")
    for title, timeline in evidence.timelines(before):
        report.timeline(title, timeline)
    failures = evidence.failures()
    if failures:
        raise DemoFailed("; ".join(failures))
    report.step("What the world saw")
    report.effects(evidence.effects())
    report.step("What has to hold")
    checks = evidence.checks(before)
    for holds, claim in checks:
        report.check(claim, holds=holds)
    broken = [claim for holds, claim in checks if not holds]
    if broken:
        raise DemoFailed("did not hold: " + "; ".join(broken))
    report.done()


if __name__ == "__main__":
    sys.exit(main())
