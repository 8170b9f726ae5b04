"""The embedded problems in lm-evaluation-harness: its figures are ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edu.chat.chat_format import render
from edu.chat.mixture import conversation
from edu.data.packing import TrainingExample, collate
from edu.data.tokenizer import Tokenizer
from edu.evaluation.evals import evaluate_task
from edu.inference.engine import Engine
from edu.model.config import GPTConfig
from edu.model.gpt import GPT
from edu.model.load import load_model, load_tokenizer
from edu.tasks.gsm8k import GSM8K

TASKS = Path(__file__).parents[1] / "data" / "lm_eval"


@pytest.fixture
def home(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Problems where the task files look for them, and a model that learnt some of them by heart."""
    rows = [
        {"question": f"What is {a}+{b}?", "answer": f"{work}#### {a + b}", "steps": 1}
        for a, b, work in [(3, 4, ""), (5, 1, "We add.\n"), (2, 9, "2+9=<<2+9=11>>11\n"), (9, 9, ""), (7, 2, "")]
    ]
    problems = tmp_path / "data" / "tiny" / "problems"
    problems.mkdir(parents=True)
    (problems / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    ends = [tokenizer.assistant_end, tokenizer.python_end, tokenizer.bos]  # as edu.stages.pretrain writes them
    special = {"bos_token_id": tokenizer.bos, "eos_token_id": ends, "pad_token_id": tokenizer.pad}
    model = GPT(GPTConfig.tiny(vocab_size=tokenizer.vocab_size, max_position_embeddings=192, **special))
    rendered = [render(conversation(row["question"], row["answer"]), tokenizer) for row in rows[:4]]
    batch = collate([[TrainingExample(each.ids, each.mask)] for each in rendered], 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = -model(batch.inputs, targets=batch.targets, position_ids=batch.positions).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model", model_max_length=192)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_lm_eval_gives_our_greedy_figure_problem_by_problem(home: Path) -> None:
    lm_eval: Any = pytest.importorskip("lm_eval")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(home / "model"), "device": "cpu", "dtype": "float32"},
        tasks=["edu_tiny"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=True,
        batch_size=4,
        bootstrap_iters=0,
    )
    engine = Engine(load_model(str(home / "model")).eval())
    task = GSM8K("test", home / "data" / "tiny" / "problems")
    ours = evaluate_task(engine, load_tokenizer(str(home / "model")), task, calculator=False, quiet=True)
    assert found["results"]["edu_tiny"]["exact_match,none"] == ours.summary["accuracy"]["value"]
    theirs = {sample["doc_id"]: sample for sample in found["samples"]["edu_tiny"]}
    for record in ours.records:
        (said,) = record["samples"]
        assert theirs[record["index"]]["exact_match"] == said["reward"], record
        if "<<" not in said["with_tools"]:
            assert theirs[record["index"]]["resps"] == [[said["text"]]]
    assert {said["reward"] for record in ours.records for said in record["samples"]} == {0.0, 1.0}
