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


def _durable(ctx: click.Context) -> Any:
    app = ctx.obj.app
    found = getattr(app, "durable", None)
    if found is None:
        raise click.ClickException(
            f"the app {app.main!r} has no Durable: put `Durable(app)` beside `app = Celery(...)`"
        )
    return found
