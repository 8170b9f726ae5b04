"""Challenge 9: grade-school math (GSM8K, Cobbe et al. 2021, arXiv:2110.14168), from the Hub or from files of the same form.

A row holds `question` and `answer`: reasoning with calculator annotations `<<48/2=24>>24`, then a last line `#### 72`.
"""

import re
import unicodedata
from pathlib import Path
from typing import Any

from edu.data.rows import hub_rows, read_rows, text_field
from edu.tasks.task import Example

MAX_ANSWERS = 2  # answers a completion may print: its last one counts, so this allows it to correct itself once
MISSING = "{path}: no such file. The embedded problems are made by: python scripts/download_shards.py --source tiny"

_MARKER = re.compile(r"(?<!#)####(?!#)")
_NUMBER = re.compile(
    r"\s*([+-]?)\s*(?:(?:US|CA|AU|NZ|HK|R|A|C|S)?\$|(?:USD|EUR|GBP|JPY|INR|CNY|CHF|CAD|AUD|Rs\.?)(?=[\s+-]*[0-9.]))?"
    r"\s*([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
)
# Right behind the number, perhaps after spaces, hyphens or a currency; M is a million, m is a unit (meters, minutes).
_SCALED = re.compile(
    r"[\s$-]*(?:[kK]|M|MM|B|T|(?i:mio|mrd|mill?|mln|mn|bn|bil|bln|lac|gross|tens|tn|trn|tril|grand|dozens?|half|halves|thirds|fourths|fifths|sixths|eighths|tenths))"
    r"(?![a-zA-Z]|-[a-zA-Z])"
)
# Anywhere behind it: "5 and a half", "5 (in thousands)", "5 whole million".
_SCALED_LATER = re.compile(
    r"(?i)\b(?:hundred|thousand|million|billion|trillion|quadrillion|quintillion|lakh|crore)(?:ths?|s|\b)"
    r"|\bpoint\s+(?:zero|oh|one|two|three|four|five|six|seven|eight|nine)\b"
    r"|(?:\b(?:and|plus)\b|[&+])[\s-]*(?:[a-z]+[\s-]+){0,2}(?:half|halves|quarters?|thirds?|fourths?|fifths?|sixths?|eighths?|tenths?)\b"
    r"|\b(?:and|plus)[\s-]+(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b"
)
_GROUPED = re.compile("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")  # spaces that do not break: 1 000
_PLAIN = str.maketrans(
    {chr(0xFF10 + i): str(i) for i in range(10)}  # full-width digits
    | dict.fromkeys("\u2212\uff0d\ufe63\u2010\u2011\u2012\u2013", "-")  # minus signs, hyphens, the dash typed for one
    | {"\uff0b": "+", "\uff0c": ",", "\uff0e": "."}
    | dict.fromkeys("*_`\\", " ")  # bold, italic and code marks; the backslash of \$
)


def plain_number(text: str) -> str:
    """Replace typographic characters by those of a keyboard: digits, minus signs, currencies, spaces, bold marks."""
    text = _GROUPED.sub(",", text).translate(_PLAIN)
    return "".join("$" if unicodedata.category(char) == "Sc" else char for char in text)


def normalize(text: str) -> str | None:
    """Return the number that `text` begins with in one form, so that equal values are equal strings; None without one.

    A sign, a currency, bold marks and thousands separators may be part of it, and a unit may follow. A second number may
    not, nor a word that scales it ("5 million", "5M", "5 and a half"): its value would be another.

    >>> [normalize(text) for text in ("$1,000.00", " -0.50 euros", "10.", "+007", "ten", "10 or 12", "10k", "1/2")]
    ['1000', '-0.5', '10', '7', None, None, None, None]
    """
    text = plain_number(text)
    match = _NUMBER.match(text)
    if match is None or (match[1] and match[2]):
        return None
    behind = text[match.end() :]
    if _SCALED.match(behind) or _SCALED_LATER.search(behind) or any(char.isnumeric() for char in behind):
        return None
    whole, _, decimals = match[3].replace(",", "").partition(".")
    value = f"{whole.lstrip('0') or '0'}.{decimals.rstrip('0')}".rstrip(".")
    return f"-{value}" if "-" in (match[1], match[2]) and value != "0" else value


def extract_answer(text: str) -> str | None:
    """Return the number of the last "#### N" of a text in one form; None if there is none, or if its last "####" is not followed by one number on that line.

    >>> extract_answer("#### 5\\nNo, twice as many.\\n#### 1,000.00 dollars"), extract_answer("#### ten?")
    ('1000', None)
    """
    if not _MARKER.search(text):
        return None
    return normalize(_MARKER.split(text)[-1].partition("\n")[0])


def solves(completion: str, answer: str) -> bool:
    """Tell whether the last "#### N" of a completion has the value of the answer.

    Only the last one counts, so a list of guesses earns no more than a guess; more than two answers are a list, and solve nothing.

    >>> solves("#### $10.00", "10"), solves("#### 9\\n#### 10\\n#### 11\\n#### 10", "10")
    (True, False)
    """
    truth = normalize(answer)
    if truth is None:
        raise ValueError(f"the ground truth {answer!r} is not a number")
    return len(_MARKER.findall(completion)) <= MAX_ANSWERS and extract_answer(completion) == truth


class GSM8K:
    """The problems of a split as a task. Extra fields of the rows (kind, template, steps, ...) are passed through.

    split: "train" or "test"; for local files any name that has a file
    path: a file named *.jsonl, or a folder that holds `{split}.jsonl`; without it the data set comes from the Hub
    config: "main", or "socratic" (the same problems, the solutions as questions and answers); for the Hub only
    Raises ValueError naming the file and row on bad data, FileNotFoundError naming the missing file.
    """

    def __init__(self, split: str, path: str | Path | None = None, config: str = "main") -> None:
        if path is None:
            rows = list(hub_rows("openai/gsm8k", config, split))
        else:
            file = Path(path) if Path(path).suffix == ".jsonl" else Path(path) / f"{split}.jsonl"
            if not file.is_file():
                raise FileNotFoundError(MISSING.format(path=file))
            rows = list(read_rows(file))
        self.examples = [_example(row, place) for place, row in rows]

    def __len__(self) -> int:
        return len(self.examples)

    def get_example(self, index: int) -> Example:
        """`messages` (the question), `answer` ("72"), `solution` (the worked answer), and the row's other fields."""
        return self.examples[index]

    def reward(self, example: Example, completion: str) -> float:
        """1.0 if the completion solves the problem, else 0.0."""
        return float(solves(completion, example["answer"]))


def _example(row: dict[str, Any], place: str) -> Example:
    question, solution = text_field(row, "question", place), text_field(row, "answer", place)
    answer = extract_answer(solution)
    if answer is None:
        raise ValueError(f"{place}: field 'answer' does not end in a line '#### <number>'")
    messages = [{"role": "user", "content": question}]
    return {**row, "messages": messages, "answer": answer, "solution": solution}
