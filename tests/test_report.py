"""A report says what a run left, says what is missing, and never trips over what it finds."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edu.evaluation.report import read_stage, sections, write_report


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def interval(value: float) -> dict[str, float]:
    return {"accuracy": value, "low": value - 0.05, "high": value + 0.05, "n": 300}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three stages, small and made up."""
    folder = tmp_path / "small"
    rows: dict[str, list[dict[str, Any]]] = {
        "base": [{"step": s, "loss": 7 / (s + 1), "seconds": s / 2, "tokens": 64 * s} | ({} if s % 20 else {"bpb": 2 / (s + 1)}) for s in range(81)],
        "sft": [{"step": s, "loss": 3 / (s + 1)} for s in range(8)],
        "rl": [{"step": s, "loss": 0.0, "reward": s / 9, "completions/mean_length": 20 + s, "eval/pass@1": s / 10, "eval/pass@8": s / 9} for s in range(9)],
    }  # fmt: skip
    evaluations = {
        "base": {"stage": "base", "seconds": 190, "bpb": {"model": 0.31, "unigram": 2.4, "bigram": 1.4}},
        "sft": {"stage": "sft", "seconds": 30, "math": {"greedy": interval(0.45), "sampled": {"pass@1": 0.28}}},
        "rl": {
            "stage": "rl",
            "seconds": 150,
            "math": {"greedy": interval(0.82), "sampled": {"pass@1": 0.74}},
            "environment": {"transformers": "5.24.0"},
        },
    }
    for stage in rows:
        (folder / stage).mkdir(parents=True)
        (folder / stage / "metrics.jsonl").write_text(jsonl(rows[stage]))
        (folder / stage / "eval.json").write_text(json.dumps(evaluations[stage]))
        (folder / stage / "config.yaml").write_text("steps: 8\nbetas: [0.8, 0.95]\n")
        samples = [{"step": s, "prompt": "Who are <you>?", "completion": f"{stage} said {s} & <b>"} for s in (0, 4, 8)]
        (folder / stage / "samples.jsonl").write_text(jsonl(samples))
    return folder


class Checker(HTMLParser):
    """Every tag is closed in order, and nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)
        self.loaded += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value and value[0] != "#"
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def checked(page: Path) -> str:
    checker = Checker()
    checker.feed(page.read_text())
    assert (checker.open, checker.loaded) == ([], [])
    return page.read_text()


def test_page_is_well_formed_self_contained_and_says_everything_measured(run: Path) -> None:
    text = checked(write_report(run))
    for words in (
        "82.0% [77.0, 87.0], n=300",
        "28% → 74%",
        "6 min 10 s",
        "unigram 2.4",
        "prefers-color-scheme",
        "transformers",
    ):
        assert words in text
    assert text.count("<svg") == 7  # three losses, bits per byte, reward, pass@1 with pass@8, lengths


def test_samples_show_the_first_and_the_last_answer_and_cannot_inject_markup(run: Path) -> None:
    text = write_report(run).read_text()
    assert "sft said 0 &amp; &lt;b&gt;" in text
    assert "sft said 8 &amp; &lt;b&gt;" in text
    assert "sft said 4" not in text
    assert "Who are &lt;you&gt;?" in text


EVIL = "<script>alert(1)</script>\x1b[2J\x9b\u202e [x](javascript:a) ![y](//z) $\\frac$ </svg>"


def test_nothing_that_a_run_holds_is_obeyed_by_browser_terminal_or_markdown_viewer(run: Path) -> None:
    rows = [{"step": step, "loss": 1.0, f"pass@{EVIL}": 0.5, EVIL: 1} for step in range(3)]
    (run / "sft" / "metrics.jsonl").write_text(jsonl(rows))
    (run / "sft" / "samples.jsonl").write_text(jsonl([{"step": 0, "prompt": EVIL, "completion": f"a\r\n{EVIL}\n# b"}]))
    figures = {EVIL: {EVIL: 0.5, "deep": {EVIL: 1}}, "bpb": {"unigram": 2.0}, "environment": {EVIL: EVIL}}
    (run / "sft" / "eval.json").write_text(json.dumps(figures))
    (run / "base" / "config.yaml").write_text(json.dumps({EVIL: EVIL}))
    (run / "rl" / "config.yaml").write_text(f"{EVIL}: [")
    page = checked(write_report(run))
    text = (run / "report.md").read_text()
    assert page.count("&lt;script&gt;") >= 7
    assert "<script" not in page
    for written in (page, text, *(path.read_text() for path in (run / "report").glob("*.svg"))):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", written)
    prose = re.sub("^    .*$", "", text, flags=re.MULTILINE)  # code is shown as it is
    assert "<script" not in prose
    assert "[x](" not in prose
    assert "[y](" not in prose
    assert [line for line in text.splitlines() if line.startswith("# ")] == [text.splitlines()[0]]


def test_markdown_tells_the_same_and_its_figures_exist(run: Path) -> None:
    write_report(run)
    text = (run / "report.md").read_text()
    assert "| greedy | 45.0% [40.0, 50.0], n=300 | 82.0% [77.0, 87.0], n=300 |" in text
    images = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert images
    assert all((run / image).read_text().startswith("<svg") for image in images)


def test_a_missing_stage_is_said(run: Path) -> None:
    shutil.rmtree(run / "rl")
    (run / "sft" / "eval.json").unlink()
    text = checked(write_report(run))
    assert "No rl/ in the run" in text
    assert "sft/eval.json is missing" in text


ODD = ["", "null", "[]", "{}", "{", "nonsense", "3", '{"step": "a", "loss": []}\n', '{"math": [1, {"x": null}], "bpb": "?", "seconds": "long"}',
       '{"step": null, "prompt": [], "completion": null}\n', '{"math": {"greedy": {"accuracy": NaN, "low": null, "n": 3}}}', "\x00\xff"]  # fmt: skip


def test_odd_files_never_trip_the_report(run: Path) -> None:
    shutil.rmtree(run / "base")
    shutil.rmtree(run / "rl")
    for first in range(len(ODD)):
        for place, name in enumerate(("metrics.jsonl", "eval.json", "samples.jsonl", "config.yaml")):
            (run / "sft" / name).write_bytes(ODD[(first + place) % len(ODD)].encode("latin-1"))
        for part in sections(run):
            assert part.title
    checked(write_report(run))


def test_an_empty_run_still_has_a_report_and_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert "base/metrics.jsonl is missing" in checked(write_report(tmp_path))
    with pytest.raises(ValueError, match="--run"):
        write_report(tmp_path / "base")


def test_curves_leave_out_what_is_not_a_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        jsonl([{"step": 2, "bpb": 0.5}, {"step": 1, "bpb": None}, {"step": 0, "bpb": 3}])
    )
    assert read_stage(tmp_path).curve("bpb") == ([0, 2], [3, 0.5])


def test_report_needs_no_torch() -> None:
    code = "import sys, edu.evaluation.report, edu.hub.push; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
