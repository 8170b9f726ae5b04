"""scripts/chat.py: what is typed is a question, a command or nothing."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "chat.py"
Typed = Callable[..., list[list[dict[str, Any]]]]


@pytest.fixture
def chat() -> Any:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location("chat_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def typed(chat: Any, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Type lines into a conversation whose model says "yes"; return what it was asked each time."""

    def run(*lines: str, system: str = "") -> list[list[dict[str, Any]]]:
        waiting, asked = iter(lines), []

        def read(_: str) -> str:
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        def answer(_engine: Any, _tokenizer: Any, messages: list[Any], _args: Any) -> list[dict[str, Any]]:
            asked.append(messages)
            return [{"role": "assistant", "content": "" if messages[-1]["content"] == "hush" else "yes"}]

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(chat, "answer", answer)
        chat.converse(None, None, [{"role": "system", "content": system}] if system else [], None)
        return asked

    return run


def test_an_empty_line_does_nothing_and_the_conversation_goes_on(typed: Typed) -> None:
    asked = typed("hi", "", "   ", "and you?")
    assert [message["content"] for message in asked[-1]] == ["hi", "yes", "and you?"]


@pytest.mark.parametrize("word", ["quit", "exit", "/quit"])
def test_quit_and_exit_leave(typed: Typed, word: str) -> None:
    assert len(typed("hi", word, "not asked")) == 1
    assert len(typed(f"{word} smoking", "asked")) == (1 if word == "/quit" else 2)


def test_new_and_system_begin_another_conversation(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    asked = typed("hi", "/new", "one", "/system Be short.", "two", "/system", "three", system="Be kind.")
    contents = [[message["content"] for message in messages] for messages in asked]
    assert contents == [["Be kind.", "hi"], ["Be kind.", "one"], ["Be short.", "two"], ["three"]]
    assert typed("/help", "/what") == []
    assert "/system TEXT" in capsys.readouterr().out


def test_the_seed_is_another_each_time_unless_it_is_given(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    class Engine:
        class config:
            max_position_embeddings = 64

        def stream(self, *_: Any, seed: int, **__: Any) -> list[int]:
            seeds.append(seed)
            return []

    class Tokenizer:
        assistant_end = bos = python_start = python_end = output_start = output_end = 0

        def decode(self, _: list[int]) -> str:
            return ""

    for name in ("cut_to_context", "render_prompt"):
        monkeypatch.setattr(f"edu.chat.chat_format.{name}", lambda *_: [])
    for given in (None, None, 7, 7):
        chat.answer(Engine(), Tokenizer(), [], chat.Args(seed=given))
    assert len(set(seeds)) == 3
    assert seeds[2:] == [7, 7]
