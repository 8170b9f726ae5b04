"""What is pushed is a model that strangers can use, whoever loads it; and no push that fails costs anything."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import certifi
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from edu.config.pretrain import PretrainConfig
from edu.config.rl import RLConfig
from edu.config.stages import as_settings
from edu.data.hub_files import EVAL_RESULTS
from edu.data.tokenizer import Tokenizer
from edu.hub.push import Card, push, write_card
from edu.model.gpt import GPT, GPTConfig
from edu.model.load import load_model, load_tokenizer
from edu.stages.run import train
from tests.hub_server import Fault, Hub, serve

FIGURES = {
    "step": 20,
    "math": {"greedy": {"accuracy": {"value": 0.82, "low": 0.77, "high": 0.86, "n": 300}, "answers": {"empty": 0.5}}},
    "bpb": {"model": 0.31},
}
COURSE = [{"step": step, "loss": 9.0 - step, "reward": step / 20} for step in range(1, 21)]
PUSHED = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", EVAL_RESULTS),
}
# huggingface_hub sends files in a way that its HTTP library calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
PUSH = ("scripts/push.py", "--model")
STOCK = """
import json, sys

sys.modules["edu"] = None  # the package cannot be imported here
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("me/tiny")
found = {}
for revision in ("main", "dev"):
    model = AutoModelForCausalLM.from_pretrained("me/tiny", revision=revision)
    ids = tokenizer("The cat", return_tensors="pt").input_ids
    found[revision] = [type(model).__name__, ids.tolist(), model(ids).logits[0, -1, :8].tolist()]
chat = pipeline("text-generation", model="me/tiny")
found["chat"] = chat([{"role": "user", "content": "Hi"}], max_new_tokens=4)[0]["generated_text"]
try:
    AutoModelForCausalLM.from_pretrained("me/tiny", token=False, cache_dir=sys.argv[1])
except OSError as error:
    found["stranger"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def here(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The server as the Hub of this very process, whose libraries have read their environment long ago."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder as a finished stage leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "rl"
    torch.manual_seed(0)
    model = GPT(replace_vocabulary(GPTConfig.tiny(), tokenizer))
    model.save_pretrained(folder)
    tokenizer.save(folder, model_max_length=model.config.max_position_embeddings)
    settings = as_settings(RLConfig(out=folder, problems=None, facts=None, model="you/sft"))
    data = [("openai/gsm8k", "7,473 problems"), (str(folder.parent / "mine.jsonl"), "600 used")]
    write_card(folder, Card("rl", 20, settings, data, COURSE, FIGURES))
    for name in ("state/optimizer.pt", "checkpoint-20/config.json", "metrics.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def replace_vocabulary(config: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    config.vocab_size = tokenizer.vocab_size
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.bos,
        tokenizer.assistant_end,
        tokenizer.pad,
    )
    return config


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(hub: Hub, home: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python process with its own HF_HOME, for which the server is the Hub."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    return subprocess.run(
        [sys.executable, *command],
        env=inherited | ours | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_card_says_what_made_the_model_how_it_went_how_good_it_is_and_how_to_use_it(checkpoint: Path) -> None:
    card = ModelCard.load(checkpoint / "README.md")
    head = card.data.to_dict()
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == ("mit", "transformers", "text-generation")
    assert (head["datasets"], head["base_model"]) == (["openai/gsm8k"], "you/sft")
    for words in (
        'pipeline("text-generation"',
        "| math / greedy / accuracy | 82.0% [77.0, 86.0], n=300 |",
        "| bpb / model | 0.310 |",
        "| max_steps | 200 |",
        "| mine.jsonl | 600 used |",
        "| step | reward |\n| --- | --- |\n| 2 | 0.075 |",
        "| 20 | 0.975 |\n| curve | ▁▂▃▃▄▅▆▆▇█ |",
        "parameters in 2 layers",
        "## Limitations",
    ):
        assert words in card.text
    for words in ("trust_remote_code", str(checkpoint.parent), "empty", "| loss"):
        assert words not in card.text


def test_nothing_in_a_card_is_markup_but_its_own(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\x1b[2J\x9b [x](javascript:a) a|b"
    write_card(
        tmp_path, Card("sft", 1, {"sample_prompts": [evil], evil: evil}, [(evil, evil)], [], {evil: {evil: 0.5}})
    )
    text = (tmp_path / "README.md").read_text()
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "[x](" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {3}


def test_a_card_of_a_base_model_shows_text_not_chat_and_needs_no_figures(tmp_path: Path) -> None:
    write_card(tmp_path, Card(course=[{"step": 1, "loss": math.nan}]))
    assert "| 1 | nan |" in (tmp_path / "README.md").read_text()
    write_card(tmp_path, Card())
    text = (tmp_path / "README.md").read_text()
    assert '"role"' not in text
    assert "## Evaluation" not in text
    assert "## Course" not in text
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["edu-chat", "nanochat", "base"]


def test_only_a_whole_benchmark_of_the_hub_becomes_an_evaluation_result(checkpoint: Path, tmp_path: Path) -> None:
    (entry,) = parse_eval_result_entries(yaml.safe_load((checkpoint / EVAL_RESULTS).read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 82.0)
    assert "[77.0, 86.0], n=300" in str(entry.notes)
    for config in (RLConfig(problems=None, facts=None, eval_limit=300), RLConfig()):
        write_card(tmp_path, Card("rl", settings=as_settings(config), figures=FIGURES))
    assert not (tmp_path / EVAL_RESULTS).exists()


def test_what_is_pushed_works_in_plain_transformers_for_those_who_may_see_it(
    here: Hub, checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hub, home, before = here, tmp_path / "home", contents(checkpoint)
    home.mkdir()
    (home / "token").write_text("hf_me")  # as `hf auth login` leaves it
    pushed = run(hub, home, *PUSH, str(checkpoint), "--repo", "me/tiny", "--private")
    assert pushed.returncode == 0, pushed.stderr
    assert f"pushed: {hub.url}/me/tiny/commit/" in pushed.stdout
    assert contents(checkpoint) == before
    assert hub.repos["models/me/tiny"].private
    assert set(hub.files("models/me/tiny")) == {".gitattributes", *PUSHED}
    assert 'model="me/tiny"' in hub.files("models/me/tiny")["README.md"].decode()

    other = GPT.from_pretrained(checkpoint)
    other.lm_head.weight.data.neg_()
    other.save_pretrained(tmp_path / "dev")
    push(tmp_path / "dev", "me/tiny", revision="dev")
    assert "README.md" not in hub.files("models/me/tiny", "dev")  # of the model that was there before

    loaded = run(hub, tmp_path / "fresh", "-c", STOCK, str(tmp_path / "stranger"), HF_TOKEN="hf_me")
    assert loaded.returncode == 0, loaded.stderr
    found = json.loads(loaded.stdout.splitlines()[-1])
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode("The cat")]])
    for revision, sign in (("main", 1), ("dev", -1)):
        name, seen, logits = found[revision]
        assert (name, seen) == ("NanoChatForCausalLM", ids.tolist())
        torch.testing.assert_close(torch.tensor(logits), sign * GPT.from_pretrained(checkpoint)(ids).logits[0, -1, :8])
    assert [message["role"] for message in found["chat"]] == ["user", "assistant"]
    assert "hf auth login" in found["stranger"]


def test_our_own_loading_takes_a_hub_id(here: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    here.add("models/me/tiny", files, private=True)
    assert load_tokenizer("me/tiny").vocab_size == load_tokenizer(str(checkpoint)).vocab_size
    assert not any("resolve" in asked and "safetensors" in asked for asked in here.log)
    assert torch.equal(load_model("me/tiny").lm_head.weight, load_model(str(checkpoint)).lm_head.weight)
    assert not any("metrics.jsonl" in asked for asked in here.log if "resolve" in asked)
    here.add("models/me/other", {"config.json": b'{"model_type": "gpt2"}'})
    with pytest.raises(ValueError, match=r"--model me/other: its model_type is 'gpt2'"):
        load_model("me/other")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"--model you/never: the Hub answered 401 .*`hf auth login`"):
        load_model("you/never")


def test_offline_all_but_the_push_works_from_the_cache(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add("models/me/tiny", {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()})
    rows = [{"question": "What is 1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}] * 3
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), table)
    readme = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n---\n"
    files = {"README.md": readme.encode(), "main/train-00000-of-00001.parquet": table.getvalue().to_pybytes()}
    hub.add("datasets/openai/gsm8k", files)
    hub.add("datasets/you/secret", files, private=True)
    code = (
        "import datasets; datasets.config.USE_PARQUET_EXPORT = False  # which looks up another host\n"
        "from edu.data.hub_files import model_folder; from edu.data.rows import hub_rows; from edu.tasks.gsm8k import GSM8K\n"
        "task = GSM8K('train'); print(len(task), task.get_example(0)['answer'], model_folder('me/tiny').parent.parent)"
    )
    refused = run(hub, tmp_path, "-c", f"{code}; list(hub_rows('you/secret', None, 'train'))")
    assert "ValueError: you/secret: no such data set, or none that you may read" in refused.stderr
    assert "`hf auth login`" in refused.stderr
    first = run(hub, tmp_path, "-c", code)
    assert first.stdout.split() == ["3", "2", str(tmp_path / "hub" / "models--me--tiny")], first.stderr
    hub.log.clear()
    code += f"\nimport edu.hub.push; from pathlib import Path; edu.hub.push.push(Path({str(checkpoint)!r}), 'me/tiny')"
    offline = run(hub, tmp_path, "-c", code, HF_HUB_OFFLINE="1", HF_TOKEN="hf_me")
    assert offline.stdout == first.stdout
    assert offline.stderr.endswith("ValueError: HF_HUB_OFFLINE is set, so nothing can be pushed: unset it\n")
    assert not hub.log


@pytest.mark.parametrize(
    ("at", "status", "error", "message"),
    [
        ("POST /api/repos/create", 500, ConnectionError, r"the Hub answered 500 \(planned\); try again later"),
        ("/commit/", 500, ConnectionError, r"the Hub answered 500 \(planned\); try again later"),
        ("/commit/", 0, ConnectionError, r"the connection to the Hub failed .*; try again later"),
        ("/preupload/", 403, ValueError, r"the Hub answered 403 \(planned\); .*`hf auth login`.* may write it"),
        (
            "PUT /lfs/",
            403,
            ConnectionError,
            r"the connection to the Hub failed .*model.safetensors.* 403 .*; try again later",
        ),
    ],
    ids=["create", "commit", "connection lost", "no rights", "storage"],
)
def test_a_push_that_fails_says_why_changes_nothing_and_can_be_done_again(
    here: Hub, checkpoint: Path, at: str, status: int, error: type[Exception], message: str
) -> None:
    before = contents(checkpoint)
    here.faults.append(Fault(at, status))
    with pytest.raises(error, match=f"--repo me/tiny: {message}") as caught:
        push(checkpoint, "me/tiny")
    assert "\n" not in str(caught.value)
    assert set(here.repos["models/me/tiny"].commits.popitem()[1] if here.repos else {}) <= {".gitattributes"}
    here.repos.clear()
    push(checkpoint, "me/tiny")
    assert set(here.files("models/me/tiny")) >= PUSHED
    assert contents(checkpoint) == before


LOADING = "from edu.data.hub_files import model_folder; model_folder('me/never')"
ROWS = "from edu.data.rows import hub_rows; list(hub_rows('me/never', None, 'train'))"


@pytest.mark.parametrize(
    ("code", "environment", "words"),
    [
        (LOADING, {"HF_HUB_OFFLINE": "1"}, ["--model me/never", "HF_HUB_OFFLINE is set", "unset it"]),
        (ROWS, {"HF_HUB_OFFLINE": "1"}, ["me/never", "HF_HUB_OFFLINE is set", "unset it"]),
        (LOADING, {"HF_ENDPOINT": "ftp://127.0.0.1:9"}, ["--model me/never", "HF_ENDPOINT"]),
        (
            "push",
            {"HF_ENDPOINT": "127.0.0.1:9", "HF_TOKEN": "x"},
            ["--repo me/tiny", "HF_ENDPOINT (https://127.0.0.1:9)"],
        ),
        ("push", {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "x"}, ["HF_HUB_OFFLINE is set", "unset it"]),
        ("push", {"HF_TOKEN": ""}, ["hf auth login"]),
        ("push", {"HF_TOKEN": "hf_wrong"}, ["--repo me/tiny: the Hub answered 401", "HF_TOKEN"]),
    ],
)
def test_an_environment_in_which_the_hub_cannot_be_reached_is_one_line_with_the_cure(
    hub: Hub, checkpoint: Path, tmp_path: Path, code: str, environment: dict[str, str], words: list[str]
) -> None:
    script = f"from edu.config.cli import run_script\ndef main():\n    {code}\nrun_script(main)"
    command = [*PUSH, str(checkpoint), "--repo", "me/tiny"] if code == "push" else ["-c", script]
    done = run(hub, tmp_path, *command, **{"SSL_CERT_FILE": certifi.where(), **environment})
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last
    assert "SSL_CERT_FILE" not in last
    assert "Traceback" not in done.stderr


def test_a_push_through_xet_that_fails_says_why_too(
    here: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The Hub's own way for large files, which the server here has not: nothing but its absence is tried."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ConnectionError, match=r"--repo me/tiny: the connection to the Hub failed \(.*xet-write-token"):
        push(checkpoint, "me/tiny")
    assert set(here.files("models/me/tiny")) == {".gitattributes"}
    assert capfd.readouterr().err == ""


def test_a_push_that_cannot_work_says_what_to_do(
    here: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=f"--model {tmp_path}"):
        push(tmp_path, "me/tiny")
    with pytest.raises(ValueError, match="user/name"):
        push(checkpoint, "tiny")
    with pytest.raises(ValueError, match=r"--repo me/ti--ny: "):
        push(checkpoint, "me/ti--ny")
    with pytest.raises(ValueError, match=r"--repo you/tiny: the Hub answered 403 .*`hf auth login`"):
        push(checkpoint, "you/tiny")
    here.add("models/me/open", {})
    with pytest.raises(ValueError, match="--private: me/open exists and is public"):
        push(checkpoint, "me/open", private=True)
    assert here.files("models/me/open") == {}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="hf auth login"):
        push(checkpoint, "me/tiny")
    with pytest.raises(ValueError, match="--hub-private"):
        PretrainConfig(hub_private=True)


def test_a_stage_is_pushed_when_it_is_finished_and_loses_nothing_when_that_fails(
    here: Hub, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "data", tmp_path / "data" / "val"):
        folder.mkdir()
        pq.write_table(pa.table({"text": ["The cat sees the dog."] * 99}), folder / "shard_00000.parquet")
    tokenizer.save(tmp_path / "tokenizer")
    paths = {"data": tmp_path / "data", "tokenizer": tmp_path / "tokenizer"}
    sizes = {"layers": 1, "channels": 32, "batch_size": 2, "micro_batch_size": 2, "sequence_length": 32, "max_steps": 2}
    config = PretrainConfig(out=tmp_path / "base", push_to_hub="me/base", hub_private=True, **paths, **sizes)

    here.faults.append(Fault("/commit/", 500))
    assert train(config).finished
    said = capsys.readouterr().err
    again = f"python scripts/push.py --model {config.out} --repo me/base --private"
    assert f"{config.out}: finished and saved, but not pushed: --repo me/base: the Hub answered 500" in said
    assert again in said
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (paths | sizes | {"out": config.out}).items()]
    rerun = run(here, tmp_path, "scripts/pretrain.py", *flags, "--push-to-hub=me/base", "--hub-private")
    assert rerun.stdout == f"{config.out}: finished, nothing to do; to push it: {again}\n", rerun.stderr
    assert set(here.files("models/me/base")) == {".gitattributes"}

    assert train(replace(config, out=tmp_path / "again")).finished
    card = here.files("models/me/base")["README.md"].decode()
    for words in (
        "| data | 128 tokens; shards there: 1 |",
        "| step | loss | bpb |",
        "| bpb / model |",
        'model="me/base"',
    ):
        assert words in card
    assert here.repos["models/me/base"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="hf auth login"):  # before it trains, not after
        train(replace(config, out=tmp_path / "third"))
