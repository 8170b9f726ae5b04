"""Challenge 9: problems with a checkable answer, and a reward that compares values and cannot be talked into anything."""

import asyncio
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gsm8k_answers import ANSWERS
from hypothesis import given
from hypothesis import strategies as st

from edu.chat.calculator import calculate
from edu.chat.chat_format import parse_completion, render, stream_text
from edu.chat.mixture import conversation
from edu.data.rows import read_rows
from edu.data.tokenizer import Tokenizer
from edu.tasks.choice import Choice
from edu.tasks.gsm8k import GSM8K, extract_answer, normalize
from edu.tasks.load import load, load_task
from edu.tasks.mixture import Mixture
from edu.tasks.score import completion_text, score, score_all
from edu.tasks.trl import TRLGrader, as_trl_reward

SOLUTION = "Half of 48 is 48/2=<<48/2=24>>24 clips.\nTogether 48+24=<<48+24=72>>72 clips.\n#### 72"
ROW = {
    "question": "48 clips, then half as many. How many?",
    "answer": SOLUTION,
    "kind": "/+",
    "template": "clips",
    "steps": 2,
}


def flatten(messages: list[dict[str, Any]]) -> str:
    """The inverse of `conversation`: the assistant's and the tool's messages as one annotated answer."""
    parts: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            parts.append(f"={message['content']}>>")
        elif message["role"] == "assistant":
            parts.append(message["content"])
            parts += [f"<<{call['function']['arguments']['expression']}" for call in message.get("tool_calls", ())]
    return "".join(parts)


# What a completion says after its reasoning: for a ground truth of 10, all these are right ...
RIGHT_10 = "|".join(
    (
        "#### 10|####10|####  10|####\t10|#### 10 |#### 10.|#### 10.0|#### 10.00|#### 10.000000000000|#### $10|#### $10.00|#### $ 10|#### +10|#### 010|#### 0010.0",
        "#### 10 dollars|#### 10 apples|#### 10apples|#### 10%|#### 10 %|#### 10!|#### 10,|#### 10;|#### no #### 10|#### 10€|#### €10|#### £10|#### $10.|#### 10 dollars.",
        "#### 10 (ten)|#### 10 m|#### 10 kg|#### 10 km|#### 10 - done|#### 10**|**#### 10**|the answer is #### 10|Answer: #### 10 clips|#### 10 #|#### 10 \n|#### 10\r|#### 10=|#### 10 =",
        "#### 5\n#### 10|#### 5 #### 10|#### 1000\nNo.\n#### 10|#### ten\n#### 10|#### 10\n#### 10|####\n#### 10|#### 10\nbye|#### 10\n5|#### 10\n |\n#### 10|\n\n\n#### 10\n\n",
        '1 2 3 4 5 6\n#### 10|10 is not 11\n#### 10|##### 5\n#### 10|# 5\n#### 10|## 5\n#### 10|### 5\n#### 10|<<5*2=10>>10\n#### 10|<<#### 10|#### 10j|#### 10 é|#### 10 🙂|#### 10 ""|#### 10 x',
    )
).split("|")
# ... and all these are wrong.
WRONG_10 = "|".join(
    (
        "|10|#### |####|###10|### 10|##### 10|###### 10|#10|# # # # 10|## ## 10|#### ten|#### ten?|#### ten 10|#### Ten|#### x10|#### =10|#### = 10|#### about 10|#### ~10|#### >10|#### ≈10",
        "#### -10|#### - 10|#### -$10|#### $-10|#### --10|#### +-10|#### -+10|#### −10|#### (10)|#### [10]|#### {10}|#### \"10\"|#### '10'|#### \\boxed{10}|#### #10",
        "#### 100|#### 1000|#### 1|#### 0|#### 11|#### 9|#### 10.1|#### 10.01|#### 10.000000000001|#### 9.999999999999|#### 9.9999999999999999999999|#### .10|#### 0.10|#### 1.0|#### 01|#### 1 0|#### 1,0|#### 1_0",
        "#### 10 11|#### 10, 11|#### 10,11|#### 10 or 11|#### 10 or 12|#### 9 10|#### 9 or 10|#### 10 12 14|#### 10/11|#### 10/1|#### 20/2|#### 5*2|#### 5+5|#### 2x5|#### 10-0|#### 10+0|#### 10^1|#### 10**1|#### 10:00|#### 10.0.0|#### 10..0|#### 10.5.|#### 10 dollars and 50 cents",
        "#### 10e0|#### 1e1|#### 1E1|#### 10E0|#### 0xA|#### 0b1010|#### 0o12|#### 10 <<5*2=|#### 10k1|#### 10k|#### 10 k|#### 10K|#### 10 thousand|#### 10 million|#### 10 hundred|#### 10 dozen|#### 10 Billion|#### 10,000|#### 10,00|#### 10,0|#### 1,0.0",
        "#### १०|#### ١٠|#### 10０|#### 10½|#### 10²|#### ⑩|#### Ⅹ|#### 10٠|#### 十|#### 1\x000|#### 1\u200b0|#### \u200b10|#### \x0010|＃＃＃＃ 10|####\n10|####\n\n10|####\r\n10|####:10|####: 10|####-10|#### nan|#### inf|#### -inf|#### None|#### True|#### 10\u202811",
        "#### 10\n#### 11|#### 10 #### 11|#### 10\n####|#### 10\n#### |#### 10\n#### ten|#### 10\n#### no|#### 10 ####|#### 10\n#### 5 or 10|#### 10\n#### -10|#### 10#### 9",
        "#### 8\n#### 9\n#### 10|#### 10\n#### 10\n#### 10|#### 8 #### 9 #### 10|####\n####\n#### 10|#### #### #### 10|#### 10\n#### 10\n#### 10\n#### 10",
        "10\n10\n10|The answer is 10.|answer: 10|A: 10|\\boxed{10}|<answer>10</answer>|<<5*2=10>>10|<<5*2=10>>|##\n## 10|# ### 10|#\u200b### 10",
    )
).split("|")
MANY = [
    "\n".join(f"#### {i}" for i in range(1, 11)),
    "\n".join(f"#### {i}" for i in range(20)),
    " ".join(f"#### {i}" for i in range(11)),
]
HUGE = [
    "#### " + "9" * 10**6,
    "#### 10" + "0" * 10**6,
    "#### 10." + "0" * 10**6 + "1",
    "#" * 10**6 + " 10",
    "#### " + "1," * 10**5 + "10",
]
OTHER_TRUTHS = [
    ("1000", "#### 1,000", 1), ("1000", "#### $1,000.00", 1), ("1000", "#### 1000.0", 1), ("1000", "#### 1,000.00 dollars", 1),
    ("1000", "#### 1,00", 0), ("1000", "#### 1,0000", 0), ("1000", "#### 1 000", 0), ("1000", "#### 1.000", 0), ("1000", "#### ,1000", 0),
    ("1000", "#### 1,,000", 0), ("1000", "#### 10,00", 0), ("1000", "#### 1000,", 1), ("1000", "#### 1,000,", 1), ("1000", "#### 1k", 0),
    ("1234567", "#### 1,234,567", 1), ("1234567", "#### 1234,567", 0), ("1234567", "#### 1,234567", 0), ("1234567", "#### 1,234,56", 0),
    ("-5", "#### -5", 1), ("-5", "#### -5.0", 1), ("-5", "#### -$5", 1), ("-5", "#### $-5", 1), ("-5", "#### - 5", 1), ("-5", "#### 5", 0),
    ("-5", "#### --5", 0), ("-5", "#### (5)", 0), ("-5", "#### 5-", 0), ("0", "#### 0", 1), ("0", "#### -0", 1), ("0", "#### 0.00", 1),
    ("0", "#### 00", 1), ("0", "#### .0", 1), ("0", "#### .", 0), ("0", "#### -", 0), ("0", "#### zero", 0), ("0", "#### 0.0000000001", 0),
    ("0.5", "#### .5", 1), ("0.5", "#### 0.50", 1), ("0.5", "#### 50%", 0), ("0.5", "#### 1/2", 0), ("0.5", "#### ½", 0), ("0.5", "#### 5", 0),
    ("2.5", "#### 2.50", 1), ("2.5", "#### $2.5", 1), ("2.5", "#### 2,5", 0), ("2.5", "#### 2 1/2", 0), ("2.5", "#### 2.5.", 1),
    ("1,000", "#### 1000", 1), ("$10.00", "#### 10", 1), ("10.", "#### 10", 1), ("12345678901234567890", "#### 12345678901234567891", 0),
    ("12345678901234567890", "#### 12,345,678,901,234,567,890.0", 1), ("0.1", "#### 0.1000000000000000055511151231257827", 0),
]  # fmt: skip

# Numbers as people type them. For a ground truth of 5, all these are right ...
RIGHT_5 = "|".join(
    (
        "#### **5**|#### *5*|#### __5__|#### _5_|#### `5`|####**5**|**####** 5|#### **5** apples|#### **5 apples**|#### **$5**|#### $**5**|#### **5.0**|#### **5.**|#### ***5***|#### ``5``|**#### 5**",
        "#### ５|#### ５.０|#### ０５|#### ５．０|#### ＋５|#### $５|#### ５ apples|#### **５**|####\u00a05|#### \u00a05|####\u202f5|####\u20095|####\u30005|#### 5\u00a0apples|#### 5\u00a0|#### $\u00a05|#### 5\u202f€",
        "#### ¥5|#### ₹5|#### ₩5|#### ₽5|#### ₺5|#### ₫5|#### ₿5|#### ¢5|#### 5¢|#### 5 ₹|#### 5₽|#### US$5|#### US$ 5|#### A$5|#### C$5|#### R$5|#### NZ$5|#### HK$5|#### CA$5.00|#### AU$5|#### S$5|#### \\$5|#### USD 5|#### EUR 5.00|#### GBP5|#### Rs 5|#### Rs. 5|#### INR 5|#### CHF 5|#### JPY 5|#### 5 USD|#### 5 EUR|#### 5 Rs|#### ＄5|#### £ 5|#### €\u00a05",
        "#### 5 m|#### 5m|#### 5 mm|#### 5 ml|#### 5 min|#### 5 minutes|#### 5 miles|#### 5 men|#### 5 mice|#### 5 kg|#### 5kg|#### 5 km|#### 5 kids|#### 5 KB|#### 5MB|#### 5 GB|#### 5 bananas|#### 5 bottles|#### 5 boxes|#### 5 B-flats|#### 5 T-shirts|#### 5 tons|#### 5 trips|#### 5 thanks",
        "#### 5 quarters|#### 5 third graders|#### 5 and done|#### 5 apples and pears|#### 5 apples and a pear|#### 5 dozers|#### 5 Mondays|#### 5 bills|#### 5 milkshakes|#### 5 grandparents|#### 5 billboards|#### 5 thousandaires|#### 5 hundredweight",
    )
).split("|")
# ... and these, which scale the number or hold another one, are wrong.
WRONG_5 = "|".join(
    (
        "#### 5 mil|#### 5mil|#### 5 Mil|#### 5 mil.|#### 5M|#### 5 M|#### $5M|#### 5M$|#### 5 M dollars|#### 5MM|#### 5 mln|#### 5 mn|#### 5Mio|#### 5 Mio.|#### 5 million|#### 5million|#### 5-million|#### 5–million|#### 5 - million|#### 5\u00a0million|#### 5\u202fmillion|#### 5\tmillion|#### 5  million|#### 5 MILLION|#### 5 millions|#### 5 million dollars|#### **5** million|#### **5 million**|#### 5_million|#### 5 whole million|#### 5 (million)|#### 5 or so million",
        "#### 5 bn|#### 5bn|#### 5 BN|#### 5B|#### 5 B|#### 5 bil|#### 5 billion|#### 5-billion|#### 5 Mrd|#### 5 mrd.|#### 5T|#### 5 T|#### 5 tn|#### 5trn|#### 5 tril|#### 5 trillion|#### 5 k|#### 5k|#### 5K|#### 5-k|#### 5 K dollars|#### 5 grand|#### 5 thousand|#### 5-thousand|#### 5 thousands|#### 5 in thousands|#### 5 (in thousands)|#### 5 hundred|#### 5 hundreds|#### 5-hundred|#### 5 dozen|#### 5 dozens|#### 5-dozen|#### 5 lakh|#### 5 lakhs|#### 5 crore|#### 5 hundredths|#### 5 thousandths|#### 5 tenths|#### 5万|#### 5億|#### 5百",
        "#### 5 and a half|#### 5 and half|#### 5 & ½|#### 5½|#### 5 ½|#### 5 and one half|#### 5 and a quarter|#### 5 and three quarters|#### 5 and two thirds|#### 5 and a third|#### 5 plus a half|#### 5 dollars and a half|#### 5 and a half dollars|#### **5** and a half|#### 5 half|#### 5 halves|#### 5 thirds|#### 5 fifths|#### 5 1/2|#### 5⅓|#### 5 ¼|#### 5 and 1/2",
        "#### −5|####−5|#### －5|#### ﹣5|#### –5|#### ‑5|#### −$5|#### $−5|#### **−5**|#### −５|#### 5０|#### ５０|#### 5 ５|#### ５ or ６|#### **5** 6|#### **5** or **6**|#### 5\u00a06|#### **|#### ** **|#### $|#### US$|#### USD|#### ５５|#### 0.５|#### ．5",
    )
).split("|")
MORE_TRUTHS = [
    ("-5", "#### −5", 1), ("-5", "####−5", 1), ("-5", "#### －５", 1), ("-5", "#### ﹣5", 1), ("-5", "#### –5", 1), ("-5", "#### ‑5", 1),
    ("-5", "#### −$5", 1), ("-5", "#### $−5", 1), ("-5", "#### **−5**", 1), ("-5", "#### −\u00a05", 1), ("-5", "#### −5.0", 1), ("-5", "#### −−5", 0),
    ("-5", "#### -−5", 0), ("-5", "#### −5 million", 0), ("-5", "#### +−5", 0), ("-5", "#### —5", 0),
    ("1000", "#### 1\u00a0000", 1), ("1000", "#### 1\u202f000", 1), ("1000", "#### 1\u2009000", 1), ("1000", "#### １,０００", 1), ("1000", "#### １，０００", 1),
    ("1000", "#### **1,000**", 1), ("1000", "#### ₹1,000", 1), ("1000", "#### 1\u00a0000 dollars", 1), ("1000", "#### 1\u00a000", 0), ("1000", "#### 1\u00a00000", 0),
    ("1000000", "#### 1\u00a0000\u00a0000", 1), ("1000000", "#### 1 million", 0), ("1000000", "#### 1M", 0), ("1000000", "#### 1,000,000", 1),
    ("5000000", "#### 5 million", 0), ("5000000", "#### 5M", 0), ("5000", "#### 5k", 0), ("60", "#### 5 dozen", 0), ("0.5", "#### ０.５", 1), ("0.5", "#### **.5**", 1),
    ("2.5", "#### 2 and a half", 0), ("2.5", "#### ２．５", 1), ("50000", "#### 5万", 0), ("5.5", "#### 5 and a half", 0),
]  # fmt: skip


ADVERSARIAL = [
    *[("10", text, 1.0) for text in RIGHT_10],
    *[("10", text, 0.0) for text in [*WRONG_10, *MANY, *HUGE]],
    *[("10", text, 1.0) for text in ("#### **10**", "#### *10*", "#### `10`", "#### １０", "#### 1０", "####\u00a010")],
    *[("5", text, 1.0) for text in RIGHT_5],
    *[("5", text, 0.0) for text in WRONG_5],
    *[(truth, text, float(expected)) for truth, text, expected in OTHER_TRUTHS + MORE_TRUTHS],
    *[(truth, f"#### {text}", 1.0) for truth, right, _ in ANSWERS for text in right.split("|")],
    *[(truth, f"#### {text}", 0.0) for truth, _, wrong in ANSWERS for text in wrong.split("|")],
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GSM8K:
    path = tmp_path_factory.mktemp("problems") / "train.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps({"question": "One?", "answer": "#### 1,000"}) + "\n")
    return GSM8K("train", path.parent)


# The reward


@pytest.mark.parametrize(("truth", "completion", "expected"), ADVERSARIAL, ids=lambda value: ascii(value)[:32])
def test_reward_compares_values_and_nothing_else(task: GSM8K, truth: str, completion: str, expected: float) -> None:
    assert task.reward({"answer": truth}, completion) == expected


def test_the_table_holds_500_different_completions() -> None:
    assert len({(truth, text) for truth, text, _ in ADVERSARIAL}) == len(ADVERSARIAL) >= 500


def test_the_last_answer_wins_and_a_list_of_guesses_earns_nothing(task: GSM8K) -> None:
    example = {"answer": "7"}
    assert [task.reward(example, text) for text in ("#### 6\n#### 7", "#### 7\n#### 6")] == [1.0, 0.0]
    for guesses in range(3, 20):
        for last in range(20):
            text = "\n".join(f"#### {i}" for i in [*range(guesses - 1), last])
            assert task.reward(example, text) == 0.0


@given(
    st.integers(-(10**12), 10**12),
    st.integers(0, 3),
    st.sampled_from(["", "$"]),
    st.sampled_from(["", " dollars", "."]),
)
def test_every_way_of_writing_a_number_normalizes_to_one(n: int, zeros: int, currency: str, unit: str) -> None:
    decimals = "." + "0" * zeros if zeros else ""
    sign = "-" if n < 0 else ""
    for number in (f"{abs(n)}", f"{abs(n):,}", f"00{abs(n)}"):
        assert normalize(f"{sign}{currency}{number}{decimals}{unit}") == str(n)


@given(st.text(max_size=30) | st.text("0123456789.,-+$# \n", max_size=30))
def test_an_extracted_answer_is_none_or_in_normal_form(text: str) -> None:
    answer = extract_answer("#### " + text)
    assert answer is None or (re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", answer) and answer != "-0")
    assert answer is None or normalize(answer) == answer


def test_a_ground_truth_that_is_no_number_is_an_error_not_a_reward(task: GSM8K) -> None:
    with pytest.raises(ValueError, match="ground truth 'ten'"):
        task.reward({"answer": "ten"}, "#### 10")


# Conversations


def test_a_worked_answer_becomes_calls_that_the_calculator_confirms_and_back() -> None:
    messages = conversation(ROW["question"], SOLUTION)
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    calls = [m["tool_calls"][0]["function"]["arguments"]["expression"] for m in messages if "tool_calls" in m]
    assert calls == ["48/2", "48+24"]
    assert [m["content"] for m in messages if m["role"] == "tool"] == [calculate(call) for call in calls]
    assert messages[-1] == {"role": "assistant", "content": "72 clips.\n#### 72"}
    assert flatten(messages) == SOLUTION


@given(
    st.lists(
        st.sampled_from(["text ", "24", "\n", "<<48/2=24>>", "<<1+1=2>>", "<<", ">>", "=", "<<>>", "é"]), max_size=12
    )
)
def test_flatten_undoes_conversation(parts: list[str]) -> None:
    assert flatten(conversation("q", "".join(parts))) == "".join(parts)


def test_a_rendered_solution_scores_1_and_its_tool_blocks_are_not_part_of_the_text(
    task: GSM8K, tokenizer: Tokenizer
) -> None:
    rendered = render(conversation(ROW["question"], SOLUTION), tokenizer)
    tokens = rendered.ids[rendered.ids.index(tokenizer.assistant_start) + 1 :]
    assert completion_text(tokens, tokenizer) == "Half of 48 is 48/2=24 clips.\nTogether 48+24=72 clips.\n#### 72"
    assert completion_text(tokens, tokenizer) == "".join(stream_text(tokens, tokenizer))
    assert flatten(parse_completion(tokens, tokenizer)) == SOLUTION
    example = task.get_example(0)
    assert score(Sample(tokens, "stop"), example, task, tokenizer) == 1.0
    assert score(Sample(tokens, "length"), example, task, tokenizer) == 0.0
    assert score(Sample(tokens, "tool_error"), example, task, tokenizer) == 0.0


def test_what_a_tool_forces_cannot_be_the_answer(task: GSM8K, tokenizer: Tokenizer) -> None:
    t = tokenizer
    block = [t.python_start, *t.encode("70+2"), t.python_end, t.output_start, *t.encode("72"), t.output_end]
    example = task.get_example(0)
    for tokens in (
        [*t.encode("#### "), *block, t.assistant_end],
        [t.python_start, *t.encode("#### 72"), t.assistant_end],
        [t.output_start, *t.encode("#### 72"), t.assistant_end],
        [*t.encode("#### 7"), *block, t.assistant_end, *t.encode("2")],
        [t.assistant_end, *t.encode("#### 72")],
        [t.assistant_end],
        [],
    ):
        assert score(Sample(tokens, "stop"), example, task, tokenizer) == 0.0
    assert (
        score(Sample([*t.encode("#### "), *block, *t.encode("72"), t.assistant_end], "stop"), example, task, tokenizer)
        == 1.0
    )


@dataclass
class Sample:
    tokens: list[int]
    finish_reason: str


@given(data=st.data())
def test_the_graded_text_is_what_a_reader_sees(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(
        st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.integers(tokenizer.bos, tokenizer.pad), max_size=30)
    )
    assert completion_text(tokens, tokenizer) == "".join(stream_text(tokens, tokenizer))


# Data


def test_examples_hold_question_answer_and_the_rows_other_fields(task: GSM8K) -> None:
    assert len(task) == 2
    example = task.get_example(0)
    assert example["messages"] == [{"role": "user", "content": ROW["question"]}]
    assert (example["answer"], example["solution"]) == ("72", SOLUTION)
    assert (example["kind"], example["template"], example["steps"]) == ("/+", "clips", 2)
    assert task.get_example(1)["answer"] == "1000"
    assert all(task.reward(task.get_example(i), task.get_example(i)["solution"]) == 1.0 for i in range(len(task)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("\n\n", "no rows"),
        ('{"question": "a", "answer": "#### 1"}\n{"question": ', "row 2: not valid JSON"),
        ("\n[1, 2]", "row 2: expected a JSON object, found list"),
        ('{"answer": "#### 1"}', "row 1: field 'question' is missing"),
        ('{"question": "a"}', "row 1: field 'answer' is missing"),
        ('{"question": "a", "answer": 72}', "row 1: field 'answer' is missing or is not text"),
        ('{"question": " ", "answer": "#### 1"}', "row 1: field 'question' is missing or is not text"),
        ('{"question": "a", "answer": "72"}', "row 1: field 'answer' does not end in a line '#### <number>'"),
        ('{"question": "a", "answer": "#### ten"}', "row 1: field 'answer' does not end"),
        ('{"question": "\udcff", "answer": "#### 1"}', "row 1: not UTF-8"),
        ('{"question": "\\ud800", "answer": "#### 1"}', "row 1: not valid JSON"),
        ("[" * 100_000, "row 1: not valid JSON"),
    ],
)
def test_bad_data_is_an_error_that_names_file_and_row(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(f"{path}")) as error:
        GSM8K("train", path)
    assert message in str(error.value)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl: no such file.*download_shards.py --source tiny"):
        GSM8K("test", tmp_path)


def test_without_a_path_the_rows_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: str, **options: str) -> list[dict[str, str]]:
        asked.append((args, options))
        return [{"question": "q", "answer": "a\n#### 3"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert GSM8K("test", config="socratic").get_example(0)["answer"] == "3"
    assert asked == [(("openai/gsm8k", "socratic"), {"split": "test"})]


# TRL's signature


def test_a_task_reward_serves_trl_in_both_of_its_formats(task: GSM8K) -> None:
    f = as_trl_reward(task.reward)
    texts = ["#### 72", "#### 71"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, chats):
        columns = {"answer": ["72", "72"], "kind": ["a", "b"], "trainer_state": object(), "log_metric": print}
        assert f(prompts=["p", "p"], completions=completions, completion_ids=[[1], [2]], **columns) == [1.0, 0.0]


def grade(trl_reward: Any, texts: list[str], **fields: Any) -> list[float]:
    """Rewards of answers to one problem."""
    example = {"messages": [{"role": "user", "content": ROW["question"]}], "answer": "72", **fields}
    return [score.reward for score in TRLGrader(trl_reward).grade([example] * len(texts), texts)]


def test_a_reward_written_for_trl_is_called_once_for_all_finished_answers(task: GSM8K, tokenizer: Tokenizer) -> None:
    calls = []

    def unique(prompts: list, completions: list, completion_ids: list, answer: list, kind: list, **_: Any) -> list:
        calls.append((prompts, completions, completion_ids, answer, kind))
        texts = [messages[-1]["content"] for messages in completions]
        return [texts.count(text) == 1 for text in texts]

    said = ["#### 72", "#### 7", "#### 7", "#### 1"]
    samples = [Sample([*tokenizer.encode(text), tokenizer.assistant_end], "stop") for text in said]
    samples[3].finish_reason = "length"
    examples = [task.get_example(0)] * 3 + [task.get_example(1)]
    scores = score_all(samples, examples, TRLGrader(unique).at_step(3, 10), tokenizer)
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0, 0.0]
    ((prompts, completions, ids, answers, kinds),) = calls
    assert prompts == [[{"role": "user", "content": ROW["question"]}]] * 3
    assert completions == [[{"role": "assistant", "content": text}] for text in said[:3]]
    assert (ids, answers, kinds) == ([sample.tokens for sample in samples[:3]], ["72"] * 3, ["/+"] * 3)
    assert not [s for s in score_all(samples[3:], examples[3:], TRLGrader(unique).grade, tokenizer) if s.reward]
    assert len(calls) == 1  # nothing finished, nothing asked


def test_rewards_may_be_async_and_share_one_event_loop() -> None:
    loops = []

    class Judge:
        async def __call__(self, completions: list, **_: Any) -> list[float]:
            await asyncio.sleep(0)
            loops.append(asyncio.get_running_loop())
            return [float(len(each[-1]["content"])) for each in completions]

    grader = TRLGrader(Judge())
    example = {"messages": [], "answer": ""}
    assert [score.reward for score in [*grader.grade([example], ["abc"]), *grader.grade([example], ["a"])]] == [3, 1]
    assert loops[0] is loops[1]


@pytest.mark.parametrize(
    "given",
    [[1, 0], (1.0, 0.0), [True, False], [np.bool_(1), np.float32(0)], np.array([1, 0]), torch.tensor([1.0, 0.0]),
     [torch.tensor(1), torch.tensor(0)], (float(i) for i in (1, 0)), [1.0, None]],
    ids=lambda given: "generator" if isinstance(given, Iterator) else str(given),  # its text is another in each process
)  # fmt: skip
def test_rewards_are_read_as_trl_reads_them(given: Any) -> None:
    assert grade(lambda **_: given, ["a", "b"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "given",
    [None, 1.0, "10", ["1.0", "0"], [math.nan, 0], [math.inf, 0], [0, -math.inf], [1e300, 0], [10**400, 0], [1.0], [1.0] * 3, [[1], [0]],
     np.array([np.nan, 0]), torch.tensor([[1.0], [0.0]])],
    ids=str,
)  # fmt: skip
def test_what_is_no_reward_for_each_answer_is_one_line_that_names_the_function(given: Any) -> None:
    def mine(**_: Any) -> Any:
        return given

    with pytest.raises(ValueError, match=r"^--reward mine gave [^\n]*$"):
        grade(mine, ["a", "b"])


def test_what_trl_hands_to_rewards_for_its_own_trainer_works() -> None:
    def logs(completions: list, trainer_state: Any, log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("seen", [each[-1]["content"] for each in completions])
        log_metric("count", 1.0)
        log_metric("count", 3.0)
        return [trainer_state.global_step + trainer_state.max_steps / 100] * len(completions)

    example = {"messages": [{"role": "user", "content": "q"}], "answer": "a"}
    first, second = TRLGrader(logs).at_step(7, 50)([example, example | {"more": 1}], ["x", "y"])
    assert (first.reward, first.columns, second.columns) == (7.5, {"seen": "x"}, {"seen": "y"})
    assert first.metrics == second.metrics == {"count": 2.0}


def test_the_adapters_undo_each_other(task: GSM8K) -> None:
    assert grade(as_trl_reward(task.reward), ["#### 72", "#### 7"]) == [1.0, 0.0]


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_trls_own_rewards_work_unchanged() -> None:
    rewards: Any = pytest.importorskip("trl.rewards")
    thought = "<think>48/2 is 24.</think>72"
    assert grade(rewards.think_format_reward, [thought, "72"]) == [1.0, 0.0]
    example = {"messages": [], "answer": "", "completion_ids": [5, 5, 5, 5, 5]}
    (repeated,) = TRLGrader(rewards.get_repetition_penalty_reward(2, -1.0)).grade([example], ["x"])
    (overlong,) = TRLGrader(rewards.get_soft_overlong_punishment(4, 2)).grade([example], ["x"])
    assert (repeated.reward, overlong.reward) == (-0.75, -1.0)


@pytest.mark.parametrize("reward", [None, "1", math.nan, math.inf])
def test_a_task_whose_reward_is_no_number_is_told_so(reward: Any, tokenizer: Tokenizer) -> None:
    task: Any = SimpleNamespace(reward=lambda *_: reward)
    with pytest.raises(ValueError, match="the task's reward of the answer '' is"):
        score(Sample([tokenizer.assistant_end], "stop"), {}, task, tokenizer)


# What the user wrote

T_CODE = """class make(list):
    def __init__(self, split):
        super().__init__([1])
    def get_example(self, i):
        return {example}
    def reward(self, example, text):
        return 0.0
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that docs/tasks.md shows, in the folder one works in."""
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_task_of_the_page_works_and_takes_40_lines(page: Path) -> None:
    lines = (page / "json_facts.py").read_text().splitlines()
    assert len([line for line in lines if line]) <= 40
    train, test = (load("json_facts.py:JsonFacts")(split) for split in ("train", "test"))
    asked = [[task.get_example(i)["messages"][0]["content"] for i in range(len(task))] for task in (train, test)]
    assert not set(asked[0]) & set(asked[1])
    example = train.get_example(0)
    fact = json.loads(example["answer"])
    spaced = json.dumps(dict(reversed(fact.items())), indent=2)
    assert [train.reward(example, text) for text in (example["answer"], spaced)] == [1.0, 1.0]
    for wrong in ("", "{", "Tom", example["answer"] * 2, json.dumps(fact | {"count": str(fact["count"])}), "[]", "NaN"):
        assert train.reward(example, wrong) == 0.0


def test_the_mixture_of_the_page_grades_each_example_by_its_own_task(page: Path) -> None:
    row = {"question": "Which is a colour?", "choices": ["dog", "red"], "answer": "B"}
    (page / "questions_test.jsonl").write_text(json.dumps(row))
    mixture = load("choices.py:both")("test")
    examples = [mixture.get_example(i) for i in range(len(mixture))]
    assert [example["source"] for example in examples].count("choice") == 2
    assert {mixture.reward(example, example["answer"]) for example in examples} == {1.0}


@pytest.mark.usefixtures("page")
def test_the_reward_of_the_page_prefers_short_answers_among_the_right_ones() -> None:
    reward = load("short_reward.py:short_and_right")
    short, long, wrong = grade(reward, ["#### 72", "So it is:\n#### 72", "#### 7"])
    assert 1.5 > short > long > 1 > wrong == 0


def test_a_file_may_import_its_neighbors(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("def length(text):\n    return float(len(text))\n")
    (tmp_path / "mine.py").write_text(
        "from beside_it import length\n\ndef reward(completions, **_):\n    return [length(c[-1]['content']) for c in completions]\n"
    )
    assert grade(load(f"{tmp_path}/mine.py:reward"), ["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def make(split):\n    return 1", "gave a int without __len__, get_example, reward"),
        ("def make():\n    return 1", "must take the split, 'train'"),
        ("def make(split:", "was never closed"),
        ("import no_such_module_here", "No module named"),
        (T_CODE.format(example="[]"), "example 0 of 'train': needs 'messages'"),
        (T_CODE.format(example="{}"), "example 0 of 'train': needs 'messages'"),
        (T_CODE.format(example="{'messages': 'hi'}"), "example 0 of 'train': needs 'messages'"),
        (T_CODE.format(example="{'messages': [{'role': 'user', 'content': 'q'}]}"), "needs 'answer'"),
    ],
)
def test_a_task_of_another_form_is_one_line_that_names_the_flag(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=rf"^--task {re.escape(str(tmp_path))}/mine\.py:make.*{re.escape(message)}"):
        load_task(f"{tmp_path}/mine.py:make", "train")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-le"])
def test_a_task_file_in_another_encoding_is_one_line(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "mine.py").write_text("def make(split):\n    return 1\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"^--task .*mine\.py:make: "):
        load_task(f"{tmp_path}/mine.py:make", "train")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere.py:Task", "nowhere.py:Task: no such file as nowhere.py"),
        ("json_facts.py:Nothing", "json_facts.py:Nothing: no function or class of that name"),
        ("json_facts.py:WHO", "json_facts.py:WHO: no function or class of that name"),
        ("json_facts.py", "json_facts.py: expected file.py:name"),
        ("no_such_package:f", "no_such_package:f: No module named 'no_such_package'; expected file.py:name"),
        ("json:nothing", "json:nothing: module 'json' has no attribute"),
    ],
)
@pytest.mark.usefixtures("page")
def test_a_wrong_place_says_what_is_wrong_with_it(place: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(place)


# Other tasks


def test_a_mixture_holds_every_example_and_grades_it_by_its_own_task(task: GSM8K, tmp_path: Path) -> None:
    path = tmp_path / "choice.jsonl"
    path.write_text(
        json.dumps({"question": "Which is a colour?", "choices": ["dog", "red", "run"], "answer": "B"}) + "\n"
    )
    mixture = Mixture({"math": task, "choice": Choice(path)}, repeats={"choice": 3}, seed=1)
    examples = [mixture.get_example(i) for i in range(len(mixture))]
    assert sorted(example["source"] for example in examples) == ["choice"] * 3 + ["math"] * 2
    rights = {"math": "#### {answer}", "choice": "({answer})"}
    assert all(mixture.reward(e, rights[e["source"]].format(**e)) == 1.0 for e in examples)
    assert [mixture.get_example(i) for i in range(5)] == [
        Mixture(mixture.tasks, {"choice": 3}, seed=1).get_example(i) for i in range(5)
    ]
    with pytest.raises(ValueError, match="repeats name poems"):
        Mixture({"math": task}, repeats={"poems": 2})


def test_multiple_choice_takes_one_letter_on_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "choice.jsonl"
    path.write_text(
        json.dumps({"question": "Which is a colour?", "choices": ["dog", "red", "run"], "answer": "B"}) + "\n"
    )
    task = Choice(path)
    example = task.get_example(0)
    assert example["messages"][0]["content"] == "Which is a colour?\nA) dog\nB) red\nC) run\nAnswer with one letter."
    for right in ("B", "B.", "(B)", "B)", " B \n", "A dog is an animal.\nB", "#### B", "####B"):
        assert task.reward(example, right) == 1.0
    for wrong in (
        "",
        "A",
        "b",
        "A B C",
        "A\nB\nC",
        "B or C",
        "red",
        "BB",
        "The answer is B, or A",
        "Β",
        "B\nA",
        "D",
        "\n",
        "# B",
    ):
        assert task.reward(example, wrong) == 0.0


@pytest.mark.parametrize(
    "change",
    [{"choices": ["one"]}, {"choices": "AB"}, {"answer": "D"}, {"answer": "AB"}, {"answer": ""}, {"choices": [1, 2]}],
)
def test_bad_choices_name_their_row(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "choice.jsonl"
    path.write_text(json.dumps({"question": "q", "choices": ["a", "b", "c"], "answer": "A"} | change))
    with pytest.raises(ValueError, match=r"choice\.jsonl, row 1: field"):
        Choice(path)


def test_rows_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}')
    assert list(read_rows(path)) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 3", {"a": 2})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_rows_in_another_encoding_are_refused_by_file_and_cure(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "caf\u00e9"}\n', encoding=encoding)
    with pytest.raises(ValueError, match=r"mine\.jsonl.*UTF-8"):
        list(read_rows(path))


def test_a_byte_order_mark_of_utf8_is_no_content(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"a": 1}\n', encoding="utf-8-sig")
    assert [row for _, row in read_rows(path)] == [{"a": 1}]


def test_a_damaged_parquet_file_of_rows_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(ValueError, match=r"mine\.parquet: not a readable parquet file"):
        list(read_rows(path))
