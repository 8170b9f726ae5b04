"""Multiple choice: a question, some answers, the letter of the right one. Rows: {"question", "choices": [...], "answer": "B"}."""

import re
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from edu.data.rows import read_rows, text_field
from edu.tasks.task import Example

_LETTER = re.compile(r"(?:#### ?)?\(?([A-Z])[).]?")


class Choice:
    """Questions of a jsonl file; ValueError naming the file and row on bad data."""

    def __init__(self, path: str | Path) -> None:
        self.examples = [_example(row, place) for place, row in read_rows(Path(path))]

    def __len__(self) -> int:
        return len(self.examples)

    def get_example(self, index: int) -> Example:
        """`messages` (the question and its lettered choices), `answer` ("B"), and the row's other fields."""
        return self.examples[index]

    def reward(self, example: Example, completion: str) -> float:
        """1.0 if the last line is the right letter and nothing else ("B", "(B)", "B.", "#### B"), else 0.0."""
        last = completion.strip().rpartition("\n")[2]
        match = _LETTER.fullmatch(last.strip())
        return float(match is not None and match[1] == example["answer"])


def _example(row: dict[str, Any], place: str) -> Example:
    question, answer, choices = text_field(row, "question", place), text_field(row, "answer", place), row.get("choices")
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= 26
        or not all(isinstance(each, str) for each in choices)
    ):
        raise ValueError(f"{place}: field 'choices' must be a list of 2 to 26 texts")
    letters = ascii_uppercase[: len(choices)]
    if answer not in tuple(letters):
        raise ValueError(f"{place}: field 'answer' is {answer!r}, expected one of {', '.join(letters)}")
    lines = [f"{letter}) {text}" for letter, text in zip(letters, choices, strict=True)]
    prompt = "\n".join([question, *lines, "Answer with one letter."])
    return {**row, "messages": [{"role": "user", "content": prompt}]}
