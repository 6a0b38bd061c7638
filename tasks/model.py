"""A stand-in for a language model: no network, and the same answer to the same conversation.

It is asked as the real ones are: messages in, one message out, which may ask
for tools first. It takes the seconds it is told to, and while a journal is kept
(``SHOP_JOURNAL``) it refuses the first call for a draft, as a provider does
that limits the rate.

With a real model, put its client into `complete`. The errors of OpenAI's and
Anthropic's clients need no translation: the library knows which of them are
worth a retry, and how long their ``Retry-After`` asks to wait.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import durable
from tasks import services

QUESTIONS = ("history", "economy", "outlook")


class ToolCall(TypedDict):
    """What the model wants to have done before it goes on."""

    id: str
    name: str
    arguments: dict[str, Any]


Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation.

    ``tool_calls`` has what the model asks for, ``tool_call_id`` which of that a
    tool's message answers; both are empty in all other messages.
    """

    role: Role
    content: str
    tool_calls: list[ToolCall]
    tool_call_id: str


class RateLimited(durable.RecoverableError):
    """HTTP 429. The step parks for as long as the provider asks."""


def message(
    role: Role, content: str, tool_calls: Sequence[ToolCall] = (), *, answers: str = ""
) -> Message:
    """Make a message."""
    return {
        "role": role,
        "content": content,
        "tool_calls": list(tool_calls),
        "tool_call_id": answers,
    }


def complete(messages: Sequence[Message], *, seconds: float = 0.0) -> Message:
    """Ask the model to go on with a conversation, whose first message says what it is to do.

    Raises:
        RateLimited: too many calls; ask again when the provider says so.
    """
    job, subject = messages[0]["content"], messages[1]["content"]
    asked_before = services.calls("model", f"{job}: {subject}")
    services.call("model", f"{job}: {subject}")
    time.sleep(seconds)
    if job == "draft" and services.keeps_journal() and not asked_before:
        raise RateLimited("HTTP 429: too many requests", retry_after=0.1)
    return _ANSWERS[job](messages)


def _plan(messages: Sequence[Message]) -> Message:
    topic = messages[1]["content"]
    return message("assistant", "\n".join(f"{topic}: {question}" for question in QUESTIONS))


def _research(messages: Sequence[Message]) -> Message:
    """Search, then read what was found, then answer."""
    question = messages[1]["content"]
    found = [each["content"] for each in messages if each["role"] == "tool"]
    if not found:
        return message("assistant", "", [_tool_call("search", query=question)])
    if len(found) == 1:
        pages = found[0].splitlines()
        return message("assistant", "", [_tool_call("read", page=page) for page in pages])
    return message("assistant", f"On {question}: {' '.join(found[1:])}")


def _draft(messages: Sequence[Message]) -> Message:
    wishes = [each["content"] for each in messages[3:]]
    amended = "".join(f"\n(amended: {wish})" for wish in wishes)
    return message("assistant", f"{messages[1]['content']}\n{messages[2]['content']}{amended}")


_ANSWERS = {"plan": _plan, "research": _research, "draft": _draft}


def _tool_call(name: str, **arguments: Any) -> ToolCall:
    return {"id": f"{name}-{'-'.join(arguments.values())}", "name": name, "arguments": arguments}
