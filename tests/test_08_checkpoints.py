"""Chapter 8, checkpoints: a folder is opened for what it says that it is, or refused in one line that says why."""

import ast
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edu.model.load import load_model

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
    assert opened == ["edu/model/load.py"]
