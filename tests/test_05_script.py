"""Chapter 5: scripts/generate.py compares the Engine with the uncached loop, and says what is wrong with its flags."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_04_model import random_gpt

from edu.data.tokenizer import Tokenizer
from edu.inference.engine import generate_naive
from edu.model.gpt import GPT

Run = Callable[..., tuple[int, str, str]]
CONTEXT, PROMPT = 48, "How many apples?"


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_gpt(vocab_size=512, max_position_embeddings=CONTEXT, seed=3)


@pytest.fixture(scope="module")
def folder(model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The script with these flags: its exit code, stdout and stderr."""

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["scripts/generate.py", "--model", str(folder), *flags])
        monkeypatch.setattr("edu.training.accelerator.autodetect_device_type", lambda: "cpu")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("scripts/generate.py", run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def test_it_prints_the_text_and_compares_as_many_tokens_as_asked_and_a_full_context(
    run: Run, model: GPT, tokenizer: Tokenizer
) -> None:
    prompt = [tokenizer.bos, *tokenizer.encode(PROMPT)]
    code, out, err = run("-p", PROMPT, "-n", "7")
    assert (code, err) == (0, "")
    room = CONTEXT - len(prompt)
    text = PROMPT + tokenizer.decode(list(generate_naive(model, prompt, 7)))
    assert out.startswith(f"{text}\n7 tokens: naive ")
    first, second = out.removeprefix(f"{text}\n").splitlines()
    assert second.startswith(f"{room} tokens: naive ")
    assert first.endswith("same tokens")
    assert second.endswith("same tokens")


def test_other_tokens_are_said_and_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: GPT, prompt: list[int], count: int) -> Iterator[int]:
        yield from [*list(generate_naive(model, prompt, count))[:-1], 0]

    monkeypatch.setattr("edu.inference.engine.generate_naive", wrong)
    code, out, _ = run("-p", PROMPT, "-n", "7")
    assert code == 1
    assert out.count("DIFFERENT TOKENS") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", "0"], "error: --n 0: must be at least 1\n"),
        (["-p", "Hi", "-n", "60"], f"--n 60 more: the context holds {CONTEXT} in all\n"),
        (["-p", "apples " * 60], f"--n 10 more: the context holds {CONTEXT} in all\n"),
        (["--model", "runs/never"], "error: --model runs/never: no such folder"),
        (["-n", "many"], "--n"),
    ],
)
def test_a_mistake_is_one_line(run: Run, flags: list[str], message: str) -> None:
    code, out, err = run(*flags)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert flags == ["-n", "many"] or err.count("\n") == 1
