"""An article by a language model, from the plan to the press, with an editor's approval.

Calls of a model are slow, cost money and answer differently each time. As steps
they are made once: whatever dies, the run goes on with the answers it has. The
conversation is built anew on each replay, from recorded messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import durable
from durable import step, workflow
from tasks import model, services
from tasks.model import Message, ToolCall, message

#: How often the model may ask for tools in one conversation: a bound on time and money.
MOST_TURNS = 8
#: How often an editor may send an article back.
MOST_ROUNDS = 3


class TooManyTurns(durable.PermanentError):
    """The model asks for tools without end."""


@dataclass(frozen=True)
class Review:
    """What the event ``review`` has to say."""

    approved: bool
    wish: str = ""


class Article(TypedDict):
    """What `write_article` returns."""

    text: str
    published: bool
    rounds: int


# --- steps: each call of the outside world


@step(max_retries=8, retry_backoff=2, retry_backoff_max="2m", timeout="5m")
def ask_model(messages: list[Message], seconds: float) -> Message:
    """One call of the model. A rate limit or an overload parks the run and is tried again."""
    return model.complete(messages, seconds=seconds)


@step
def use_tool(call: ToolCall) -> Message:
    """Do what the model asks for. A mistake of the model's is told to the model."""
    tool = TOOLS.get(call["name"])
    if tool is None:
        found = f"error: there is no tool {call['name']!r}"
    else:
        found = tool(**call["arguments"])
    return message("tool", found, answers=call["id"])


@step
def ask_editor(text: str, rounds: int) -> None:
    """Tell the editor that there is something to read."""
    services.mail("editor@example.com", f"round {rounds}: {text.splitlines()[0]}")


@step
def publish(text: str) -> None:
    """Put it online."""
    services.call("publish", text.splitlines()[0])


def search(query: str) -> str:
    """A tool: names of pages, one in a line."""
    services.call("search", query)
    return f"{query} (page 1)\n{query} (page 2)"


def read(page: str) -> str:
    """A tool: what a page says."""
    services.call("read", page)
    return f"[{page}]"


TOOLS: dict[str, Callable[..., str]] = {"search": search, "read": read}


# --- workflows: what follows what


@workflow
def answer(question: str, seconds: float = 0.0) -> str:
    """Let the model use tools until it has the answer."""
    messages = [message("system", "research"), message("user", question)]
    for _ in range(MOST_TURNS):
        reply = ask_model(messages, seconds)
        if not reply["tool_calls"]:
            return reply["content"]
        messages.append(reply)
        messages += [use_tool(call) for call in reply["tool_calls"]]
    raise TooManyTurns(f"no answer to {question!r} after {MOST_TURNS} turns")


@workflow
def write_article(topic: str, seconds: float = 0.0, patience: float | str = "7d") -> Article:
    """Plan, research in parallel, draft, and amend until the editor is content."""
    plan = ask_model([message("system", "plan"), message("user", topic)], seconds)
    questions = plan["content"].splitlines()
    answers = durable.fan_out(answer.s(seconds=seconds), questions)

    conversation = [message("system", "draft"), message("user", topic)]
    conversation.append(message("user", "\n".join(answers)))
    for rounds in range(1, MOST_ROUNDS + 1):
        text = ask_model(conversation, seconds)["content"]
        review = have_reviewed(text, rounds, patience)
        if review.approved:
            publish(text)
            return {"text": text, "published": True, "rounds": rounds}
        conversation.append(message("user", review.wish))
    return {"text": text, "published": False, "rounds": MOST_ROUNDS}


def have_reviewed(text: str, rounds: int, patience: float | str) -> Review:
    """Wait for the editor's word; silence is no approval."""
    ask_editor(text, rounds)
    try:
        review: Review = durable.wait_for_event("review", timeout=patience, schema=Review)
    except durable.EventTimeout:
        return Review(approved=False, wish="shorter, so that the editor has the time")
    return review
