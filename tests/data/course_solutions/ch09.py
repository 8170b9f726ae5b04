"""My judge: Decimal does the arithmetic of zeros."""

import decimal
import re

import pandas as pd


def extract_answer(text):
    pieces = text.split("####")
    if len(pieces) == 1:
        return None
    line = pieces[-1].strip(" \t").split("\n")[0].strip()
    negative = False
    if line.startswith("-"):
        negative, line = True, line[1:].lstrip()
    line = line.removeprefix("$").strip()
    if not negative and line.startswith("-"):
        negative, line = True, line[1:]
    if not re.fullmatch(r"(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?", line, re.ASCII) or not re.search(r"\d", line):
        return None
    value = decimal.Decimal(line.replace(",", ""))
    if negative:
        value = -value
    with decimal.localcontext() as c:
        c.prec = 500
        value = value.normalize()
    value = value + 0 if value == 0 else value
    return "0" if value == 0 else f"{value:f}"


class GSM8K:
    def __init__(self, split, path=None):
        if path is None:
            from datasets import load_dataset

            self.rows = list(load_dataset("openai/gsm8k", "main", split=split))
        else:
            self.rows = pd.read_json(path / f"{split}.jsonl", lines=True, dtype=False).to_dict("records")

    def __len__(self):
        return len(self.rows)

    def get_example(self, index):
        row = self.rows[index]
        return {
            "messages": [{"role": "user", "content": row["question"]}],
            "answer": extract_answer(row["answer"]),
        }

    def reward(self, example, completion):
        answer = extract_answer(completion)
        return float(answer is not None and answer == example["answer"])
