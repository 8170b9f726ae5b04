"""The laws of chapter 9, and the mistakes that they must name."""

import json
import tempfile
from pathlib import Path
from typing import Any

from course.grading import Mutant

TITLE = "the GSM8K task"
PROVIDES = ("extract_answer", "GSM8K")
ROWS = [
    {"question": "Tom has 6 bags of 7 apples. How many?", "answer": "6*7 = <<6*7=42>>42\n#### 42"},
    {"question": "A car costs $1,000 and a bus 3 times as much. The bus?", "answer": "3*1000 = 3000\n#### 3,000"},
    {"question": "It was 2 degrees and fell by 5.", "answer": "2-5 = -3\n#### -3"},
]


def _task(m: Any) -> Any:
    """The task on three problems; the training split holds another number of rows."""
    with tempfile.TemporaryDirectory() as folder:
        for split, rows in (("test", ROWS), ("train", ROWS[:1])):
            text = "\n".join(json.dumps(row) for row in rows) + "\n"
            (Path(folder) / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return m.GSM8K("test", Path(folder))


def _read(m: Any, cases: dict[str, str | None]) -> None:
    for text, expected in cases.items():
        found = m.extract_answer(text)
        assert found == expected, f"extract_answer({text!r}) is {found!r}, expected {expected!r}"


def law_last_mark(m: Any) -> None:
    """The number behind the last #### counts."""
    _read(m, {"6*7 = 42\n#### 42": "42", "#### 41\nno,\n#### 42": "42", "#### 42\n#### 41": "41"})


def law_mark_needed(m: Any) -> None:
    """Without #### there is no answer, and after #### there must be a number."""
    _read(m, {"the answer is 42": None, "": None, "42": None, "####": None, "#### forty-two": None})


def law_one_form(m: Any) -> None:
    """One number has one form: commas, signs, dollars and zeros that change nothing."""
    _read(
        m, {"#### 1,000": "1000", "#### 1,234,567": "1234567", "#### 42.0": "42", "#### 42.": "42", "#### 0.50": "0.5"}
    )
    _read(m, {"#### -3": "-3", "####42": "42", "#### $18": "18", "####   7  ": "7", "#### 100": "100", "#### 0": "0"})


def law_no_guessing(m: Any) -> None:
    """A list of guesses is no answer: the number stands alone on its line."""
    _read(m, {"#### 41 or 42": None, "#### 41, 42, 43": None, "#### 4 2": None})
    _read(m, {"#### 42\nThat is all.": "42"})


def law_rows(m: Any) -> None:
    """The rows of the split that was asked for, in their order."""
    task = _task(m)
    assert len(task) == len(ROWS), (
        f"test.jsonl has {len(ROWS)} rows, len(task) is {len(task)}: is the other split read?"
    )
    questions = [task.get_example(i)["messages"][0]["content"] for i in range(len(task))]
    assert questions == [row["question"] for row in ROWS], f"the questions are {questions}"


def law_hub(m: Any) -> None:
    """Without a path the rows come from load_dataset("openai/gsm8k", "main") on the Hub, in the split asked for."""
    import datasets

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        splits = {"train": ROWS[:1], "test": ROWS}
        return splits[kwargs["split"]] if "split" in kwargs else splits

    own = getattr(m, "load_dataset", None)
    original, datasets.load_dataset = datasets.load_dataset, recorded
    if own is not None:
        m.load_dataset = recorded
    try:
        task = m.GSM8K("test")
        number = len(task)
    finally:
        datasets.load_dataset = original
        if own is not None:
            m.load_dataset = own
    assert calls, "load_dataset was not called: where do the rows come from without a path?"
    args, kwargs = calls[0]
    named = [*args, *kwargs.values()]
    assert "openai/gsm8k" in named, f"load_dataset was called with {named}, expected 'openai/gsm8k' among them"
    assert "main" in named, f"load_dataset was called with {named}: the data set has two configurations, take 'main'"
    assert number == len(ROWS), f"the test split has {len(ROWS)} rows, len(task) is {number}"


def law_answer_hidden(m: Any) -> None:
    """The prompt holds the question alone: what the model must find is nowhere in it."""
    task = _task(m)
    example = task.get_example(0)
    roles = [message["role"] for message in example["messages"]]
    assert roles == ["user"], f"the messages have the roles {roles}, expected one user message"
    text = json.dumps(example["messages"])
    assert "42" not in text, f"the messages of the first problem hold its answer: {text}"
    assert "####" not in text, f"the messages hold the mark of the answer: {text}"


def law_truth(m: Any) -> None:
    """The true answer is extracted as the model's is."""
    task = _task(m)
    answers = [task.get_example(i)["answer"] for i in range(3)]
    assert answers == ["42", "3000", "-3"], f"the answers are {answers}, expected ['42', '3000', '-3']"


def law_reward(m: Any) -> None:
    """The reward is 1.0 for the right number, however it is written, and 0.0 for everything else."""
    task = _task(m)
    cases = [
        (0, "6*7 = 42\n#### 42", 1.0),
        (0, "#### 42.00", 1.0),
        (0, "#### 41", 0.0),
        (0, "42", 0.0),
        (1, "#### 3000", 1.0),
        (1, "#### $3,000", 1.0),
        (1, "#### 3", 0.0),
        (2, "#### -3", 1.0),
        (2, "#### 3", 0.0),
        (0, "", 0.0),
    ]
    for index, completion, expected in cases:
        found = task.reward(task.get_example(index), completion)
        assert found == expected, f"problem {index}, completion {completion!r}: reward {found!r}, expected {expected}"
        assert isinstance(found, float), f"the reward is {found!r}, a {type(found).__name__}; expected a float"


def law_none_is_not_right(m: Any) -> None:
    """A completion without an answer earns nothing, even where the true answer could not be read."""
    task = _task(m)
    found = task.reward({"messages": [], "answer": None}, "I do not know")
    assert found == 0.0, "two missing answers are equal, and earned 1.0: None must never count as right"


MUTANTS = [
    Mutant("the first mark counts", 'text.rpartition("####")', 'text.partition("####")', "last_mark"),
    Mutant("any number counts", "if not mark or found is None:", "if found is None:", "mark_needed"),
    Mutant("commas stay", 'found[1].replace(",", "")', "found[1]", "one_form"),
    Mutant("42.0 is not 42", 'if "." in number:', "if False:", "one_form"),
    Mutant("zeros of whole numbers go", 'if "." in number:', "if True:", "one_form"),
    Mutant("minus is not read", "(-?", "-?(", "one_form"),
    Mutant("the first of several guesses counts", r"\s*(?:\n|$)", "", "no_guessing"),
    Mutant("the answer stands in the prompt", '[{"role": "user", "content": row["question"]}]', '[{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]', "answer_hidden"),
    Mutant("the truth is not read as answers are", '"answer": extract_answer(row["answer"])', '"answer": row["answer"].rpartition("#### ")[2]', "truth"),
    Mutant("always the training split", '(path / f"{split}.jsonl")', '(path / "train.jsonl")', "rows"),
    Mutant("the other configuration", '"openai/gsm8k", "main"', '"openai/gsm8k", "socratic"', "hub"),
    Mutant("always the training split of the Hub", "split=split", 'split="train"', "hub"),
    Mutant("the reward is a boolean", 'float(answer is not None and answer == example["answer"])', 'answer is not None and answer == example["answer"]', "reward"),
    Mutant("compared as text", 'float(answer is not None and answer == example["answer"])', 'float(completion.rpartition("#### ")[2] == example["answer"])', "reward"),
    Mutant("none equals none", "answer is not None and answer", "answer", "none_is_not_right"),
]  # fmt: skip
