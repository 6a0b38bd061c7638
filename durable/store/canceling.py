"""What a cancel does to the row of a run: for people, for the system, for tied children."""

from __future__ import annotations

# A run that runs is asked, and stops before its next step; any other ends
# here. One with a Celery continuation is rung: Celery answers chords and
# results. Asked to pause before, it is canceled. What has something to undo
# goes to a worker, which finds `control`.
#: For SET in an UPDATE of ``workflow_runs r`` whose runs have not ended.
CANCEL = """
       control = CASE WHEN r.status = 'running' OR r.compensates THEN 'cancel'
                      ELSE r.control END,
       wake = r.wake + 1,
       status = CASE WHEN r.status = 'running' THEN r.status
                     WHEN r.compensates THEN 'pending' ELSE 'canceled' END,
       completed_at = CASE WHEN NOT (r.status = 'running' OR r.compensates) THEN now() END,
       rung = r.rung AND r.status = 'running',
       available_at = CASE WHEN r.status = 'running' THEN r.available_at
                           WHEN r.compensates OR r.tail THEN now() ELSE 'infinity' END"""
