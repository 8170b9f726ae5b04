"""What a model or a data set says is shown as text, never obeyed: by the terminal, a browser or a Markdown viewer."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from edu.config.terminal import printable
from edu.data.tokenizer import Tokenizer
from edu.model.gpt import GPT, GPTConfig

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202egnp.exe\x7f\b"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What a script prints, on stdout and stderr together."""

    def run(script: str, *flags: object) -> str:
        monkeypatch.setattr("sys.argv", [script, *map(str, flags)])
        with pytest.raises(SystemExit):
            runpy.run_path(f"scripts/{script}.py", run_name="__main__")
        return "".join(capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says EVIL, whatever it is asked."""
    folder = tmp_path_factory.mktemp("model")
    model = GPT(GPTConfig.tiny(vocab_size=tokenizer.vocab_size, max_position_embeddings=256))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def saying(text: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every Engine stream a text and end its turn."""
    tokens = [*tokenizer.encode(text), tokenizer.assistant_end]
    monkeypatch.setattr("edu.inference.engine.Engine.stream", lambda *_, **__: iter(tokens))
    monkeypatch.setattr("edu.inference.engine.generate_naive", lambda *_: iter(tokens))


def test_control_characters_become_visible_and_other_text_stays() -> None:
    assert printable(EVIL) == r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202egnp.exe\x7f\x08"
    plain = "Straße, 你好 👩‍👩‍👧\n\tnaïve\u00a0x\u200d"
    assert printable(plain) == plain


@pytest.mark.parametrize("script", ["chat", "generate"])
def test_what_a_model_says_cannot_steer_the_terminal(
    script: str, run: Run, speaker: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(EVIL + " done", tokenizer, monkeypatch)
    printed = run(script, "--model", speaker, "-p", "Hi")
    assert not STEERING.search(printed)
    assert r"\x1b]0;owned" in printed
    assert "done" in printed


def test_what_a_data_set_says_cannot_steer_the_terminal(run: Run, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": f"What{EVIL}?", "answer": f"{EVIL}\n#### 7"}))
    printed = run("show_problem", "--path", tmp_path / "train.jsonl")
    assert r"\x1b]0;owned" in printed
    (tmp_path / "chats.jsonl").write_text(json.dumps({EVIL: 1}))
    tokenizer.save(tmp_path / "tokenizer")
    told = run("show_sft_batch", "--data", tmp_path / "chats.jsonl", "--tokenizer", tmp_path / "tokenizer")
    assert "chats.jsonl, row 1" in told
    chat = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": chat}))
    shown = run("show_sft_batch", "--data", tmp_path / "chats.jsonl", "--tokenizer", tmp_path / "tokenizer")
    assert "are trained" in shown
    assert not STEERING.search(printed + told + shown)
