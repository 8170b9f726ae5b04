"""The step: the same update, however its rows are split."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker

from edu.command import parse
from edu.config import PretrainConfig, RLConfig, SFTConfig
from edu.optim import lr_factor


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    return worker.train(micro_batch_size=9)


def check_equal(found: tuple, expected: tuple) -> None:
    for name, p in expected[0].items():
        torch.testing.assert_close(found[0][name], p, atol=1e-7, rtol=0, msg=name)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_accumulation_changes_nothing(reference: tuple, micro_batch_size: int) -> None:
    check_equal(worker.train(micro_batch_size), reference)


def test_two_processes_make_the_update_of_one(reference: tuple, tmp_path: Path) -> None:
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    port = str(20000 + (os.getpid() + 7) % 20000)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command = [sys.executable, *launch, "tests/worker.py", str(tmp_path), "2"]
    subprocess.run(command, env=env, check=True, timeout=180, capture_output=True)
    for rank in range(2):
        check_equal(torch.load(tmp_path / f"{rank}.pt"), reference)


def test_schedule_depends_on_the_step_alone() -> None:
    factors = [lr_factor(step, 100, warmup=10, decay=0.4) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[60] == 1.0
    assert factors[80] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.03


@pytest.mark.parametrize("config", [PretrainConfig, SFTConfig, RLConfig])
def test_settings_are_checked_by_name(config: type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--batch-size 0"):
        config(batch_size=0)
    settings = tmp_path / "x.yaml"
    settings.write_text("max_steps: 7\nout: here\n")
    parsed = parse(config, ["--config", str(settings), "--seed", "3"])
    assert (parsed.max_steps, parsed.seed, parsed.out) == (7, 3, Path("here"))
    settings.write_text("max_stepz: 7\n")
    with pytest.raises(ValueError, match="unknown setting 'max_stepz'"):
        parse(config, ["--config", str(settings)])
    with pytest.raises(ValueError, match=r"nowhere.yaml: no such file"):
        parse(config, ["--config=nowhere.yaml"])
