"""Chapter 8, over the years: a run that an earlier version of this code left is opened and finished by this one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_stages import steps_of

from edu.config.cli import parse
from edu.config.pretrain import PretrainConfig
from edu.config.sft import SFTConfig
from edu.config.stages import StageConfig
from edu.data.tokenizer import Tokenizer
from edu.model.load import load_model, load_tokenizer
from edu.stages.run import train

OLD_RUN = Path(__file__).parent / "data" / "old_run"
STAGES: dict[str, type[StageConfig]] = {"base": PretrainConfig, "sft": SFTConfig}
TOLERANCE = 2e-5
"""Relative, for another CPU than the one that recorded the losses, as in the golden test."""


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old run, as the kill left it; it is the working directory, since its settings hold relative paths."""
    home = shutil.copytree(OLD_RUN, tmp_path / "old_run")
    for stage in STAGES:
        for path in (home / stage / "checkpoint-3").iterdir():
            if path.is_file():
                os.link(path, home / stage / path.name)
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("name", STAGES)
def test_a_checkpoint_of_an_earlier_version_opens_with_the_weights_that_it_holds(name: str, old_run: Path) -> None:
    for folder in (old_run / name, old_run / name / "checkpoint-3"):
        model, saved = load_model(str(folder)), load_file(folder / "model.safetensors")
        assert model.state_dict().keys() == saved.keys()
        assert all(torch.equal(weight, saved[key]) for key, weight in model.state_dict().items())
        assert load_tokenizer(str(folder)).vocab_size == Tokenizer.load(old_run / "tokenizer").vocab_size == 360


@pytest.mark.parametrize("name", STAGES)
def test_a_run_of_an_earlier_version_is_finished_on_the_same_curve(
    name: str, old_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(parse(STAGES[name], ["--config", f"{name}/config.yaml"]))
    assert "resuming after step 3" in capsys.readouterr().out
    expected = json.loads((old_run / "expected.json").read_text())[name]
    found = steps_of(old_run / name)
    assert [(row["step"], row.get("tokens")) for row in found] == [(row["step"], row.get("tokens")) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=TOLERANCE)
