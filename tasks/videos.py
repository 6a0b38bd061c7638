"""A video that somebody else encodes: asked for with longer and longer pauses.

Between two looks the run holds no worker. Each look is a step, so after a crash
it goes on with the pause where it was and asks for no finished look again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import durable
from durable import step, workflow
from tasks import services


class NotEncodedInTime(Exception):
    """The encoder did not finish within our patience."""


@step
def start_encoding(video: str) -> str:
    """Hand the video over; returns the job to ask for."""
    return services.start_encoding(video, idempotency_key=durable.idempotency_key())


@step
def encoding_state(job: str) -> Literal["running", "done"]:
    """Look once. Trouble on the line is retried by the step's own policy."""
    return services.encoding_state(job)


@step
def announce(video: str) -> str:
    """Show it to the world."""
    services.mail("everybody@example.com", f"watch {video}")
    return f"https://videos.example.com/{video}"


@workflow
def publish_video(
    video: str,
    first_pause: float = 10.0,
    longest_pause: float = 300.0,
    patience: float = 6 * 3600.0,
) -> str:
    """Have a video encoded and publish it; all times in seconds."""
    job = start_encoding(video)
    for pause in pauses(first_pause, longest_pause, patience):
        durable.sleep(pause)
        if encoding_state(job) == "done":
            return announce(video)
    raise NotEncodedInTime(f"{job} of {video} still runs after {patience:g} s of pauses")


def pauses(first: float, longest: float, total: float) -> Iterator[float]:
    """Doubled from one to the next, up to the longest; ``total`` seconds together.

    >>> list(pauses(10, 60, 200))
    [10, 20, 40, 60, 60, 10]
    """
    pause = first
    while total > 0:
        pause = min(pause, longest, total)
        yield pause
        total -= pause
        pause *= 2
