"""Chapter 9: the GSM8K task. Fill in the bodies; `make grade CHALLENGE=9` says what holds.

A row of the data set is {"question": "...", "answer": "worked steps\\n#### 42"}: the answer stands behind the last ####.
"""

from pathlib import Path
from typing import Any


def extract_answer(text: str) -> str | None:
    """Return the number behind the last #### in one form, or None.

    1. The last #### counts, and only a number that stands right behind it (spaces, a minus and a $ may come before).
    2. Commas between digits go, and so do zeros that change nothing: "1,000" -> "1000", "42.0" -> "42", "42." -> "42"; a minus stays.
    3. Anything else behind the ####, as "41 or 42", is no answer: None.
    """
    raise NotImplementedError


class GSM8K:
    """Problems with a checkable answer."""

    def __init__(self, split: str, path: Path | None = None) -> None:
        """Read the rows of a split, "train" or "test".

        With a path: from the file path/<split>.jsonl, one row a line. Without: load_dataset("openai/gsm8k", "main").
        """
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def get_example(self, index: int) -> dict[str, Any]:
        """Return {"messages": [...], "answer": ...}: one user message with the question, and the extracted true answer."""
        raise NotImplementedError

    def reward(self, example: dict[str, Any], completion: str) -> float:
        """Return 1.0 if the completion's answer is the example's, else 0.0."""
        raise NotImplementedError
