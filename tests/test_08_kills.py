"""Chapter 8, the hard way: `kill -9` at any moment, and the same command ends as if nothing had happened.

Every run is a forked child of this process, which has imported all that takes long.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import Stage, fill, reward_of, scoring_by, stages_in, steps_of

from edu.config.stages import StageConfig
from edu.data.metrics_log import read_metrics
from edu.data.tokenizer import Tokenizer
from edu.stages import rollouts
from edu.training.resume import checkpoints

TOUCHES = ("fsync", "rename", "replace", "link")
"""What of `os` makes a save: a child may be told to kill itself at the n-th of them, before it is done."""


def start(stage: Stage, log: Path, touches: int | None = None) -> int:
    """Fork a child that runs the stage, and gives its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("a")
        if touches is not None:
            kill_at(touches)
        rollouts.score_all = scoring_by(reward_of)
        train, config = stage
        train(config)
        code = 0
    finally:  # never back into the tests
        if code:
            log.write_text(traceback.format_exc())
        os._exit(code)


def kill_at(touch: int) -> None:
    """Make this process kill itself at its `touch`-th call of TOUCHES."""
    left = [touch]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in TOUCHES:
        setattr(os, name, counted(getattr(os, name)))


def survived(pid: int, log: Path) -> bool:
    """Wait for a child: whether it ended by itself, which must be well."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, log.read_text()
    return True


def end_of(config: StageConfig) -> dict[str, Any]:
    """All that a run leaves, less what says how fast the machine was."""
    newest = checkpoints(config.out)[-1]
    state = json.loads((newest / "state" / "trainer.json").read_text())
    results = json.loads((config.out / "eval.json").read_text())
    for timed in ("seconds", "cost"):
        results.pop(timed, None)
    return {
        "checkpoints": [path.name for path in checkpoints(config.out)],
        "weights": (newest / "model.safetensors").read_bytes(),
        "published": (config.out / "model.safetensors").read_bytes(),
        "optimizer": (newest / "state" / "optimizer.pt").read_bytes(),
        "data": [state[name] for name in ("step", "tokens", "data")],
        "metrics": steps_of(config.out),
        "samples": read_metrics(config.out / "samples.jsonl"),
        "results": results,
        "left over": [path.name for path in config.out.iterdir() if path.name.endswith(".tmp")],
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, tuple[Stage, float]]:
    """The three stages, each run once, and how long it took."""
    torch.set_num_threads(1)  # threads do not survive a fork
    home, took = tmp_path_factory.mktemp("home"), {}
    fill(home, tokenizer)
    for name, stage in stages_in(home).items():
        started = time.monotonic()
        assert survived(start(stage, home / "log"), home / "log")
        took[name] = (stage, time.monotonic() - started)
    return took


def endure(name: str, uninterrupted: dict[str, tuple[Stage, float]], folder: Path, kills: int, seed: int) -> int:
    """Kill a stage so many times, half at random times and half at random touches; compare each time that it ends.

    Gives how often it was compared.
    """
    ((train, config), seconds), rng, compared = uninterrupted[name], random.Random(seed), 0
    expected, log = end_of(config), folder / "log"
    while True:
        again = replace(config, out=folder / f"run-{compared}")
        by_time = kills % 2 == 0
        touches = rng.randrange(1, 120) if kills and not by_time else None
        pid = start((train, again), log, touches)
        if kills and by_time:
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        if not survived(pid, log):
            kills -= 1
            continue
        found = end_of(again)
        assert {part for part in expected if found[part] != expected[part]} == set(), f"{kills} kills left"
        compared += 1
        if not kills:
            return compared


@pytest.mark.parametrize("name", ["base", "sft", "rl"])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(
    name: str, uninterrupted: dict[str, tuple[Stage, float]], tmp_path: Path
) -> None:
    assert endure(name, uninterrupted, tmp_path, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "sft", "rl"])
def test_fifty_kills(name: str, uninterrupted: dict[str, tuple[Stage, float]], tmp_path: Path) -> None:
    started = time.monotonic()
    compared = endure(name, uninterrupted, tmp_path, kills=50, seed=1)
    assert compared
    print(f"{name}: 50 kills, compared {compared} times, {time.monotonic() - started:.0f} s")


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(
    uninterrupted: dict[str, tuple[Stage, float]], tmp_path: Path
) -> None:
    (train, config), _ = uninterrupted["base"]
    weights = [end_of(config)["weights"]]
    for seed in (config.seed, config.seed + 1):
        again = replace(config, out=tmp_path / str(seed), seed=seed)
        assert survived(start((train, again), tmp_path / "log"), tmp_path / "log")
        weights.append(end_of(again)["weights"])
    assert weights[0] == weights[1] != weights[2]
