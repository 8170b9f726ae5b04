"""The plain solution of chapter 9: read rows, extract answers, compare."""

import json
import re
from pathlib import Path
from typing import Any

ANSWER = re.compile(r"\s*\$?\s*(-?\d[\d,]*(?:\.\d*)?)\s*(?:\n|$)")


def extract_answer(text: str) -> str | None:
    _, mark, behind = text.rpartition("####")
    found = ANSWER.match(behind)
    if not mark or found is None:
        return None
    number = found[1].replace(",", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return number


class GSM8K:
    def __init__(self, split: str, path: Path | None = None) -> None:
        if path is None:
            from datasets import load_dataset

            self.rows = list(load_dataset("openai/gsm8k", "main", split=split))
        else:
            lines = (path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            self.rows = [json.loads(line) for line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"messages": [{"role": "user", "content": row["question"]}], "answer": extract_answer(row["answer"])}

    def reward(self, example: dict[str, Any], completion: str) -> float:
        answer = extract_answer(completion)
        return float(answer is not None and answer == example["answer"])
