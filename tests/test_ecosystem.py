"""The page docs/ecosystem.md, run; and what other libraries compute of our checkpoints, against our own."""

import doctest
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import SENTENCES
from edu.chat.chat_format import render, tool_call
from edu.config.pretrain import PretrainConfig
from edu.config.sft import SFTConfig
from edu.data.packing import TrainingExample, collate
from edu.data.tokenizer import Tokenizer
from edu.inference.engine import Engine
from edu.model.load import load_model, load_tokenizer
from edu.stages import run
from edu.stages.sft import mean_loss

PAGE = (Path(__file__).parents[1] / "docs" / "ecosystem.md").read_text("utf-8")
CHATS = [
    [{"role": "user", "content": "What is your name?"}, {"role": "assistant", "content": "My name is Ada."}],
    [{"role": "user", "content": "Who made you?"}, {"role": "assistant", "content": "People who like small models."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is your name?"},
        {"role": "assistant", "content": "Ada."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Ciao!"},
    ],
    [
        {"role": "user", "content": "What is 7*7?"},
        tool_call("", "7*7"),
        {"role": "tool", "content": "49"},
        {"role": "assistant", "content": " It is 49."},
    ],
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder as ./my_pipeline.sh leaves it, with a base model and a chat model that knows CHATS by heart."""
    home = tmp_path_factory.mktemp("home")
    for folder, texts in ((home / "data/tiny", SENTENCES * 40), (home / "data/tiny/val", ["A café, 12 apples.", "🙂"])):
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"text": texts}), folder / "shard_00000.parquet")
    files = {"my_identity.jsonl": CHATS * 8, "tiny/chats_test.jsonl": CHATS[:2]}
    for name, chats in files.items():
        (home / "data" / name).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    problem = {"question": "What is 7*7?", "answer": "7*7=<<7*7=49>>49\n#### 49"}
    for split in ("train", "test"):
        (home / f"data/{split}.jsonl").write_text(json.dumps(problem) + "\n")
    tokenizer.save(home / "runs/tiny/tokenizer")
    for name, block in zip(("chats.yaml", "documents.yaml"), re.findall(r"```yaml\n(.*?)```", PAGE, re.S), strict=True):
        (home / "tasks").mkdir(exist_ok=True)
        (home / "tasks" / name).write_text(block)
    runs = home / "runs/tiny"
    common: Any = {"batch_size": 8, "micro_batch_size": 8, "sequence_length": 64, "warmup": 2, "eval_every": 60}
    sizes: Any = {"channels": 64, "layers": 2, "eval_batches": 1, "sample_prompts": ("Tom",)}
    base = PretrainConfig(
        out=runs / "base", data=home / "data/tiny", tokenizer=runs / "tokenizer", max_steps=10, **sizes, **common
    )
    measures: Any = {"problems": home / "data", "identity": None, "facts": None, "eval_samples": 1, "eval_limit": 1}
    tuned = SFTConfig(
        out=runs / "sft", model=str(base.out), data=home / "data/my_identity.jsonl", max_steps=60, lr_scale=1.0,
        val_every=1000, max_new_tokens=16, sample_prompts=("Thanks",), **measures, **common,
    )  # fmt: skip
    run.train(base)
    run.train(tuned)
    return home


def sections(text: str) -> dict[str, list[tuple[str, str]]]:
    """The Python blocks of each section of the page, with the output that follows each."""
    parts = (part.split("\n", 1) for part in text.split("\n## ")[1:])
    return {title: re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", body, re.S) for title, body in parts}


SECTIONS = sections(PAGE)
SERVING = SECTIONS.pop("Serving")
BLOCKS = [(f"{title} {n}", *block) for title, blocks in SECTIONS.items() for n, block in enumerate(blocks)]


def run_page(blocks: list[str], home: Path) -> list[str]:
    """What each block prints, run one after the other in a new process that cannot import this project."""
    mark = "-- end of block --\n"
    program = "import sys\nsys.modules['edu'] = None\n" + "".join(
        f"{code}\nprint({mark!r}, end='')\n" for code in blocks
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(home / "cache"), "NO_PROXY": "localhost"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout.split(mark)[:-1]


def assert_printed(found: str, expected: str) -> None:
    """The same text; any decimal number for a decimal number, and anything for three dots."""
    found, expected = (re.sub(r"\d+\.\d+(e-\d+)?", "0.0", text) for text in (found, expected))
    if not doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS):
        assert found == expected


@pytest.fixture(scope="module")
def printed(home: Path) -> dict[str, str]:
    """Output of each block of the page but those of serving."""
    outputs = run_page([code for _, code, _ in BLOCKS], home)
    return {name: output for (name, *_), output in zip(BLOCKS, outputs, strict=True)}


@pytest.mark.parametrize(("name", "expected"), [(name, expected) for name, _, expected in BLOCKS])
def test_the_page_prints_what_it_says(name: str, expected: str, printed: dict[str, str]) -> None:
    assert_printed(printed[name], expected)


def test_transformers_serves_a_checkpoint_to_the_openai_client(home: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    (command,) = re.findall(r"```bash\n(transformers serve .*?)\n```", PAGE)
    ((code, expected),) = SERVING
    binary = str(Path(sys.executable).with_name("transformers"))
    arguments = command.replace("8000", port).split()[1:]
    with subprocess.Popen(
        [binary, *arguments], cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            while server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health").close()
                    break
                except OSError:
                    time.sleep(0.2)
            (found,) = run_page([code.replace("8000", port)], home)
            assert_printed(found, expected)
        finally:
            server.terminate()


def test_what_peft_merged_runs_in_our_engine(printed: dict[str, str], home: Path) -> None:
    assert "PEFT 0" in printed
    ours, stock = load_model(str(home / "runs/merged")), AutoModelForCausalLM.from_pretrained(home / "runs/merged")
    base = load_model(str(home / "runs/tiny/base"))
    tokenizer = load_tokenizer(str(home / "runs/merged"))
    prompt = [tokenizer.bos, *tokenizer.encode("Tom has")]
    expected = stock.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    stop = stock.generation_config.eos_token_id
    (found,), (before,) = (
        Engine(model.eval()).generate([prompt], max_new_tokens=20, temperature=0, stop_tokens=stop)[0]
        for model in (ours, base)
    )
    assert found.tokens == expected
    assert not torch.equal(ours.model.layers[0].mlp.fc1.weight, base.model.layers[0].mlp.fc1.weight)
    assert before.tokens


def test_lm_eval_measures_our_bits_per_byte(printed: dict[str, str], home: Path) -> None:
    found = float(printed["lm-eval 0"].split("bits_per_byte")[1])
    model, tokenizer = load_model(str(home / "runs/tiny/base")), load_tokenizer(str(home / "runs/tiny/base"))
    texts = pq.read_table(home / "data/tiny/val/shard_00000.parquet")["text"].to_pylist()
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)]])
        nats -= model(ids[:, :-1], targets=ids[:, 1:]).sum().item()
    assert found == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_on_our_masks_with_our_loss(packing: bool, home: Path, tokenizer: Tokenizer) -> None:
    from datasets import Dataset
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer

    args = TRLConfig(
        str(home / "runs/trl/masks"), assistant_only_loss=True, packing=packing, max_length=64, use_cpu=True, bf16=False,
        report_to="none",
    )  # fmt: skip
    data = Dataset.from_list([{"messages": chat} for chat in CHATS])
    trainer = SFTTrainer(str(home / "runs/tiny/base"), args=args, train_dataset=data)
    (inputs,) = trainer.get_train_dataloader()
    supervised = sorted(int(label) for label in inputs["labels"].flatten() if label != -100)
    rendered = [render(chat, tokenizer) for chat in CHATS]
    assert supervised == sorted(t for r in rendered for t, learn in zip(r.ids, r.mask, strict=True) if learn)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(inputs))
    ours = mean_loss(
        load_model(str(home / "runs/tiny/base")), [collate([[TrainingExample(r.ids, r.mask)] for r in rendered], 64)]
    )
    assert float(loss) == pytest.approx(ours, rel=1e-4)
