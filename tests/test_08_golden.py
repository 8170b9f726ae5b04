"""Chapter 8: twenty steps of every stage are those of the day they were recorded.

`python tests/test_08_golden.py` records them again: do so only where a change is meant to change what is learnt.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_stages import fill, reward_of, scoring_by, stages_in, steps_of

from edu.data.tokenizer import Tokenizer
from edu.inference.engine import Engine
from edu.inference.params import Sample, SamplingParams
from edu.stages import rl, rollouts

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5
"""Relative, and absolute for RL's loss, which is around 0. Recorded with AVX2: plain SSE, and two threads, differ by up to 6e-6."""


class Dice(Engine):
    """In place of the Engine: a token drawn from a model that another CPU computes is sooner or later another token."""

    def generate(self, _: Any, num_samples: int, params: SamplingParams, *, seed: Any, **options: Any) -> Any:
        assert options.keys() == {"tool"}

        def sample(*numbers: int) -> Sample:
            rng = np.random.default_rng(numbers)
            tokens = rng.integers(0, 300, rng.integers(1, params.max_new_tokens + 1)).tolist()
            return Sample(tokens, [1] * len(tokens), [-6.0] * len(tokens), "stop")

        return [[sample(each, k) for k in range(num_samples)] for each in seed]


def curves(home: Path, tokenizer: Tokenizer) -> dict[str, dict[str, list[float]]]:
    """Loss and gradient norm of each step, and in RL the reward."""
    fill(home, tokenizer)
    found = {}
    for name, (train, config) in stages_in(home).items():
        train(replace(config, max_steps=20, eval_every=100, save_every=100))
        rows = [row for row in steps_of(config.out) if "loss" in row]
        names = ("loss", "grad_norm", "reward", "step_tokens")
        found[name] = {key: [row[key] for row in rows] for key in names if key in rows[0]}
    return found


def test_twenty_steps_of_each_stage_are_as_recorded(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "score_all", scoring_by(reward_of))
    monkeypatch.setattr(rl, "Engine", Dice)
    for name, found in curves(tmp_path, tokenizer).items():
        expected = json.loads((GOLDEN / f"{name}.json").read_text())
        assert found.keys() == expected.keys()
        for key, values in found.items():
            torch.testing.assert_close(
                torch.tensor(values),
                torch.tensor(expected[key]),
                rtol=TOLERANCE,
                atol=TOLERANCE,
                msg=lambda text, at=f"{name}, {key}": f"{at}: {text}",
            )


if __name__ == "__main__":
    from conftest import SENTENCES
    from edu.data.train_tokenizer import train_tokenizer

    rollouts.score_all, rl.Engine = scoring_by(reward_of), Dice
    target = Path(sys.argv[1]) if sys.argv[1:] else GOLDEN
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, found in curves(Path(folder), train_tokenizer(SENTENCES * 3, vocab_size=512)).items():
            lines = ",\n".join(f' "{key}": {json.dumps(values)}' for key, values in found.items())
            (target / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")
