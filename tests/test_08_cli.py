"""Chapter 8, continued: what a user types wrong is answered by one line, a nonzero exit, and nothing lost."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edu.chat.mixture import load_sft_data, read_mixture
from edu.config.cli import parse
from edu.config.pretrain import PretrainConfig
from edu.config.rl import RLConfig
from edu.config.sft import SFTConfig
from edu.config.stages import as_settings
from edu.data.packing import TrainingExample
from edu.data.tokenizer import Tokenizer
from edu.training.resume import FREE_ON_RESUME

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


def run(*command: str) -> tuple[int, str]:
    """Exit code and stderr of a script, fast: none of these reaches torch."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"COLUMNS": "400"},
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["scripts/pretrain.py", "--max-steps", "0"], "error: --max-steps 0: must be greater than or equal to 1"),
        (["scripts/pretrain.py", "--on-bad-shard", "ignore"], "--on-bad-shard"),
        (["scripts/pretrain.py", "--config", "nowhere.yaml"], "error: nowhere.yaml: no such file"),
        (["scripts/pretrain.py", "--config"], "error: --config: name a YAML file"),
        (["scripts/pretrain.py", "--warmup", "-5"], "error: --warmup -5: must be greater than or equal to 0"),
        (["scripts/pretrain.py", "--weight-decay", "inf"], "error: --weight-decay inf: must be finite"),
        (["scripts/pretrain.py", "--layers", "0"], "error: --layers 0: must be greater than or equal to 1"),
        (["scripts/pretrain.py", "--depth", "999999999"], "error: --depth 999999999: must be less than or equal to"),
        (["scripts/sft.py", "--seed", "-1"], "error: --seed -1: must be greater than or equal to 0"),
        (["scripts/sft.py", "--multi-turn", "nan"], "error: --multi-turn nan: must be finite"),
        (["scripts/eval_model.py", "--limit", "0"], "error: --limit 0: must be greater than or equal to 1"),
        (
            ["scripts/pretrain.py", "--depth", "4", "--layers", "2"],
            "error: --depth 4 means as many layers: leave --layers 2",
        ),
        (["scripts/pretrain.py", "--depth", "4", "--tokenizer", "nowhere"], "error: --tokenizer nowhere: no tokenizer"),
        (["scripts/rl.py", "--samples", "1"], "error: --samples 1: a group needs two or more"),
        (["scripts/rl.py", "--clip-low", "0.1"], "error: --clip-low: nothing is clipped in one update"),
        (["scripts/eval_model.py", "--task", "poems"], "error: --task poems: must be bpb, tiny"),
        (["scripts/sft.py", "--unknown-flag", "3"], "--unknown-flag"),
        (["scripts/download_shards.py", "--source", "nothing here"], "error:"),
        (["scripts/train_tokenizer.py", "--data", "nowhere"], "error: nowhere"),
        (["scripts/show_problem.py", "--path", "nowhere.jsonl"], "error: nowhere.jsonl: no such file"),
        (["scripts/report.py", "--run", "runs/never"], "error: --run runs/never"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command: list[str], message: str) -> None:
    code, stderr = run(*command)
    assert code == 2, stderr
    assert message in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sample_prompts: hi", "sample_prompts hi: must be a list"),
        (b"sample_prompts: [1]", "sample_prompts [1]: must be a valid string"),
        (b"weight_decay: .inf", "weight_decay inf: must be finite"),
        (b"warmup: -5", "warmup -5: must be greater than or equal to 0"),
        (b"max_steps: true", "max_steps True: must be a valid integer"),
        (b"max_steps: '7'", "max_steps 7: must be a valid integer"),
        (b"lr_scale: yes", "lr_scale True: must be a valid number"),
        (b"lr_scale: 2e400", "lr_scale inf: must be finite"),
        (b"out: 3", "out 3: must be a valid string"),
        (b"compile: 1", "compile 1: must be a valid boolean"),
        (b"data: {a: b}", "data {'a': 'b'}: must be a valid string"),
        (b"log_with: mlflow", "log_with mlflow: must be 'tensorboard', 'wandb' or 'trackio'"),
        (b"seed: 1\nseed: 2", "given twice: seed"),
        (b"max-steps: 1\nmax_steps: 2", "max_steps is given twice"),
        (b"steps: 1", "unknown setting 'steps'; known are"),
        (b"- max_steps", "expected lines of `name: value`"),
        (b"sample_prompts: &a [*a]", "sample_prompts"),
        (b"[" * 5000, "nested too deep"),
        (b"max_steps: !!int ''", "not YAML"),
        (b"max_steps: !!python/object:os.system {}", "not YAML"),
        ("max_steps: 7".encode("utf-16"), "not UTF-8"),
        ("out: Stra\u00dfe".encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_settings_file_that_is_wrong_is_named_with_the_setting(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"settings\.yaml") as caught:
        parse(SFTConfig, ["--config", str(path)])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_config_made_in_python_is_checked_and_typed_as_one_from_a_command_line() -> None:
    made: dict[str, object] = {"out": "here", "sample_prompts": ["a"], "problems": "none", "lr_scale": 1}
    config = SFTConfig(**made)  # type: ignore[arg-type]
    assert (config.out, config.sample_prompts, config.problems, config.lr_scale) == (Path("here"), ("a",), None, 1.0)
    with pytest.raises(ValueError, match="--weight-decay inf: must be finite"):
        SFTConfig(weight_decay=float("inf"))
    with pytest.raises(ValueError, match="--eval-limit 0: must be"):
        SFTConfig(eval_limit=0)


@pytest.mark.parametrize("none", ["None", "none", "NONE"])
def test_an_optional_setting_is_left_out_by_none_in_any_spelling(tmp_path: Path, none: str) -> None:
    (tmp_path / "a.yaml").write_text(f"persona: none.yaml\nproblems: {none}\nnum_problems: {none}\n")
    for flags in (
        ["--config", str(tmp_path / "a.yaml")],
        ["--problems", none, "--num-problems", none],
        [f"--problems={none}", f"--num-problems={none}"],
    ):
        config = parse(RLConfig, flags)
        assert (config.problems, config.num_problems) == (None, None)
    assert parse(SFTConfig, ["--out", none]).out == Path(none)  # a folder has to be somewhere


@pytest.mark.parametrize("script", sorted(path.name for path in Path("scripts").glob("*.py")))
def test_help_says_what_a_script_does_with_an_example_and_how_settings_come_from_a_file(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    about, options = done.stdout.split("options", 1)
    usage, _, example = " ".join(about.split()).partition("Example: ")
    assert f"scripts/{script}" in example
    assert len(usage.split("]")[-1].split()) > 3
    assert "--config" in options


def test_help_needs_no_torch() -> None:
    code, stderr = run("-X", "importtime", "scripts/rl.py", "--help")
    assert code == 0
    assert "torch" not in stderr
    assert "transformers" not in stderr


def test_a_parquet_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for folder in (tmp_path, tmp_path / "val"):
        pq.write_table(pa.table({"words": ["a"]}), folder / "shard_00000.parquet")
    code, stderr = run("scripts/train_tokenizer.py", "--data", str(tmp_path), "--out", str(tmp_path / "tokenizer"))
    assert code == 2
    assert "shard_00000.parquet" in stderr
    assert "text" in stderr
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no rows; the file is empty"),
        (["{"], "row 1: not valid JSON"),
        (
            [json.dumps({"messages": [*GOOD["messages"][:1], *GOOD["messages"]]})],
            "row 1: message 1: role 'user', expected assistant",
        ),
        (
            [json.dumps(GOOD), json.dumps({"messages": [{"role": "robot", "content": "x"}]})],
            "row 2: message 0: role 'robot'",
        ),
        ([json.dumps({"text": "x"})], "row 1: fields ['text']; expected"),
        ([json.dumps({"messages": GOOD["messages"][:1]})], "no conversation can be used"),
        ([json.dumps({"prompt": None, "completion": "x"})], "row 1: fields ['completion', 'prompt']; expected"),
    ],
)
def test_a_bad_conversation_is_named_by_its_row(
    lines: list[str], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"chats\.jsonl") as caught:
        load_sft_data(path, tokenizer, 64)
    assert message in str(caught.value)


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "word " * 200}]}
    silent = {"messages": GOOD["messages"][:1]}
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, long, silent)))
    data = load_sft_data(path, tokenizer, 64, val_every=10**6)
    assert data.report[str(path)] == {"used": 1, "longer than 64 tokens": 1, "nothing that the assistant said": 1}
    assert "1 longer than 64 tokens" in data.describe()


@pytest.mark.parametrize(
    "entry",
    [
        "nope: 1",
        "path: a\n  hub: b/c",
        "path: a\n  weight: 0",
        "path: a\n  weight: x",
        "path: a\n  weight: .inf",
        "path: [a]",
        "path: a\n  split: 3",
        "3",
        "[1]",
    ],
)
def test_a_source_of_a_mixture_that_is_none_is_named(tmp_path: Path, entry: str) -> None:
    (tmp_path / "mixture.yaml").write_text(f"- path: good.jsonl\n- {entry}\n")
    with pytest.raises(ValueError, match=r"mixture\.yaml, source 1: give either path or hub, .*; found "):
        read_mixture(tmp_path / "mixture.yaml")


def test_a_mixture_of_hub_and_files_is_read_the_same_twice_weighted_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's data set is a folder here: `load_dataset` takes either by name."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def chat(question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]

    out_of_order = [{"role": "user", "content": "a"}] * 2
    hub = [{"messages": messages} for messages in (*(chat(f"hub {i}") for i in range(20)), out_of_order, [])]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hub))
    lines = [{"prompt": f"text {i}", "completion": "Yes."} for i in range(20)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    rows = [{"prompt": chat(f"row {i}")[:1], "completion": chat("")[1:], "id": i} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    entries = [
        {"hub": str(tmp_path / "hub"), "weight": 2},
        {"path": str(tmp_path / "lines.jsonl"), "weight": 0.5},
        {"path": str(tmp_path / "rows.parquet")},
    ]
    (tmp_path / "mixture.yaml").write_text(json.dumps(entries))
    data, again = (load_sft_data(tmp_path / "mixture.yaml", tokenizer, 64, val_every=5) for _ in range(2))
    assert [piece.ids.tolist() for piece in data.train] == [piece.ids.tolist() for piece in again.train]
    assert [piece.ids.tolist() for piece in data.val] == [piece.ids.tolist() for piece in again.val]
    assert data.report[str(tmp_path / "hub")] == {"used": 20, "no conversation in order": 2}

    def counts(pieces: list[TrainingExample]) -> dict[str, Counter[str]]:
        texts = [tokenizer.decode(piece.ids, skip_special=True) for piece in pieces]
        return {name: Counter(text for text in texts if text.startswith(name)) for name in ("hub", "text", "row")}

    train, val = counts(data.train), counts(data.val)
    assert set(train["hub"].values()) == {2}
    assert set(train["row"].values()) == {1}
    assert set(train["text"].values()) == {1}
    assert len(train["text"]) == (20 - len(val["text"])) // 2
    assert len(train["hub"]) + len(val["hub"]) == len(train["row"]) + len(val["row"]) == 20
    assert min(map(len, val.values())) > 0
    assert {n for count in val.values() for n in count.values()} == {1}  # weights are for training alone
    assert not {text for count in val.values() for text in count} & {text for count in train.values() for text in count}


@pytest.mark.parametrize("recipe", sorted(path.name for path in Path("recipes").iterdir()))
def test_every_recipe_is_read_and_its_stages_follow_each_other(recipe: str) -> None:
    folder = Path("recipes") / recipe
    base, tuned, reinforced = (
        parse(kind, ["--config", str(folder / f"{name}.yaml")])
        for name, kind in (("base", PretrainConfig), ("sft", SFTConfig), ("rl", RLConfig))
    )
    assert (tuned.model, reinforced.model) == (str(base.out), str(tuned.out))
    for mixture in (tuned.data, reinforced.replay):
        assert mixture is not None
        assert read_mixture(mixture)


def test_a_depth_implies_the_rest_and_what_is_given_wins(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    flags = ["--depth", "12", "--tokenizer", str(tmp_path), "--sequence-length", "2048"]
    d12 = parse(PretrainConfig, flags)
    assert (d12.layers, d12.channels, d12.heads, d12.kv_heads) == (12, 768, 6, 6)
    assert (d12.batch_size * 2048, d12.lr_scale) == (2**19, 1.0)  # where the rules were tuned
    parameters = 12 * 12 * 768**2 + 512 * 768
    assert d12.max_steps == round(12 * parameters / 2**19)
    small = parse(PretrainConfig, [*flags, "--depth", "4", "--heads=4", "--batch-size", "64", "--ratio", "2"])
    assert (small.channels, small.heads, small.kv_heads, small.batch_size) == (256, 4, 2, 64)
    assert small.lr_scale == pytest.approx((64 * 2048 / 2**19) ** 0.5)
    assert small.max_steps == round(2 * (4 * 11 * 256**2 + 512 * 256) / (64 * 2048))
    settings = tmp_path / "x.yaml"
    settings.write_text("depth: 12\nmax_steps: 7\nlr_scale: 0.5\n")
    told = parse(PretrainConfig, ["--config", str(settings), *flags[2:]])
    assert (told.max_steps, told.lr_scale, told.batch_size) == (7, 0.5, d12.batch_size)


def test_defaults_are_the_tiny_recipe() -> None:
    for name, kind in (("base", PretrainConfig), ("sft", SFTConfig), ("rl", RLConfig)):
        recipe = as_settings(parse(kind, ["--config", f"recipes/tiny/{name}.yaml"]))
        default = as_settings(kind())
        assert {key for key in recipe if recipe[key] != default[key]} <= FREE_ON_RESUME, name
