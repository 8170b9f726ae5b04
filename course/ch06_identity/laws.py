"""The laws of chapter 6, and the mistakes that they must name."""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from course.grading import Mutant

TITLE = "synthetic identity data"
PROVIDES = ("STARTERS", "SYSTEM_PROMPT", "read_reply", "ask_teacher", "make_identity")


class Teacher:
    """A client without a network: each request is answered by a function of its number and text."""

    def __init__(self, reply: Callable[[int, str], str]) -> None:
        self.requests: list[dict[str, Any]] = []
        self._reply = reply
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

    def _create(self, **request: Any) -> Any:
        self.requests.append(request)
        text = self._reply(len(self.requests), self.text(-1))
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])

    def text(self, number: int) -> str:
        """All that a request says, as one text."""
        return "\n".join(str(message["content"]) for message in self.requests[number]["messages"])


def _chat(starter: str, answer: str = "I am Pico.") -> str:
    return json.dumps({"messages": [{"role": "user", "content": starter}, {"role": "assistant", "content": answer}]})


def _starter_in(text: str, starters: list[str]) -> str:
    """The starter that a request quotes: the longest that occurs in it."""
    found = [starter for starter in starters if starter in text]
    assert found, f"the request quotes none of the starters {starters}: {text[-200:]!r}"
    return max(found, key=len)


STARTERS = ["Who are you?", "What is your name?", "Hello there!"]


def _honest(number: int, text: str) -> str:
    return _chat(_starter_in(text, STARTERS), f"I am Pico, and this is answer {number}.")


def _made(m: Any, teacher: Teacher, number: int, path: Path, **settings: Any) -> list[Any]:
    """Make the file, and read it as JSON lines."""
    settings = {"starters": STARTERS, **settings}
    told = m.make_identity(teacher, "some-model", path, number, **settings)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    assert told == len(lines), f"make_identity says {told} conversations, the file has {len(lines)} lines"
    return [json.loads(line) for line in lines]


def law_starters(m: Any) -> None:
    """There are at least 50 starters, all different, none empty."""
    assert m.STARTERS, "STARTERS is empty: not written yet"
    different = {str(starter).strip().lower() for starter in m.STARTERS} - {""}
    assert len(different) >= 50, (
        f"{len(different)} different starters of {len(m.STARTERS)}; a model that hears few wordings knows few"
    )


def law_persona(m: Any) -> None:
    """The system prompt says who the assistant is and in which form to reply."""
    words = m.SYSTEM_PROMPT.split()
    assert words, "SYSTEM_PROMPT is empty: not written yet"
    assert len(words) >= 20, (
        f"SYSTEM_PROMPT has {len(words)} words: who is the assistant, how does it speak, what does a reply look like?"
    )
    assert "messages" in m.SYSTEM_PROMPT, 'SYSTEM_PROMPT does not name the key "messages", which replies must have'
    assert "json" in m.SYSTEM_PROMPT.lower(), "SYSTEM_PROMPT does not ask for JSON"


def law_good_reply(m: Any) -> None:
    """A good reply is read: one exchange or several."""
    found = m.read_reply(_chat("Hi"), "Hi")
    assert found == json.loads(_chat("Hi"))["messages"], f"read {found}"
    two = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("Hi", "Yo", "Who?", "Pico"))
    ]
    assert m.read_reply(json.dumps({"messages": two}), "Hi") == two, (
        "a conversation of two exchanges was not read as it is"
    )


BAD = {
    "no JSON": "Sure! Here is a conversation.",
    "a list": "[1, 2]",
    "no messages": "{}",
    "no message at all": '{"messages": []}',
    "the wrong key": json.dumps({"chat": json.loads(_chat("Hi"))["messages"]}),
    "another beginning": _chat("Hello"),
    "an empty answer": _chat("Hi", "  "),
    "an answer that is no text": json.dumps(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": 7}]}
    ),
    "a user who speaks last": json.dumps(
        {"messages": [*json.loads(_chat("Hi"))["messages"], {"role": "user", "content": "So?"}]}
    ),
    "an assistant who speaks first": json.dumps(
        {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}]}
    ),
    "two answers in a row": json.dumps(
        {"messages": [{"role": "user", "content": "Hi"}] + [{"role": "assistant", "content": "Yo"}] * 3}
    ),
}


def law_bad_replies(m: Any) -> None:
    """What is no conversation of the form is a ValueError, and only that."""
    for what, text in BAD.items():
        try:
            found = m.read_reply(text, "Hi")
        except NotImplementedError:
            raise
        except ValueError:
            continue
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}; expected a ValueError") from None
        raise AssertionError(
            f"{what} was read as {found}: a teacher makes such mistakes, and the model would learn them"
        )


def law_request(m: Any) -> None:
    """The teacher is asked with the persona as system message, the starter, and the model's name."""
    teacher = Teacher(lambda *_: _chat("Who are you?"))
    found = m.ask_teacher(teacher, "some-model", "Who are you?")
    assert found == json.loads(_chat("Who are you?"))["messages"], f"a good reply gave {found}"
    assert len(teacher.requests) == 1, f"a good reply at once, and {len(teacher.requests)} requests"
    request = teacher.requests[0]
    assert request["model"] == "some-model", f"the request names the model {request['model']!r}"
    first = request["messages"][0]
    assert (first["role"], first["content"]) == ("system", m.SYSTEM_PROMPT), f"the first message is {first}"
    rest = "\n".join(str(message["content"]) for message in request["messages"][1:])
    assert "Who are you?" in rest, "the request does not quote the starter after the system message"


def law_asked_again(m: Any) -> None:
    """A bad reply is asked for again, with the reason; after the last attempt there is None."""
    teacher = Teacher(lambda number, _: "no json" if number < 3 else _chat("Hi"))
    found = m.ask_teacher(teacher, "some-model", "Hi", attempts=3)
    assert found is not None, "two bad replies and a good one, with three attempts: None came back"
    assert teacher.text(1) != teacher.text(0), "the second request is the first again: tell the teacher what was wrong"
    hopeless = Teacher(lambda *_: "no json")
    assert m.ask_teacher(hopeless, "some-model", "Hi", attempts=3) is None, "no good reply ever, and not None"
    assert len(hopeless.requests) == 3, f"attempts=3, and {len(hopeless.requests)} requests"


def law_file(m: Any) -> None:
    """The file has so many conversations, one JSON object a line, from all starters in turn."""
    teacher = Teacher(_honest)
    with tempfile.TemporaryDirectory() as folder:
        found = _made(m, teacher, 7, Path(folder) / "identity.jsonl")
    assert len(found) == 7, f"7 conversations were asked for, the file has {len(found)}"
    assert all(list(line) == ["messages"] for line in found), (
        f"a line has the keys {list(found[0])}, expected messages alone"
    )
    used = [line["messages"][0]["content"] for line in found]
    counts = {starter: used.count(starter) for starter in STARTERS}
    assert max(counts.values()) - min(counts.values()) <= 1, (
        f"7 conversations of 3 starters: {counts}; take them in turn"
    )


def law_rerun(m: Any) -> None:
    """A rerun keeps what is there and asks for the missing ones only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "identity.jsonl"
        _made(m, Teacher(_honest), 4, path)
        before = path.read_text(encoding="utf-8")
        teacher = Teacher(lambda number, text: _honest(number + 100, text))
        _made(m, teacher, 6, path)
        assert path.read_text(encoding="utf-8").startswith(before), "the conversations of the first run were changed"
        assert len(teacher.requests) == 2, (
            f"4 of 6 were there, and the teacher was asked {len(teacher.requests)} times, expected 2"
        )
        again = Teacher(_honest)
        _made(m, again, 6, path)
        assert not again.requests, f"all 6 were there, and the teacher was asked {len(again.requests)} times"


def law_interrupted(m: Any) -> None:
    """What was made before an interruption is in the file."""

    def breaks(number: int, text: str) -> str:
        if number > 3:
            raise KeyboardInterrupt
        return _honest(number, text)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "identity.jsonl"
        with suppress(KeyboardInterrupt):
            m.make_identity(Teacher(breaks), "some-model", path, 10, STARTERS)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        assert len(lines) == 3, (
            f"interrupted at the fourth request: the file has {len(lines)} conversations, expected 3; each costs money"
        )


def law_duplicates(m: Any) -> None:
    """A conversation that is there already is left out, and a teacher with nothing new to say is given up."""
    teacher = Teacher(lambda _, text: _chat(_starter_in(text, STARTERS)))
    with tempfile.TemporaryDirectory() as folder:
        found = _made(m, teacher, 5, Path(folder) / "identity.jsonl")
    assert len(found) == 3, (
        f"the teacher says one thing to each of 3 starters; the file has {len(found)} conversations, expected 3"
    )
    assert len(teacher.requests) <= 15, f"{len(teacher.requests)} requests for 5 conversations: stop after 3 x 5"


def law_held_out(m: Any) -> None:
    """No held-out question is trained on, in whatever turn and case it comes."""
    secret = "What do you like most?"
    turns = [secret.upper() + " ", secret, "Fine."]

    def reply(number: int, text: str) -> str:
        messages = json.loads(_honest(number, text))["messages"]
        more = [{"role": "user", "content": turns[number % 3]}, {"role": "assistant", "content": "Numbers."}]
        return json.dumps({"messages": messages + more})

    with tempfile.TemporaryDirectory() as folder:
        found = _made(m, Teacher(reply), 4, Path(folder) / "identity.jsonl", held_out=[secret])
    asked = [message["content"] for line in found for message in line["messages"] if message["role"] == "user"]
    leaked = [text for text in asked if text.strip().lower() == secret.lower()]
    assert not leaked, (
        f"the held-out question was kept as {leaked[0]!r}: what is measured later is then learned by heart"
    )
    assert found, "all conversations were left out; only those with the held-out question should be"


MUTANTS = [
    Mutant("few starters", "for opening in OPENINGS for", "for opening in OPENINGS[:3] for", "starters"),
    Mutant("the first words are not compared", "if messages[0][\"content\"] != starter:", "if False:", "bad_replies"),
    Mutant("the user may speak last", " or len(messages) % 2:", ":", "bad_replies"),
    Mutant("roles are not looked at", "message.get(\"role\") != (\"user\", \"assistant\")[i % 2]:", "not message.get(\"role\"):", "bad_replies"),
    Mutant("never asked again", "for _ in range(attempts):", "for _ in range(1):", "asked_again"),
    Mutant("the reason is not told", 'request = f"The user begins: {starter}\\nYour last reply was not usable: {error}"', "str(error)", "asked_again"),
    Mutant("no persona", '[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": request}]', '[{"role": "user", "content": request}]', "request"),
    Mutant("always the same starter", "cycle(starters), len(lines)", "cycle(starters[:1]), len(lines)", "file"),
    Mutant("a rerun begins anew", 'path.read_text(encoding="utf-8").splitlines() if path.exists() else []', "[]", "rerun"),
    Mutant("written at the end", '        with path.open("a", encoding="utf-8") as file:\n            file.write(line + "\\n")\n    return', '    path.write_text("".join(line + "\\n" for line in lines), encoding="utf-8")\n    return', "interrupted"),
    Mutant("duplicates kept", "if line in lines or asked & forbidden:", "if asked & forbidden:", "duplicates"),
    Mutant("held-out questions kept", "if line in lines or asked & forbidden:", "if line in lines:", "held_out"),
    Mutant("only the first turn is compared", 'for message in messages if message["role"] == "user"}', 'for message in messages[:1]}', "held_out"),
]  # fmt: skip
