"""Chapter 6: synthetic identity data. Fill in the bodies; `make grade CHALLENGE=6` says what holds.

A client is that of the openai package: client.chat.completions.create(model=..., messages=[...]) returns an object whose
.choices[0].message.content is the reply's text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTERS: list[str] = []
"""At least 50 different ways in which a user may begin: about the model itself, greetings, small talk."""

SYSTEM_PROMPT = ""
"""Who the assistant is (choose a name), how it speaks, and the form of the reply: a JSON object {"messages": [...]}."""


def read_reply(text: str, starter: str) -> list[dict[str, str]]:
    """Return the messages of a teacher's reply; ValueError says what is wrong with it.

    1. The text is a JSON object with a list "messages" of {"role": ..., "content": ...}, as SYSTEM_PROMPT asks.
    2. Roles alternate, user first, assistant last; no content is empty.
    3. The first message is the starter, word for word.
    """
    raise NotImplementedError


def ask_teacher(client: Any, model: str, starter: str, attempts: int = 3) -> list[dict[str, str]] | None:
    """Ask for one conversation that begins with the starter; None after so many bad replies.

    SYSTEM_PROMPT is the system message. After a bad reply ask again, with the reason in the request.
    """
    raise NotImplementedError


def make_identity(
    client: Any, model: str, path: Path, number: int, starters: Sequence[str], held_out: Sequence[str] = ()
) -> int:
    """Bring the file to `number` conversations, one {"messages": [...]} a line; return how many it has.

    1. What the file holds already counts: a rerun asks for the missing ones only.
    2. Starters are taken in turn, as often as needed.
    3. A conversation that is there already (the same messages) is left out, and so is one with a user message among the
       held-out questions (upper and lower case and outer spaces aside): what is measured later must not be trained on.
    4. After 3 x number requests it stops, however many there are: a teacher may have nothing new to say.
    """
    raise NotImplementedError
