"""Chapters 8 and 10, and pretraining: each stage learns, resumes bit for bit, and refuses what it cannot do."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edu import loop, pretrain, rl, rollouts, sft
from edu.checkpoint import checkpoints
from edu.config import PretrainConfig, RLConfig, SFTConfig, StageConfig, as_settings, is_finished
from edu.metrics import read_metrics
from edu.tokenizer import Tokenizer

SMALL = {"batch_size": 8, "micro_batch_size": 4, "eval_every": 4, "save_every": 3, "warmup": 2}
TIMES = ("seconds", "tokens_per_second")
Stage = tuple[Callable[[Any], Any], StageConfig]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Data of every kind, small enough to learn by heart."""
    home = tmp_path_factory.mktemp("home")
    texts = [
        f"The {a} sees the {b}. The {b} is {c}." for a in ("cat", "dog") for b in ("sun", "hat") for c in ("old", "hot")
    ]
    for folder, count in ((home / "data", 40), (home / "data" / "val", 2)):
        folder.mkdir()
        pq.write_table(pa.table({"text": texts * count}), folder / "shard_00000.parquet", row_group_size=50)
    (home / "problems").mkdir()
    rows = [
        {"question": f"What is {a}+{b}?", "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
        for a in range(5)
        for b in range(4)
    ]
    for split in ("train", "test"):
        (home / "problems" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer.save(home / "tokenizer")
    return home


@pytest.fixture(scope="module")
def stages(home: Path) -> dict[str, Stage]:
    base = PretrainConfig(
        out=home / "base",
        data=home / "data",
        tokenizer=home / "tokenizer",
        channels=32,
        layers=2,
        max_steps=8,
        sequence_length=64,
        **SMALL,
    )
    chat = {
        "problems": home / "problems",
        "identity": None,
        "facts": None,
        "eval_samples": 2,
        "eval_limit": 4,
        "sample_prompts": ("Hi",),
        **SMALL,
    }
    tuned = SFTConfig(
        out=home / "sft",
        model=str(home / "base"),
        data=home / "problems" / "train.jsonl",
        max_steps=7,
        sequence_length=64,
        val_every=5,
        **chat,
    )
    reinforced = RLConfig(
        out=home / "rl", model=str(home / "sft"), replay=tuned.data, samples=4, max_new_tokens=24, max_steps=6, **chat
    )
    return {"base": (pretrain.train, base), "sft": (sft.train, tuned), "rl": (rl.train, reinforced)}


@pytest.fixture(scope="module", autouse=True)
def earned() -> Iterator[None]:
    """A reward that an untrained model can earn, so that there is something to reinforce."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "score", lambda sample, *_: float(sample.tokens[0] % 2))
        yield


@pytest.fixture(scope="module")
def finished(stages: dict[str, Stage]) -> dict[str, StageConfig]:
    """All three stages, run without interruption."""
    for train, config in stages.values():
        assert train(config).results["step"] == config.max_steps
    return {name: config for name, (_, config) in stages.items()}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder / "metrics.jsonl")]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_losses_fall(finished: dict[str, StageConfig]) -> None:
    for name in ("base", "sft"):
        losses = [row["loss"] for row in steps_of(finished[name].out) if "loss" in row]
        assert losses[-1] < losses[0] - 0.3, (name, losses)
    bpb = [row["bpb"] for row in steps_of(finished["base"].out) if "bpb" in row]
    assert bpb == sorted(bpb, reverse=True)


def test_every_stage_leaves_a_stock_model_and_its_figures(
    finished: dict[str, StageConfig], tokenizer: Tokenizer
) -> None:
    for name, config in finished.items():
        model = AutoModelForCausalLM.from_pretrained(config.out)
        assert type(model).__name__ == "NanoChatForCausalLM"
        stops = [tokenizer.assistant_end, tokenizer.python_end, tokenizer.bos]
        assert model.generation_config.eos_token_id == model.config.eos_token_id == stops
        text = AutoTokenizer.from_pretrained(config.out)
        assert text("The cat", add_special_tokens=False).input_ids == tokenizer.encode("The cat")
        assert json.loads((config.out / "eval.json").read_text())["step"] == config.max_steps
        assert is_finished(config)
        assert len(checkpoints(config.out)) == config.keep, name
        newest = checkpoints(config.out)[-1]
        assert (newest / "model.safetensors").samefile(config.out / "model.safetensors")
    rewards = [row["reward"] for row in steps_of(finished["rl"].out) if "reward" in row]
    assert 0 < rewards[0] < 1
    figures = json.loads((finished["rl"].out / "eval.json").read_text())
    assert {"greedy", "sampled"} <= figures["math"].keys()
    names = {name for row in steps_of(finished["rl"].out) for name in row}
    assert {"reward", "frac_reward_zero_std", "completions/mean_length", "eval/pass@1", "entropy"} <= names


class Crash(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("name", ["base", "sft", "rl"])
@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_run_that_dies_continues_bit_for_bit(
    name: str,
    at: int,
    stages: dict[str, Stage],
    finished: dict[str, StageConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, config = stages[name]
    config = replace(config, out=tmp_path / "again", micro_batch_size=4)
    real, calls = loop.train_step, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > at:
            raise Crash
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies)
        with pytest.raises(Crash):
            train(config)
    gc.collect()  # the dead process's lock
    train(config)
    assert steps_of(config.out) == steps_of(finished[name].out)
    for key, weight in weights_of(finished[name].out).items():
        assert torch.equal(weights_of(config.out)[key], weight), key


SAY = """
class Say:
    def __init__(self, split): self.offset = 20 * (split == "test")
    def __len__(self): return 20
    def get_example(self, i): return {"messages": [{"role": "user", "content": f"{i + self.offset}"}], "answer": str(i)}
    def reward(self, example, completion): return float(completion == example["answer"])
"""


def test_rl_with_every_option_continues_bit_for_bit(
    finished: dict[str, StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 2, "kl": 0.05, "dynamic_sampling": True, "max_steps": 3, "save_every": 1}
    (tmp_path / "say.py").write_text(SAY)
    chosen = {"advantage": "leave_one_out", "normalization": "sequence", "task": f"{tmp_path}/say.py:Say"}
    config = replace(finished["rl"], out=tmp_path / "whole", **options, **chosen)
    rl.train(config)
    assert {"greedy", "sampled"} <= json.loads((config.out / "eval.json").read_text())["Say"].keys()
    rows = [row for row in steps_of(config.out) if "reward" in row]
    assert all(row["kl"] > 0 and row["clip_ratio/region_mean"] > 0 for row in rows)  # from each step's second update
    real, calls = loop.train_step, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the second update of the second step
            raise Crash
        return real(*args)

    again = replace(config, out=tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies)
        with pytest.raises(Crash):
            rl.train(again)
    gc.collect()
    rl.train(again)
    assert steps_of(again.out) == steps_of(config.out)
    assert read_metrics(again.out / "samples.jsonl") == read_metrics(config.out / "samples.jsonl")
    for key, weight in weights_of(config.out).items():
        assert torch.equal(weights_of(again.out)[key], weight), key


def test_a_damaged_newest_checkpoint_is_passed_over(
    stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, config = stages["base"]
    config = replace(config, out=tmp_path / "again")
    train(config)
    (config.out / "eval.json").unlink()
    newest = checkpoints(config.out)[-1]
    size = (newest / "model.safetensors").stat().st_size
    (newest / "model.safetensors").unlink()  # not through the hard link: the stage's own file stays whole
    (newest / "model.safetensors").write_bytes(b"x" * (size // 2))
    gc.collect()
    train(config)
    assert "model.safetensors is damaged" in capsys.readouterr().out
    assert steps_of(config.out) == steps_of(finished["base"].out)


def test_a_full_disk_is_said_and_costs_no_checkpoint(
    stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["base"]
    config = replace(config, out=tmp_path / "again")
    real = torch.save

    def full(state: Any, path: Path) -> None:
        if "checkpoint-6" in str(path):
            raise RuntimeError("No space left on device")
        real(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint-6: cannot be written .No space left.* before step 6 are whole"):
            train(config)
    assert [path.name for path in checkpoints(config.out)] == ["checkpoint-3"]
    assert not list(config.out.glob(".checkpoint*"))
    train(config)
    assert steps_of(config.out) == steps_of(finished["base"].out)


@pytest.mark.parametrize("at", [2, 5])
def test_a_signal_saves_and_leaves_and_the_rest_is_the_same(
    at: int, stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["sft"]
    config = replace(config, out=tmp_path / "again")
    real, calls = loop.train_step, []

    def signalled(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", signalled)
        result = train(config)
    assert (result.step, result.finished) == (at, False)
    assert checkpoints(config.out)[-1].name == f"checkpoint-{at}"
    assert not is_finished(config)
    assert train(config).finished
    assert steps_of(config.out) == steps_of(finished["sft"].out)


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["base"]
    config = replace(config, out=tmp_path / "again", save_every=1)
    real, calls = loop.train_step, []

    def breaks(*args: Any) -> Any:
        calls.append(1)
        result = real(*args)
        return replace(result, losses=[float("nan")]) if len(calls) == 3 else result

    monkeypatch.setattr(loop, "train_step", breaks)
    with pytest.raises(ValueError, match="step 3: the loss is nan; the last checkpoint is of step 2"):
        train(config)
    assert checkpoints(config.out)[-1].name == "checkpoint-2"


def test_other_settings_are_refused_in_the_same_folder(finished: dict[str, StageConfig]) -> None:
    with pytest.raises(ValueError, match="--seed was 0, is 5"):
        is_finished(replace(finished["sft"], seed=5))
    assert is_finished(replace(finished["sft"], save_every=1))


def test_two_runs_in_one_folder_are_refused(stages: dict[str, Stage], tmp_path: Path) -> None:
    train, config = stages["base"]
    (tmp_path / "x").mkdir()
    import fcntl

    with (tmp_path / "x" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing here"):
            train(replace(config, out=tmp_path / "x"))


def test_a_missing_model_names_what_makes_it(stages: dict[str, Stage], tmp_path: Path) -> None:
    train, config = stages["sft"]
    assert isinstance(config, SFTConfig)
    (tmp_path / "empty").mkdir()
    for model, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no config.json")):
        with pytest.raises(ValueError, match=message):
            train(replace(config, model=str(model), out=tmp_path / "out"))


def flags_of(config: StageConfig) -> list[str]:
    """A config as a command line."""
    flags = []
    for name, value in as_settings(config).items():
        if name != "sample_prompts" and not isinstance(value, bool) and value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
        elif value is None and name in ("identity", "facts"):
            flags += [f"--{name}", "None"]
    return flags


def test_two_processes_train_what_one_trains(finished: dict[str, StageConfig], tmp_path: Path) -> None:
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for place, name in enumerate(("base", "sft", "rl")):
        config = replace(finished[name], out=tmp_path / name)
        port = str(20000 + (os.getpid() + 100 + place) % 20000)
        script = {"base": "pretrain"}.get(name, name)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
        command = [*launch, f"scripts/{script}.py", *flags_of(config)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert is_finished(config)
        rows = [[r for r in steps_of(folder) if "loss" in r] for folder in (config.out, finished[name].out)]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
        if name == "sft":  # the same rows, split over two processes
            losses = [[row["loss"] for row in found] for found in rows]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        if name == "rl":  # the same rollouts, of which each process samples its own
            for figure in ("entropy", "completions/mean_length", "step_tokens"):
                assert rows[0][0][figure] == pytest.approx(rows[1][0][figure], rel=1e-4), figure
