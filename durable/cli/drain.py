"""``celery -A proj durable drain``: wait until runs have ended, before code goes away."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from durable.store.code import Unfinished


@click.command()
@click.option("--name", "names", multiple=True, help="Workflow to wait for; may be repeated.")
@click.option("--version", "versions", multiple=True, help="Only runs of this version; likewise.")
@click.option("--timeout", help='Give up after so long, such as "30m"; the exit code is then 1.')
@click.option("--interval", default="2s", show_default=True, help="Pause between two looks.")
@click.pass_context
def drain(
    ctx: click.Context,
    *,
    names: tuple[str, ...],
    versions: tuple[str, ...],
    timeout: str | None,
    interval: str,
) -> None:
    """Wait until no unfinished run is left: of all workflows, or of those named.

    Starts and stops nothing: workers that have the code must be there, and new
    runs must not come in. Prints a line whenever the numbers change.
    """
    from durable.cli import _durable
    from durable.durations import parse_seconds
    from durable.errors import DurableError
    from durable.store import code

    durable = _durable(ctx)
    try:
        patience = None if timeout is None else parse_seconds(timeout, name="--timeout")
        pause = parse_seconds(interval, name="--interval")
        started, told = time.monotonic(), ""
        while True:
            left = durable.database.call(
                code.unfinished, durable.settings.namespace, names, versions
            )
            if not left.total:
                click.echo("No unfinished run is left.")
                return
            if (line := _line(left)) != told:
                click.echo(line)
                told = line
            waited = time.monotonic() - started
            if patience is not None and waited >= patience:
                raise click.ClickException(
                    f"{left.total} runs are left after {timeout}.{_hint(left)}"
                )
            durable.clock.sleep(pause if patience is None else min(pause, patience - waited))
    except DurableError as exc:
        raise click.ClickException(str(exc)) from None


def _line(left: Unfinished) -> str:
    parts: dict[str, Any] = {
        "ready or running": left.active,
        "sleeping or waiting": left.parked,
        "paused": left.paused,
        "telling Celery": left.delivering,
    }
    what = ", ".join(f"{number} {name}" for name, number in parts.items() if number)
    return f"{left.total} runs are left: {what}.{_hint(left)}"


def _hint(left: Unfinished) -> str:
    hint = ""
    if left.paused:
        hint += " Paused runs wait for a person: see their `reason`."
    if left.lacking:
        hint += f" {left.lacking} lack a worker that has their code."
    return hint
