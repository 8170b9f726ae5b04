"""Every file that a user can hand over, mutated: it is read, or refused in one line that names it; nothing else happens."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edu.chat.mixture import load_sft_data, read_mixture
from edu.config.cli import parse
from edu.config.pretrain import PretrainConfig
from edu.config.rl import RLConfig
from edu.config.sft import SFTConfig
from edu.config.stages import as_settings
from edu.data.metrics_log import read_metrics
from edu.data.shard_folder import verify_folder
from edu.data.tokenizer import Tokenizer
from edu.evaluation.comparison import read_records
from edu.evaluation.report import sections
from edu.hub.nanochat import read_config, read_tokenizer
from edu.model.gpt import GPT, GPTConfig
from edu.synthetic.persona import load_identity_eval, load_persona, load_starters
from edu.tasks.gsm8k import GSM8K
from edu.training.checkpoint import load_model
from edu.training.finished import nothing_to_do

PERSONA = load_persona(Path("data/persona.yaml"))
ODD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        10**30,
        -(10**400),
        0.5,
        -0.0,
        1e308,
        float("inf"),
        float("-inf"),
        float("nan"),
    ),
    *("", " ", "none", "x" * 5000, "{name", "{0}", "{x}", "[a|b", "\x1b[2J", "\x00", "\ud800", "😀", "../../etc", "1"),
    *([], [[]], [None], {}, {"": None}, {"a": {"b": [1]}}, ["a", 1, {}]),
]


@dataclass(frozen=True)
class Reader:
    """A file with right content, how it is written, and who reads it."""

    file: str
    content: Any
    read: Callable[[Path], object]
    dump: Callable[[Any], str] = json.dumps
    closed: bool = False
    """Refuses keys that it does not know."""


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def from_yaml(path: str) -> Any:
    return yaml.safe_load(Path(path).read_text())


def show(run: Path) -> None:
    """A report of it, which must be made whatever is found."""
    sections(run)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1+1"}}}],
}
USED = [CHAT[0], CALL, {"role": "tool", "content": "2"}, CHAT[1]]
EVAL = {"stage": "sft", "step": 160, "seconds": 3.5, "math": {"greedy": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 96}},
        "bpb": {"model": 0.3, "unigram": 2.0}, "environment": {"torch": "2.13"}}  # fmt: skip
ROWS = [{"step": step, "loss": 3.0 - step, "seconds": 1.0, "eval/pass@1": 0.5} for step in range(3)]
SAID = [{"step": step, "prompt": "Hi", "completion": "Hello"} for step in range(2)]
SOLVED = [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2", "kind": "+"}] * 2
SOURCES = [{"path": "a.jsonl", "weight": 2}, {"hub": "a/b", "config": "main", "split": "train", "weight": 0.5}]
META = {
    "model_config": {"sequence_len": 64, "vocab_size": 300, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
}


def readers(tokenizer: Tokenizer, folder: Path) -> dict[str, Reader]:
    """The readers by name; `folder` holds what they need beside the file."""
    tokenizer.save(folder / "tokenizer")
    spec = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    about = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    GPT(GPTConfig.tiny(hidden_size=32, intermediate_size=32, vocab_size=64)).save_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    shard = {"val/shard_00000.parquet": {"size": 3, "sha256": "0" * 64, "url": "", "source": "tiny"}}

    def finished(path: Path) -> object:
        return nothing_to_do(SFTConfig(out=path.parent))

    def stage(kind: type) -> Callable[[Path], object]:
        return lambda path: parse(kind, ["--config", str(path)])

    settings_of = {kind: as_settings(kind()) for kind in (PretrainConfig, SFTConfig, RLConfig)}
    dump = yaml.safe_dump
    return {
        "pretraining": Reader("base.yaml", settings_of[PretrainConfig], stage(PretrainConfig), dump, closed=True),
        "sft": Reader("sft.yaml", from_yaml("recipes/tiny/sft.yaml"), stage(SFTConfig), dump, closed=True),
        "rl": Reader("rl.yaml", settings_of[RLConfig], stage(RLConfig), dump, closed=True),
        "mixture": Reader("mixture.yaml", SOURCES, read_mixture, dump, closed=True),
        "persona": Reader("persona.yaml", from_yaml("data/persona.yaml"), load_persona, dump),
        "identity": Reader("eval.yaml", from_yaml("data/identity_eval.yaml"), lambda path: load_identity_eval(path, PERSONA), dump, closed=True),
        "starters": Reader("starters.yaml", from_yaml("data/starter_prompts.yaml"), lambda path: load_starters(path, PERSONA), dump),
        "problems": Reader("problems.jsonl", SOLVED, lambda path: GSM8K("train", path), lines),
        "conversations": Reader("chats.jsonl", [{"messages": CHAT}, {"messages": USED}], lambda path: load_sft_data(path, tokenizer, 64), lines),
        "prompts": Reader("prompts.jsonl", [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 2, lambda path: load_sft_data(path, tokenizer, 64), lines),
        "metrics": Reader("metrics.jsonl", ROWS, read_metrics, lines),
        "records": Reader("records.jsonl", [{"task": "math", "prompt": "a"}], read_records, lines),
        "manifest": Reader("manifest.json", shard, lambda path: verify_folder(path.parent)),
        "tokenizer": Reader("tokenizer/tokenizer.json", spec, lambda path: Tokenizer.load(path.parent)),
        "tokenizer config": Reader("tokenizer/tokenizer_config.json", about, lambda path: Tokenizer.load(path.parent)),
        "model config": Reader("model/config.json", config, lambda path: load_model(str(path.parent))),
        "finished": Reader("eval.json", EVAL, finished),
        "resumed": Reader("config.yaml", as_settings(SFTConfig(out=folder)), finished, dump),
        "report, evaluation": Reader("sft/eval.json", EVAL, lambda path: show(path.parents[1])),
        "report, metrics": Reader("sft/metrics.jsonl", ROWS, lambda path: show(path.parents[1]), lines),
        "report, samples": Reader("sft/samples.jsonl", SAID, lambda path: show(path.parents[1]), lines),
        "report, settings": Reader("sft/config.yaml", settings_of[SFTConfig], lambda path: show(path.parents[1]), dump),
        "nanochat, sizes": Reader("meta.json", META, read_config),
        "nanochat, tokenizer": Reader("tokenizer.pkl", {"a": 1}, read_tokenizer, lambda tree: f"\x80\x04}}{tree}"),
    }  # fmt: skip


NAMES = [
    *("pretraining", "sft", "rl", "mixture", "persona", "identity", "starters", "problems", "conversations", "prompts"),
    *("metrics", "records", "manifest", "tokenizer", "tokenizer config", "model config", "finished", "resumed"),
    *("report, evaluation", "report, metrics", "report, samples", "report, settings"),
    *("nanochat, sizes", "nanochat, tokenizer"),
]


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of everything in a tree, itself left out; of a long list or dict the first entries only."""
    inner = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [place for key, value in inner[:40] for place in [(*path, key), *nodes(value, (*path, key))]]


def mutated(tree: Any, rng: random.Random) -> Any:
    """A copy with one to three places changed, left out, doubled, renamed or wrapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = nodes(tree)
        if not places:
            return rng.choice(ODD)
        *path, key = rng.choice(places)
        parent = tree
        for step in path:
            parent = parent[step]
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                parent[key] = rng.choice(ODD)
            case 4:
                del parent[key]
            case 5:
                parent[key] = [parent[key]] * rng.choice((1, 2))
            case 6 if isinstance(parent, dict):
                parent[rng.choice(("", "x", "\x1b", "name", "step"))] = parent.pop(key)
            case _:
                parent[key] = {"a": parent[key]}
    return rng.choice((tree, tree, tree, tree, [tree], {"a": tree}, rng.choice(ODD)))


def scrambled(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, flipped, filled in, in another encoding, or nested ten thousand deep."""
    at = rng.randrange(len(data) + 1)
    match rng.randrange(9):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case 2:
            return (
                data[:at]
                + rng.choice(
                    (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"{", b"]", b"&a ", b"*a", b"!!int ''", b"\xc2\x85")
                )
                + data[at:]
            )
        case 3:
            return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-16-le", "utf-8-sig")))
        case 4:
            return rng.choice((b"[", b'{"a":', b"- ", b"a: {", b"!!python/object:os.system ")) * 10_000
        case 5:
            return b"\x00" * len(data)
        case 6:
            return data[:at] + data
        case 7:
            return b"1" * 5000
        case _:
            return data.replace(b"1", b"9" * 400)


@pytest.fixture
def known(tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Reader]:
    found = readers(tokenizer, tmp_path)
    assert list(found) == NAMES
    return found


def outcome(reader: Reader, path: Path) -> str:
    """The line by which a file is refused, "" if it is read; any other end is a failure."""
    try:
        reader.read(path)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def place(reader: Reader, home: Path, data: bytes) -> Path:
    """The file with this content, in a folder that looks like what its reader expects."""
    path = home / reader.file
    for folder in (path.parent, home / "checkpoint-1"):
        folder.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("examples", [50, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_file_is_read_or_refused_in_one_line_that_names_it(
    name: str, examples: int, known: dict[str, Reader], tmp_path: Path
) -> None:
    reader = known[name]
    right = reader.dump(reader.content).encode("utf-8", "surrogatepass")

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**32 - 1))
    def law(seed: int) -> None:
        rng = random.Random(seed)
        if rng.random() < 0.6:
            try:
                data = reader.dump(mutated(reader.content, rng)).encode("utf-8", "surrogatepass")
            except (TypeError, ValueError, yaml.YAMLError):
                data = right[:-1]
        else:
            data = scrambled(right, rng)
        path = place(reader, tmp_path, data)
        said = outcome(reader, path)
        if said:
            assert path.name in said or str(path.parent) in said or "--" in said, said
            assert len(said.splitlines()) == 1, said

    law()


@pytest.mark.parametrize("name", NAMES)
def test_a_right_file_is_read_and_a_key_that_has_no_effect_is_refused(
    name: str, known: dict[str, Reader], tmp_path: Path
) -> None:
    reader = known[name]
    path = place(reader, tmp_path, reader.dump(reader.content).encode())
    if name not in ("nanochat, tokenizer",):
        assert outcome(reader, path) == ""
    if reader.closed:
        content = json.loads(json.dumps(reader.content))
        (content[0] if isinstance(content, list) else content)["no_such_key"] = ["a"]
        path.write_text(reader.dump(content))
        assert "no_such_key" in outcome(reader, path)
