"""Chapters 8 and 10, and pretraining: each stage learns, resumes bit for bit, and refuses what it cannot do."""

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from filelock import FileLock
from safetensors.torch import load_file
from small_stages import Stage, fill, reward_of, scoring_by, stages_in, steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer
from worker import FSDP2

from edu.config.sft import SFTConfig
from edu.config.stages import StageConfig, as_settings
from edu.data.metrics_log import read_metrics
from edu.data.tokenizer import Tokenizer
from edu.model.gpt import GPT
from edu.model.load import load_model
from edu.stages import pretrain, rollouts, run
from edu.training import loop
from edu.training.finished import is_finished
from edu.training.loop import Training
from edu.training.resume import checkpoints


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Stage]:
    home = tmp_path_factory.mktemp("home")
    fill(home, tokenizer)
    return stages_in(home)


@pytest.fixture(scope="module", autouse=True)
def earned() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "score_all", scoring_by(reward_of))
        yield


@pytest.fixture(scope="module")
def finished(stages: dict[str, Stage]) -> dict[str, StageConfig]:
    """All three stages, run without interruption."""
    for train, config in stages.values():
        assert train(config).results["step"] == config.max_steps
    return {name: config for name, (_, config) in stages.items()}


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
    assert {
        "reward",
        "frac_reward_zero_std",
        "completions/mean_length",
        "eval/pass@1",
        "eval/pass@k",
        "entropy",
    } <= names


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
    run.train(config)
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
            run.train(again)
    gc.collect()
    run.train(again)
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
        with pytest.raises(
            OSError, match=r"checkpoint-6: cannot be written .No space left.*MiB are free.* before step 6 are whole"
        ):
            train(config)
    assert [path.name for path in checkpoints(config.out)] == ["checkpoint-3", "checkpoint-4"]
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


@pytest.mark.parametrize("name", ["base", "sft"])
def test_running_out_of_memory_halves_the_micro_batch_and_not_the_update(
    name: str,
    stages: dict[str, Stage],
    finished: dict[str, StageConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, config = stages[name]
    real, tried, room = GPT.forward, [], [2]

    def short_of_memory(self: GPT, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if self.training:
            tried.append(len(input_ids))
            if len(input_ids) > room[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, input_ids, **kwargs)

    monkeypatch.setattr(GPT, "forward", short_of_memory)
    config = replace(config, out=tmp_path / "again", micro_batch_size=8)
    train(config)
    assert [count for count in tried if count > 2] == [8, 4]  # all later steps know
    assert "each micro-batch in 4 parts" in capsys.readouterr().out
    found, expected = (
        [(row["loss"], row["tokens"]) for row in steps_of(folder) if "loss" in row]
        for folder in (config.out, finished[name].out)
    )
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4)
    room[0] = 0
    with pytest.raises(ValueError, match="step 1: out of memory with one row a forward pass"):
        train(replace(config, out=tmp_path / "more"))


@pytest.mark.parametrize("at", [4, 8])  # 4 is no step of save_every
def test_an_evaluation_that_fails_costs_no_step(
    at: int, stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["base"]
    config = replace(config, out=tmp_path / "again")
    last, real, trained = config.out / f"checkpoint-{at}", loop.train_step, []

    def counted(*args: Any) -> Any:
        trained.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "bits_per_byte", lambda *_: 1 / 0 if last.exists() else 1.0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    gc.collect()
    monkeypatch.setattr(loop, "train_step", counted)
    assert train(config).results["bpb"] == json.loads((finished["base"].out / "eval.json").read_text())["bpb"]
    assert len(trained) == config.max_steps - at


@pytest.mark.parametrize("at", [4, 8])
def test_a_signal_breaks_an_evaluation_off_and_it_is_done_again(
    at: int, stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["base"]
    config = replace(config, out=tmp_path / "again")
    last, real = config.out / f"checkpoint-{at}", pretrain.bits_per_byte

    def endless(*args: Any) -> float:
        while last.exists():
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "bits_per_byte", endless)
        result = train(config)
    assert (result.step, result.finished) == (at, False)
    assert train(config).finished
    assert steps_of(config.out) == steps_of(finished["base"].out)
    assert read_metrics(config.out / "samples.jsonl") == read_metrics(finished["base"].out / "samples.jsonl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of itself
@pytest.mark.parametrize("name", ["base", "sft"])
@pytest.mark.usefixtures("finished")
def test_a_compiled_model_learns_the_same(name: str, stages: dict[str, Stage], tmp_path: Path) -> None:
    train, config = stages[name]
    train(replace(config, out=tmp_path / "compiled", compile=True))
    losses, expected = (
        [row["loss"] for row in steps_of(folder) if "loss" in row] for folder in (tmp_path / "compiled", config.out)
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    assert not any("_orig_mod" in key for key in weights_of(tmp_path / "compiled"))


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_utilisation_and_speed_count_the_whole_step_under_accumulation(
    micro_batch_size: int, stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["base"]
    monkeypatch.setattr(loop, "peak_flops", lambda _: 1e9)
    train(replace(config, out=tmp_path / "again", micro_batch_size=micro_batch_size, max_steps=2))
    row, after = (r for r in read_metrics(tmp_path / "again" / "metrics.jsonl") if "loss" in r)
    assert row["step_tokens"] == 8 * 64
    flops = 8 * 64 * (6 * (2 * (32 * 32 * 3 + 8 * 32 * 32) + 512 * 32) + 12 * 2 * 32 * 64)
    seconds = after["seconds"] - row["seconds"]
    assert after["tokens_per_second"] * seconds == pytest.approx(512)
    assert after["mfu"] * seconds * 1e9 == pytest.approx(flops)
    cost = json.loads((tmp_path / "again" / "eval.json").read_text())["cost"]
    assert cost["memory_kb_per_token"]["expected"] * micro_batch_size * 64 == pytest.approx(
        cost["memory_gib"]["expected"] * 2**30 / 1e3
    )


@pytest.mark.usefixtures("finished")
def test_the_utilisation_of_rl_counts_the_rows_as_long_as_they_are(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["rl"]
    monkeypatch.setattr(loop, "peak_flops", lambda _: 1e9)
    real, shapes = GPT.forward, []

    def watched(self: GPT, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if self.training:
            shapes.append(tuple(input_ids.shape))
        return real(self, input_ids, **kwargs)

    monkeypatch.setattr(GPT, "forward", watched)
    turn = itertools.count()
    monkeypatch.setattr(rollouts, "score_all", scoring_by(lambda _: float(next(turn) % 2)))
    train(replace(config, out=tmp_path / "again", max_steps=1, replay=None, batch_size=1, max_new_tokens=4))
    row = next(r for r in read_metrics(tmp_path / "again" / "metrics.jsonl") if "loss" in r)
    assert shapes
    assert all(T < 64 for _, T in shapes)  # shorter than the context
    flops = sum(B * T * (6 * (2 * (32 * 32 * 3 + 8 * 32 * 32) + 512 * 32) + 12 * 2 * 32 * T) for B, T in shapes)
    assert row["mfu"] * row["seconds"] * 1e9 == pytest.approx(flops)


@pytest.mark.usefixtures("finished")
def test_rewards_that_are_all_equal_change_nothing_and_the_steps_are_counted(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["rl"]
    scored = []

    def constant_after_two_steps(sample: Any) -> float:
        scored.append(sample)
        return reward_of(sample) if len(scored) <= 2 * 8 * config.samples else 1.0

    monkeypatch.setattr(rollouts, "score_all", scoring_by(constant_after_two_steps))
    out = tmp_path / "again"
    train(replace(config, out=out, max_steps=6, replay=None, save_every=2, eval_every=100, keep=9, eval_limit=1))
    rows = [row for row in steps_of(out) if "loss" in row]
    assert [row["skipped_updates"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert len({row["lr"] for row in rows}) > 2  # schedules go on
    at = [weights_of(out / f"checkpoint-{step}") for step in (2, 4, 6)]
    assert all(torch.equal(at[0][name], later[name]) for later in at[1:] for name in at[0])


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_weights_are_fp32_wherever_they_are_trained(
    name: str, stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path
) -> None:
    train, config = stages[name]
    start = shutil.copytree(finished["base" if name == "sft" else "sft"].out, tmp_path / "bf16")
    load_model(str(start)).bfloat16().save_pretrained(start)
    assert load_model(str(start)).dtype == torch.bfloat16
    train(replace(config, out=tmp_path / "again", model=str(start), max_steps=1, eval_limit=1))
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    state = torch.load(tmp_path / "again" / "checkpoint-1" / "state" / "optimizer.pt", weights_only=True)["optimizer"]
    assert {x.dtype for of in state["state"].values() for x in of.values()} == {torch.float32}


def test_memory_that_runs_out_in_the_optimizer_is_one_line_and_not_tried_again(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["base"]
    tried = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("edu.training.optimizer.orthogonalize", fail)
    with pytest.raises(ValueError, match=r"step 1: out of memory in the optimizer's update.*checkpoint is of step 0"):
        train(replace(config, out=tmp_path / "again"))
    assert len(tried) == 1


def test_a_stage_has_the_state_of_its_optimizer_before_its_first_update(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["base"]

    class FirstStep(Exception):
        """Ends the run where the first update would begin."""

    def first(_: Any, model: Any, optimizer: Any, *__: Any, **___: Any) -> None:
        raise FirstStep(len(optimizer.optimizer.state), len(list(model.parameters())))

    monkeypatch.setattr("edu.training.loop.train_step", first)
    with pytest.raises(FirstStep) as ended:
        train(replace(config, out=tmp_path / "again"))
    with_state, parameters = ended.value.args
    assert with_state == parameters > 0


def test_a_folder_that_cannot_be_written_is_named(stages: dict[str, Stage], tmp_path: Path) -> None:
    train, config = stages["base"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        train(replace(config, out=tmp_path / "file" / "base"))


def test_a_checkpoint_says_what_wrote_it(finished: dict[str, StageConfig]) -> None:
    config = finished["base"]
    said = json.loads((checkpoints(config.out)[-1] / "state" / "trainer.json").read_text())
    assert (said["step"], said["tokens"]) == (8, 8 * 8 * 64)
    assert said["settings"] == as_settings(config)
    assert said["environment"]["torch"] == torch.__version__
    assert said["data"][0]["documents"] > 0


def test_pretraining_with_another_number_of_processes_is_refused_with_the_reason(
    stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path
) -> None:
    train, config = stages["base"]
    shutil.copytree(finished["base"].out, tmp_path / "again")
    state = checkpoints(tmp_path / "again")[-1] / "state" / "trainer.json"
    said = json.loads(state.read_text())
    said["data"] *= 2
    state.write_text(json.dumps(said))
    files = state.with_name("files.json")
    files.write_text(json.dumps(json.loads(files.read_text()) | {"state/trainer.json": state.stat().st_size}))
    with pytest.raises(ValueError, match="was trained by 2 processes: resume with as many, not 1"):
        train(replace(config, out=tmp_path / "again"))


def test_a_tracker_gets_the_settings_and_every_row(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Recorder(GeneralTracker):
        """What `--log-with` names: accelerate's interface, in the place of one of its trackers."""

        name, requires_logging_directory, tracker = "tensorboard", False, None

        def __init__(self, run_name: str) -> None:
            super().__init__()
            calls.append(("run", run_name))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls.append(("settings", values))

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            calls.append(("row", {"step": step, **values}))

        def finish(self) -> None:
            calls.append(("finished", None))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    train, config = stages["base"]
    config = replace(config, out=tmp_path / "tracked", log_with="tensorboard", max_steps=4)
    train(config)
    assert [name for name, _ in calls[:2]] == ["run", "settings"]
    assert (calls[1][1]["channels"], calls[1][1]["sample_prompts"]) == (32, str(list(config.sample_prompts)))
    assert [row for name, row in calls if name == "row"] == read_metrics(config.out / "metrics.jsonl")
    assert calls[-1][0] == "finished"


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_tensorboard_shows_what_metrics_hold(stages: dict[str, Stage], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train, config = stages["base"]
    config = replace(config, out=tmp_path / "tracked", log_with="tensorboard", max_steps=4)
    train(config)
    shown = events.EventAccumulator(str(config.out / "edu")).Reload()
    rows = read_metrics(config.out / "metrics.jsonl")
    for name in ("loss", "bpb", "tokens_per_second"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == expected


def test_other_settings_are_refused_in_the_same_folder(finished: dict[str, StageConfig]) -> None:
    with pytest.raises(ValueError, match="--seed was 0, is 5"):
        is_finished(replace(finished["sft"], seed=5))
    assert is_finished(replace(finished["sft"], save_every=1))


def test_two_runs_in_one_folder_are_refused(stages: dict[str, Stage], tmp_path: Path) -> None:
    train, config = stages["base"]
    (tmp_path / "x").mkdir()
    with FileLock(tmp_path / "x" / ".lock"), pytest.raises(ValueError, match="another run is writing here"):
        train(replace(config, out=tmp_path / "x"))


def test_a_missing_model_names_what_makes_it(stages: dict[str, Stage], tmp_path: Path) -> None:
    train, config = stages["sft"]
    assert isinstance(config, SFTConfig)
    (tmp_path / "empty").mkdir()
    for model, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no config.json")):
        with pytest.raises(ValueError, match=message):
            train(replace(config, model=str(model), out=tmp_path / "out"))


def save_and_die(save: Callable[..., None]) -> Callable[..., None]:
    def dying(*args: Any) -> None:
        save(*args)
        raise Crash

    return dying


def flags_of(config: StageConfig) -> list[str]:
    """A config as a command line."""
    flags = []
    for name, value in as_settings(config).items():
        if name != "sample_prompts" and value is not None and not isinstance(value, bool):
            flags += [f"--{name.replace('_', '-')}", str(value)]
        elif value is None and name in ("identity", "facts"):
            flags += [f"--{name}", "None"]
    return flags


def test_two_processes_train_what_one_trains_from_the_start_or_from_the_middle(
    stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["sft"]
    partly = tmp_path / "partly"
    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", save_and_die(Training.save))
        with pytest.raises(Crash):
            train(replace(config, out=partly))
    gc.collect()
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for place, name in enumerate(("base", "sft", "rl")):
        config = replace(finished[name], out=tmp_path / name)
        if name == "sft":  # goes on where one process had saved
            shutil.copytree(partly, config.out)
        port = str(20000 + (os.getpid() + 100 + place) % 20000)
        script = {"base": "pretrain"}.get(name, name)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
        command = [*launch, f"scripts/{script}.py", *flags_of(config)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert is_finished(config)
        rows = [[r for r in steps_of(folder) if "loss" in r] for folder in (config.out, finished[name].out)]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
        if name == "sft":  # the same rows, split over two processes; the first steps were one process's
            assert "resuming after step 3" in done.stdout
            losses = [[row["loss"] for row in found] for found in rows]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        if name == "rl":  # the same rollouts, of which each process samples its own
            for figure in ("entropy", "completions/mean_length", "step_tokens"):
                assert rows[0][0][figure] == pytest.approx(rows[1][0][figure], rel=1e-4), figure


@pytest.mark.slow
def test_a_sharded_model_trains_what_one_process_trains_and_each_continues_the_others_run(
    stages: dict[str, Stage], finished: dict[str, StageConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = stages["sft"]
    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", save_and_die(Training.save))
        with pytest.raises(Crash):
            train(replace(config, out=tmp_path / "sft"))  # FSDP2 goes on from there
    gc.collect()
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."} | FSDP2
    port = str(20000 + (os.getpid() + 200) % 20000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command = [*launch, "tests/small_stages.py", str(config.out.parent), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sft: resuming after step 3" in done.stdout
    rows = {name: steps_of(tmp_path / name) for name in finished}
    losses = [row["loss"] for row in rows["base"] if "loss" in row]  # of other rows than one process reads
    assert losses[-1] < losses[0] - 0.3
    for found, expected in zip(rows["sft"], steps_of(finished["sft"].out), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    found, expected = (next(r for r in steps if "reward" in r) for steps in (rows["rl"], steps_of(finished["rl"].out)))
    assert found == pytest.approx(expected, rel=1e-4)
    for name in finished:
        newest = checkpoints(tmp_path / name)[-1]
        assert json.loads((newest / "state" / "trainer.json").read_text())["environment"]["distributed_type"] == "FSDP"
        assert weights_of(newest).keys() == weights_of(finished[name].out).keys()
    shutil.rmtree(newest := checkpoints(tmp_path / "sft")[-1])  # one process goes on from the sharded run's step 6
    (tmp_path / "sft" / "eval.json").unlink()
    train(replace(config, out=tmp_path / "sft"))
    assert newest.exists()
    for key, weight in weights_of(finished["sft"].out).items():
        torch.testing.assert_close(weights_of(newest)[key], weight, atol=1e-4, rtol=0, msg=key)
