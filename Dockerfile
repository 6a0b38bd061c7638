# The example application of this repository: a worker, beat or Flower.
FROM python:3.13-slim

RUN useradd --create-home app
WORKDIR /app

COPY pyproject.toml README.md LICENSE ./
COPY durable durable
RUN pip install --no-cache-dir ".[flower]"

COPY celery_app.py ./
COPY tasks tasks
COPY examples examples

USER app
# Celery stops warm on SIGTERM: runs stop at the next step and go back.
STOPSIGNAL SIGTERM
CMD ["celery", "-A", "celery_app", "worker", "--loglevel", "INFO"]
