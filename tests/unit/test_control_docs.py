"""The documentation shows the table that the code follows."""

from __future__ import annotations

from pathlib import Path

from durable.control import STATES, TRANSITIONS

PAGE = Path(__file__).parents[2] / "docs" / "control.md"


def table() -> str:
    head = [f"| the run is | {' | '.join(TRANSITIONS)} |", "|---" * (len(TRANSITIONS) + 1) + "|"]
    rows = [
        f"| {state} | {' | '.join(word(action, state) for action in TRANSITIONS)} |"
        for state in STATES
    ]
    return "\n".join([*head, *rows])


def word(action: str, state: str) -> str:
    outcome = TRANSITIONS[action][state]
    if outcome == "asked":
        return f"asked to {action}"
    return {"same": "nothing to do", None: "refused"}.get(outcome, outcome or "")


def test_the_page_shows_the_state_machine() -> None:
    text = PAGE.read_text("utf-8")
    shown = text.partition("a test compares -->\n")[2].partition("\n<!-- end -->")[0]
    assert shown == table()
