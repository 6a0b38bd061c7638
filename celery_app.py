"""The example app of this repository: ``celery -A celery_app worker``.

With nothing configured it needs no server: an embedded Postgres and a broker
of plain files, both in ``.durable/``. That is for a laptop and for trials;
set ``DURABLE_DATABASE_URL`` and ``CELERY_BROKER_URL`` for anything more.
"""

from __future__ import annotations

import os
from pathlib import Path

from celery import Celery
from celery.schedules import crontab

from durable import Durable

HOME = Path(os.environ.get("DURABLE_EMBEDDED_DIR", ".durable")).resolve()

app = Celery(
    "celery_app",
    include=[
        "tasks.orders",
        "tasks.imports",
        "tasks.refunds",
        "tasks.videos",
        "tasks.invoices",
        "tasks.storefront",
        "tasks.restock",
        "tasks.subscriptions",
        "tasks.research",
    ],
)
app.conf.update(
    broker_url=os.environ.get("CELERY_BROKER_URL", "filesystem://"),
    broker_connection_retry_on_startup=True,
    result_backend=os.environ.get("CELERY_RESULT_BACKEND"),
    task_track_started=True,
    # `celery -A celery_app beat`: as many as you like, each due time starts one run.
    beat_schedule={
        "import-airports-nightly": {
            "task": "tasks.imports.import_airports",
            "schedule": crontab(hour="3", minute="0"),
        },
    },
)

if app.conf.broker_url.startswith("filesystem:"):
    queue = HOME / "broker" / "queue"
    control = HOME / "broker" / "control"
    for directory in (queue, control):
        directory.mkdir(parents=True, exist_ok=True)
    app.conf.broker_transport_options = {
        "data_folder_in": str(queue),
        "data_folder_out": str(queue),
        "control_folder": str(control),
    }

Durable(
    app,
    database_url=os.environ.get("DURABLE_DATABASE_URL", "embedded"),
    embedded_dir=str(HOME),
)
