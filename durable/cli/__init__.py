"""``celery -A proj durable ...``: commands for operators."""

from __future__ import annotations

from typing import Any

import click

from durable.cli.drain import drain

# Celery imports this module at every start of its command line: what the
# commands need is imported by them.


@click.group()
def durable() -> None:
    """Durable workflows: the schema in Postgres, and the runs in it."""


durable.add_command(drain)


@durable.command()
@click.option("--sql", is_flag=True, help="Print the statements instead of running them.")
@click.option("--role", help="Print the rights that this role needs to run workers and clients.")
@click.pass_context
def migrate(ctx: click.Context, *, sql: bool, role: str | None) -> None:
    """Create the schema `durable`, or bring it up to date."""
    from durable.errors import DurableError
    from durable.store import migrate as migrations

    if sql:
        click.echo(migrations.migration_sql())
    if role:
        click.echo(migrations.role_sql(role))
    if sql or role:
        return
    try:
        migrations.migrate(_durable(ctx).database.url)
    except DurableError as exc:
        raise click.ClickException(str(exc)) from None
    click.echo(f"The schema 'durable' is at revision {migrations.HEAD}.")


@durable.command()
@click.option("--dry-run", is_flag=True, help="Count what is to be rewritten, and by which key.")
@click.option("--batch", default=100, show_default=True, type=click.IntRange(1, 10_000))
@click.pass_context
def reencrypt(ctx: click.Context, *, dry_run: bool, batch: int) -> None:
    """Encrypt all that is stored by the first of the keys; workers may go on meanwhile.

    With `durable_encrypt = False` all is made plain again.
    """
    from durable.cli import privacy
    from durable.errors import DurableError

    try:
        privacy.reencrypt(_durable(ctx), dry_run=dry_run, batch=batch)
    except DurableError as exc:
        raise click.ClickException(str(exc)) from None


@durable.command()
@click.argument("run", required=False)
@click.option("--subject", help="Erase all runs that were started with this subject.")
@click.option("--reason", help="Why, for the audit.")
@click.option("--force", is_flag=True, help="Give up what Celery has still to deliver.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def erase(
    ctx: click.Context,
    *,
    run: str | None,
    subject: str | None,
    reason: str | None,
    force: bool,
    yes: bool,
) -> None:
    """Erase the data of an ended RUN, or of a subject, with all child runs.

    Ids, names, statuses and times stay.
    """
    from durable.cli import privacy
    from durable.erasure import Erasure
    from durable.errors import DurableError

    try:
        erasure = Erasure(_durable(ctx), run, subject, force=force)
        privacy.erase(erasure, reason=reason, yes=yes)
    except DurableError as exc:
        raise click.ClickException(str(exc)) from None


def _durable(ctx: click.Context) -> Any:
    app = ctx.obj.app
    found = getattr(app, "durable", None)
    if found is None:
        raise click.ClickException(
            f"the app {app.main!r} has no Durable: put `Durable(app)` beside `app = Celery(...)`"
        )
    return found
