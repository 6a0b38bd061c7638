"""A Django site with a Celery app, as Celery's documentation has it; run as a program.

Prints what a test looks at, one line each.
"""

from __future__ import annotations

import os

import django
from celery import Celery
from django.conf import settings

from durable import Durable, Workflow

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    USE_TZ=True,
    CELERY_BROKER_URL="memory://",
    CELERY_DURABLE_DATABASE_URL=os.environ["SITE_DATABASE_URL"],
    CELERY_DURABLE_LEASE="30s",
)
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.apps.django_site"
django.setup()

app = Celery("site")
app.config_from_object("django.conf:settings", namespace="CELERY")
Durable(app)


@app.task(base=Workflow, name="site.order")
def order(number: int) -> int:
    return number


if __name__ == "__main__":
    from celery.contrib.django.task import DjangoTask
    from django.db import transaction

    print("lease", app.durable.settings.lease)  # noqa: T201
    print("DjangoTask", isinstance(order, DjangoTask), order(7))  # noqa: T201
    with transaction.atomic():
        order.delay_on_commit(1)
        print("in the transaction")  # noqa: T201
    with transaction.atomic():
        order.delay_on_commit(2)
        transaction.set_rollback(True)
    print("rolled back")  # noqa: T201
