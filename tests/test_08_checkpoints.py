"""Chapter 8, checkpoints: a folder is opened for what it says that it is, or refused in one line that says why."""

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_stages import fill, stages_in

from edu.config.stages import StageConfig, as_settings
from edu.data.tokenizer import Tokenizer
from edu.model.load import load_model
from edu.stages import run
from edu.training import checkpoint, loop
from edu.training.resume import checkpoints

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "data" / "old_run" / "base" / "checkpoint-3"
Weights = dict[str, torch.Tensor]


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): weight for name, weight in weights.items()}


def compiled(weights: Weights) -> Weights:
    return {f"_orig_mod.{name}": weight for name, weight in weights.items()}


def without_layer(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if "layers.1" not in name}


def other_shape(weights: Weights) -> Weights:
    return weights | {"lm_head.weight": torch.zeros(3, 32)}


def one_more(weights: Weights) -> Weights:
    return weights | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(OLD, tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_layer, r"6 missing \(model\.layers\.1\.mlp\.fc1\.weight, "),
        (compiled, r"missing .*unexpected \(_orig_mod\.lm_head\.weight, .*without `_orig_mod\.`"),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), r"2 missing .*q_proj\.base_layer\.weight.*merge"),
        (one_more, r"1 unexpected \(model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight\).*merge"),
        (other_shape, r"1 of another shape \(lm_head\.weight: \[3, 32\] where config\.json says \[360, 32\]\)"),
    ],
)
def test_weights_that_do_not_match_are_refused_by_name(
    change: Callable[[Weights], Weights], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "LOAD REPORT" not in "".join(capfd.readouterr()), "one line, not transformers' table beside it"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def as_bin(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    zeros(path.with_name("pytorch_model.bin"))


def one_shard_lost(path: Path) -> None:
    load_model(str(path.parent)).save_pretrained(path.parent, max_shard_size="50KB")
    path.unlink(missing_ok=True)
    sorted(path.parent.glob("model-*"))[1].unlink()


def adapter_only(path: Path) -> None:
    path.unlink()
    (path.parent / "config.json").unlink()
    (path.parent / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize("harm", [cut, zeros, emptied, as_bin, one_shard_lost, Path.unlink, adapter_only])
def test_weights_that_cannot_be_read_are_one_line_that_names_the_folder(
    harm: Callable[[Path], None], folder: Path
) -> None:
    harm(folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"--model {folder}") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", [cut, zeros, emptied])
def test_a_config_that_cannot_be_read_is_named(harm: Callable[[Path], None], folder: Path) -> None:
    harm(folder / "config.json")
    with pytest.raises(ValueError, match=rf"{folder}.*config\.json"):
        load_model(str(folder))


def test_shards_without_metadata_open_with_every_weight(folder: Path) -> None:
    model = load_model(str(folder))
    model.save_pretrained(folder, max_shard_size="50KB")
    for shard in folder.glob("model-*"):
        weights = load_file(shard)
        shard.unlink()
        save_file(weights, shard)
    again = load_model(str(folder)).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def test_a_model_is_opened_in_one_place() -> None:
    opened = [
        path.relative_to(ROOT).as_posix()
        for path in [*(ROOT / "edu").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    ]
    assert set(opened) == {"edu/model/load.py"}


# Checkpoints of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> StageConfig:
    """A short pretraining run with checkpoints of its steps 3 and 4."""
    home = tmp_path_factory.mktemp("home")
    fill(home, tokenizer)
    train, config = stages_in(home)["base"]
    config = replace(config, max_steps=4)
    train(config)
    return config


@pytest.fixture
def again(finished: StageConfig, tmp_path: Path) -> StageConfig:
    """A copy of the run before its last measurement."""
    shutil.copytree(finished.out, tmp_path / "base")
    (tmp_path / "base" / "eval.json").unlink()
    return replace(finished, out=tmp_path / "base")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "state/optimizer.pt",
    "state/trainer.json",
    "state/files.json",
]


@pytest.mark.parametrize("harm", [flipped, zeros, emptied, cut, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_any_kind_is_named_and_the_checkpoint_before_is_taken(
    name: str, harm: Callable[[Path], None], again: StageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(again.out / "checkpoint-4" / name)
    found = checkpoint.read_newest(again.out)
    said = capsys.readouterr().out
    assert found is not None
    assert (found.path.name, found.trainer["step"]) == ("checkpoint-3", 3)
    if name != "state/files.json":  # its damage may show as that of a file in its list
        assert f"checkpoint-4: {name} is damaged" in said
    assert "going back to step 3" in said
    assert (again.out / "checkpoint-4.damaged-1").is_dir(), "nothing is deleted"


def test_where_no_checkpoint_can_be_read_nothing_starts_over(again: StageConfig) -> None:
    for path in checkpoints(again.out):
        zeros(path / "state" / "trainer.json")
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*checkpoint-4.*checkpoint-3.*start anew"):
        run.train(again)
    assert len(checkpoints(again.out)) == 2


@pytest.mark.parametrize("name", ["state/optimizer.pt", "state/trainer.json", "model.safetensors"])
def test_a_damaged_checkpoint_of_an_earlier_version_is_found_without_checksums(
    name: str, again: StageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = again.out / "checkpoint-4"
    sizes = {each.relative_to(path).as_posix(): each.stat().st_size for each in path.rglob("*") if each.is_file()}
    del sizes["state/files.json"]
    (path / "state" / "files.json").write_text(json.dumps(sizes))
    zeros(path / name)
    assert checkpoint.read_newest(again.out) is not None
    assert "going back to step 3" in capsys.readouterr().out


def of_another_stage(state: dict[str, Any]) -> None:
    state["stage"] = "sft"


def of_another_step(state: dict[str, Any]) -> None:
    state["step"] = 24


def of_other_settings(state: dict[str, Any]) -> None:
    state["settings"]["matrix_lr"] = 7.0


def of_another_precision(state: dict[str, Any]) -> None:
    state["environment"]["mixed_precision"] = "bf16"


def of_a_longer_run(state: dict[str, Any]) -> None:
    state["settings"]["max_steps"] = 24


def changed(again: StageConfig, change: Callable[[dict[str, Any]], None]) -> None:
    for folder in checkpoints(again.out):
        path = folder / "state" / "trainer.json"
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))
        listed = json.loads((folder / "state" / "files.json").read_text())
        listed["state/trainer.json"] = path.stat().st_size
        (folder / "state" / "files.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_stage, r"checkpoint-4: a checkpoint of sft, not of base"),
        (of_another_step, r"checkpoint-4: state/trainer\.json is damaged \(it says step 24\)"),
        (of_other_settings, r"checkpoint-4 holds a run with other settings \(--matrix-lr was 7\.0, is 0\.02\)"),
        (of_a_longer_run, r"--max-steps was 24, is 4"),
        (of_another_precision, r"trained with --mixed-precision bf16, now no; give bf16, or another --out"),
    ],
)
def test_a_checkpoint_that_is_not_of_this_run_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, again: StageConfig
) -> None:
    changed(again, change)
    (again.out / "config.yaml").unlink()  # it knows the settings too, and would refuse first
    with pytest.raises(ValueError, match=message):
        run.train(again)
    assert len(checkpoints(again.out)) == 2


def test_a_checkpoint_beyond_the_last_step_is_refused(again: StageConfig) -> None:
    changed(again, lambda state: state["settings"].update(max_steps=2))
    (again.out / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-4: beyond --max-steps 2"):
        run.train(replace(again, max_steps=2))


def test_a_missing_file_of_the_run_is_said(again: StageConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.yaml", "metrics.jsonl"):
        (again.out / name).unlink()
    assert run.train(again).finished
    said = capsys.readouterr().out
    assert "config.yaml is missing" in said
    assert "metrics.jsonl is missing" in said


def test_what_others_put_into_the_folder_stays(finished: StageConfig, tmp_path: Path) -> None:
    config = replace(finished, out=tmp_path / "base", keep=1, save_every=1)
    theirs = [config.out / "checkpoint-99" / "notes.txt", config.out / "checkpoint-1" / "plots" / "loss.svg"]
    theirs[0].parent.mkdir(parents=True)
    theirs[0].write_text("mine")
    run.train(replace(config, max_steps=1))
    theirs[1].parent.mkdir()
    theirs[1].write_text("mine")
    for name in ("config.yaml", "eval.json"):
        (config.out / name).unlink()
    changed(config, lambda state: state["settings"].update(max_steps=3))
    assert run.train(replace(config, max_steps=3)).step == 3
    assert [path.read_text() for path in theirs] == ["mine", "mine"]
    assert [path.name for path in checkpoints(config.out)] == ["checkpoint-3"]


def test_a_process_resumes_from_the_step_that_the_main_process_names(
    again: StageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of a shared disk appear late: another process may not see the same checkpoints."""
    read, asked = checkpoint.read, []

    def named(said: list[Any]) -> list[Any]:
        said[:] = [3, None]
        shutil.rmtree(again.out / "checkpoint-4")
        return said

    def noted(path: Path, *rest: Any, **options: Any) -> Any:
        asked.append(path.name)
        return read(path, *rest, **options)

    monkeypatch.setattr(loop, "broadcast_object_list", named)
    monkeypatch.setattr(checkpoint, "read", noted)
    monkeypatch.setattr(checkpoint, "read_newest", lambda *_: None)
    assert run.train(again).step == 4
    assert asked == ["checkpoint-3"]


def test_micro_batches_that_were_split_for_memory_stay_split_after_a_kill(again: StageConfig) -> None:
    shutil.rmtree(again.out / "checkpoint-4")
    changed(again, lambda state: state.update(parts=2))
    run.train(again)
    assert json.loads((again.out / "checkpoint-4" / "state" / "trainer.json").read_text())["parts"] == 2


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_saved_file_follows_the_umask(mask: int, finished: StageConfig, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        run.train(replace(finished, out=tmp_path / "base", max_steps=1))
    finally:
        os.umask(before)
    assert modes(tmp_path / "base") == {0o666 & ~mask}


def rewritten(path: Path) -> None:
    """Write other content of the same size."""
    path.write_text(path.read_text().replace("Tom", "Tim").replace("What", "Whot"))


def test_a_stage_made_from_something_else_says_what_changed_and_what_to_run(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, tokenizer)
    stages = stages_in(tmp_path)
    base = replace(stages["base"][1], max_steps=1)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"- path: {tmp_path}/problems/train.jsonl\n")
    tuned = replace(stages["sft"][1], max_steps=2, save_every=1, data=mixture)  # type: ignore[call-arg]
    run.train(base)
    run.train(tuned)
    assert run.run(tuned) == 0
    assert "finished, nothing to do" in capsys.readouterr().out
    rewritten(tmp_path / "problems" / "test.jsonl")  # SFT is only measured on these
    assert run.run(tuned) == 0
    assert re.search(
        r"measured on other files \(--problems test\.jsonl\); delete .*eval\.json", capsys.readouterr().out
    )
    rewritten(tmp_path / "problems" / "train.jsonl")
    wanted = rf"sft was made from something else: changed since are --data \S+train\.jsonl.*`mv {tuned.out} {tuned.out}\.old`"
    with pytest.raises(ValueError, match=wanted):
        run.run(tuned)
    (tuned.out / "eval.json").unlink()  # and so does a resume
    with pytest.raises(ValueError, match=wanted):
        run.run(tuned)
    shutil.rmtree(tuned.out)
    run.train(tuned)
    flipped(base.out / "model.safetensors")
    with pytest.raises(ValueError, match=r"changed since are --model model\.safetensors\. "):
        run.run(tuned)


def test_a_run_continued_on_another_computer_says_so_first(
    again: StageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(again, lambda state: state["environment"].update(torch="1.0", threads=64, fast="unknown"))
    run.train(again)
    said = capsys.readouterr().out
    assert "made with fast unknown, continued with True" in said
    assert "made with torch 1.0, continued with" in said
    assert "made with threads 64" in said


def test_nothing_to_do_is_known_without_torch(finished: StageConfig) -> None:
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in as_settings(finished).items() if value is not None
    ]
    script = [sys.executable, "-X", "importtime", "scripts/pretrain.py"]
    wanted = [flag for flag in flags if not flag.startswith(("--sample-prompts", "--compile", "--hub-private"))]
    done = subprocess.run([*script, *wanted], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "nothing to do" in done.stdout) == (0, True), done.stderr[-500:]
    assert "import time:" in done.stderr
    assert not re.search(r"\| +(torch|transformers|accelerate)$", done.stderr, re.MULTILINE)
