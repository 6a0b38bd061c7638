"""``durable reencrypt`` and ``durable erase``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from durable.erasure import Erasure

_MOST_SHOWN = 20


def reencrypt(durable: Any, *, dry_run: bool, batch: int) -> None:
    """Re-encrypt, or count what there is to do."""
    from durable.reencryption import Reencryption

    work = Reencryption(durable, batch=batch)
    if dry_run:
        _show_stale(work.stale())
        return
    with click.progressbar(length=work.size(), label="Re-encrypting") as bar:
        report = work.run(bar.update)
    click.echo(f"{report.rewritten} values rewritten.")
    for where, why in report.unreadable.items():
        click.echo(f"Unreadable: {where}: {why}", err=True)
    if report.missed or report.unreadable_count:
        raise click.ClickException(
            f"{report.missed} values were being written by others each time, and"
            f" {report.unreadable_count} could not be read: run it again when all processes have"
            " the new keys"
        )


def _show_stale(stale: Any) -> None:
    for key, count in sorted(stale.items()):
        made = "plain" if key == "plain" else f"encrypted by key {key}"
        click.echo(f"{count} values are {made}")
    click.echo(f"{sum(stale.values())} values are to be rewritten.")


def erase(erasure: Erasure, *, reason: str | None, yes: bool) -> None:
    """Show what is to be erased, ask, and erase it."""
    left = [run for run in erasure.preview() if not run.erased]
    if not left:
        click.echo("It was erased before.")
        return
    for run in left[:_MOST_SHOWN]:
        click.echo(f"{run.id}  {run.name}  {run.status}")
    if len(left) > _MOST_SHOWN:
        click.echo(f"... and {len(left) - _MOST_SHOWN} more")
    if not yes:
        click.confirm(f"Erase the data of {_runs(len(left))}, for good?", abort=True)
    click.echo(f"The data of {_runs(len(erasure.run(reason=reason)))} was erased.")


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"
