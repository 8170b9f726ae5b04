"""The metrics file survives kills and resumes; figures and progress print what they should."""

import json
from pathlib import Path

import numpy as np
import pytest

from edu.config import metrics
from edu.config.metrics import DEFINITIONS, LOSS
from edu.config.terminal import progress
from edu.data.metrics_log import MetricsLog, read_metrics
from edu.evaluation.estimates import estimates


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(3, {LOSS: 2.5, "reward": None, "tokens": 10})
        assert read_metrics(path) == [{"step": 3, "loss": 2.5, "reward": None, "tokens": 10}]


def test_what_json_cannot_hold_becomes_null_and_other_libraries_numbers_become_plain(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(0, {"a": float("nan"), "b": float("-inf"), "c": np.float32(0.5)})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"step": 0, "a": None, "b": None, "c": 0.5}


def test_resuming_drops_the_rows_after_the_checkpoint_and_keeps_the_others_byte_for_byte(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    for path, last in ((whole, 8), (resumed, 6)):
        with MetricsLog(path) as log:
            for step in range(last):
                log.write(step, {LOSS: 1 / (step + 3), "note": "é"})
    with MetricsLog(resumed) as log:
        log.keep(lambda row: row["step"] <= 3)
        assert steps(resumed) == [0, 1, 2, 3]
        for step in range(4, 8):
            log.write(step, {LOSS: 1 / (step + 3), "note": "é"})
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2, "note": "\xc3', b"{"])
def test_a_line_torn_by_a_kill_is_forgotten_and_the_next_row_starts_a_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {})
    path.write_bytes(path.read_bytes() + torn)
    assert steps(path) == [1]
    with MetricsLog(path) as log:
        log.write(2, {})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_broken_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's own full disk")
def test_a_full_disk_is_said_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    log = MetricsLog.__new__(MetricsLog)
    log.path, log._file = path, path.open("a", encoding="utf-8")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        log.write(1, {})
    log.close()


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_every_metric_is_defined_in_one_line() -> None:
    assert all(meaning and "\n" not in meaning for meaning in DEFINITIONS.values())


def test_every_metric_stands_in_the_document_with_its_unit_and_what_is_healthy_and_no_other_does() -> None:
    lines = Path("docs/METRICS.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"`{name}`" for name in DEFINITIONS]
    for name, unit, meaning, healthy in rows:
        assert unit or name in ("`lr`", "`grad_norm`", "`reward_std`"), name
        assert meaning, name
        assert healthy, name
    constants = {value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)}
    assert constants == DEFINITIONS.keys()


def test_intervals_and_plain_numbers_are_told_apart_at_any_depth() -> None:
    tree = {
        "bpb": {"model": {"value": 0.31, "low": 0.30, "high": 0.32, "n": 400}},
        "math": {"sampled": {"pass@1": 0.7, "low": 0.65, "high": 0.75, "pass@8": 0.9}, "n": 300},
        "persona": {"intent": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 150}},
        "stage": "rl",
        "kept": True,
        "odd": [1, 2],
    }
    assert {" / ".join(path): str(estimate) for path, estimate in estimates(tree)} == {
        "bpb / model": "0.310 [0.300, 0.320], n=400",
        "math / sampled / pass@1": "70.0% [65.0, 75.0]",
        "math / sampled / pass@8": "90.0%",
        "math / n": "300",
        "persona / intent": "80.0% [70.0, 90.0], n=150",
    }


def test_progress_in_a_log_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(200, "pretraining", done=100) as bar:
        for _ in range(100):
            bar.advance(tokens=64, loss=1.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5  # resumed at one half: five tenths are left
    assert lines[0].startswith("pretraining: 120/200 (60%)")
    assert "tokens/s" in lines[0]
    assert "left" in lines[0]
    assert lines[-1].startswith("pretraining: 200/200 (100%)")


def test_progress_of_other_processes_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(2, "reading", quiet=True) as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_progress_in_a_terminal_draws_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress(2, "reading") as bar:
        bar.advance(2, tokens=10)
    assert "reading" in capsys.readouterr().err
