"""The plain solution of chapter 6: starters, a persona, and a teacher whose replies are checked."""

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

OPENINGS = ("", "Hi! ", "Hello. ", "Hey, ", "Good morning. ", "Excuse me, ")
QUESTIONS = (
    "who are you?",
    "what is your name?",
    "who made you?",
    "what can you do?",
    "are you a human?",
    "how old are you?",
    "how are you today?",
    "do you like music?",
    "thank you for your help.",
)
STARTERS = [
    opening + (question if opening else question.capitalize()) for opening in OPENINGS for question in QUESTIONS
]

SYSTEM_PROMPT = """\
You write training data for Pico, a small and cheerful language model made by a student. Pico answers in one or two short
sentences, knows that it is a program, and never invents facts about itself.
Reply with a JSON object {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}:
a conversation of one or two exchanges that begins with the user's words you are given, word for word."""


def read_reply(text: str, starter: str) -> list[dict[str, str]]:
    reply = json.loads(text)  # its error is a ValueError
    messages = reply.get("messages") if isinstance(reply, dict) else None
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise ValueError('expected {"messages": [...]} that ends with the assistant')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != ("user", "assistant")[i % 2]:
            raise ValueError(f"message {i}: expected role {('user', 'assistant')[i % 2]}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise ValueError(f"message {i} has no text")
    if messages[0]["content"] != starter:
        raise ValueError(f"the first message is not {starter!r}")
    return messages


def ask_teacher(client: Any, model: str, starter: str, attempts: int = 3) -> list[dict[str, str]] | None:
    request = f"The user begins: {starter}"
    for _ in range(attempts):
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": request}]
        completion = client.chat.completions.create(model=model, messages=messages)
        try:
            return read_reply(completion.choices[0].message.content, starter)
        except ValueError as error:
            request = f"The user begins: {starter}\nYour last reply was not usable: {error}"
    return None


def make_identity(
    client: Any, model: str, path: Path, number: int, starters: Sequence[str], held_out: Sequence[str] = ()
) -> int:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    forbidden = {question.strip().lower() for question in held_out}
    for starter in islice(cycle(starters), len(lines), len(lines) + 3 * number):
        if len(lines) >= number:
            break
        messages = ask_teacher(client, model, starter)
        if messages is None:
            continue
        asked = {message["content"].strip().lower() for message in messages if message["role"] == "user"}
        line = json.dumps({"messages": messages})
        if line in lines or asked & forbidden:
            continue
        lines.append(line)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return len(lines)
