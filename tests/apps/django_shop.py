"""A Django site whose database is the one that keeps the runs; run as a program.

Its broker takes no message: what it starts is for the dispatchers to ring.
"""

from __future__ import annotations

import os

import django
from celery import Celery
from celery.contrib.django.task import DjangoTask
from django.conf import settings
from sqlalchemy import make_url

from durable import Durable, Workflow

URL = os.environ["SITE_DATABASE_URL"]
_parts = make_url(URL)

settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": _parts.database,
            "USER": _parts.username or "",
            "PASSWORD": _parts.password or "",
            "HOST": _parts.host or _parts.query.get("host", ""),
            "PORT": _parts.port or "",
        }
    },
    USE_TZ=True,
    CELERY_TASK_DEFAULT_QUEUE=os.environ["SITE_QUEUE"],
    CELERY_BROKER_URL="redis://127.0.0.1:1/0",
    CELERY_DURABLE_DATABASE_URL=URL,
)
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.apps.django_shop"
django.setup()

app = Celery("site")
app.config_from_object("django.conf:settings", namespace="CELERY")
Durable(app)


@app.task(base=Workflow, name="outbox.echo")
def echo(value: object) -> object: ...


class ShopTask(Workflow, DjangoTask):
    """The project's own class, which names Django's itself."""

    abstract = True


@app.task(base=ShopTask, name="outbox.slow", shared=False)
def of_own_class(value: object) -> object: ...


class Stop(Exception):
    """Ends a block of a transaction."""


if __name__ == "__main__":
    from contextlib import suppress

    from django.db import connection, transaction

    with suppress(Stop), transaction.atomic():
        echo.delay_on_commit("rolled back")
        echo.apply_async(("rolled back",), transaction=connection)
        raise Stop
    with transaction.atomic():
        # What is to come after the commit does not come, Celery's own way of starting included.
        transaction.on_commit(lambda: os._exit(3))
        echo.delay_on_commit("on commit")
        of_own_class.delay_on_commit("of a class of its own")
        echo.apply_async_on_commit(("on commit, with a key",), idempotency_key="k")
        with suppress(Stop), transaction.atomic():
            echo.delay_on_commit("in a savepoint")
            raise Stop
        run = echo.apply_async(("transaction=",), transaction=connection)
        print(run.id, flush=True)  # noqa: T201
