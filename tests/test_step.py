"""The step: the same update, however its rows are split."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import worker
from accelerate import Accelerator
from torch._dynamo.testing import CompileCounter

from edu.config.cli import parse
from edu.config.pretrain import PretrainConfig
from edu.config.rl import RLConfig
from edu.config.sft import SFTConfig
from edu.data.packing import TrainingExample, collate
from edu.model.config import GPTConfig
from edu.model.gpt import GPT
from edu.training.accelerator import compute_init
from edu.training.loop import compile_steps, generating
from edu.training.optimizer import MuonAdamW, lr_factor, make_optimizer
from edu.training.step import OutOfMemory, Term, fits, train_step


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    return worker.train(micro_batch_size=9)


@pytest.fixture(scope="module")
def fp32() -> dict[str, torch.Tensor]:
    return worker.gradients(micro_batch_size=9)


def check_equal(found: tuple, expected: tuple) -> None:
    for name, p in expected[0].items():
        torch.testing.assert_close(found[0][name], p, atol=1e-7, rtol=0, msg=name)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), atol=1e-6, rtol=1e-6)


def check_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to 1e-6 of each tensor's norm."""
    for name, gradient in expected.items():
        assert float(gradient.norm()) > 0, name
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-6, name


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_accumulation_changes_nothing(reference: tuple, fp32: dict[str, torch.Tensor], micro_batch_size: int) -> None:
    check_equal(worker.train(micro_batch_size), reference)
    assert min(row[2] for row in reference[1]) > 1  # so that clipping is part of what is compared
    check_gradients(worker.gradients(micro_batch_size), fp32)


@pytest.mark.parametrize("sharding", [{}, worker.FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_make_the_update_of_one(
    sharding: dict[str, str], reference: tuple, fp32: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": "."} | sharding
    port = str(20000 + (os.getpid() + 7) % 20000)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command = [sys.executable, *launch, "tests/worker.py", str(tmp_path), "2"]
    subprocess.run(command, env=env, check=True, timeout=180, capture_output=True)
    for rank in range(2):
        *trained, gradients, skipping, fitting = torch.load(tmp_path / f"{rank}.pt")
        check_equal(tuple(trained), reference)
        check_gradients(gradients, fp32)
        assert skipping == [True, False, False]  # all are without weight; one process has weight; both have
        assert fitting == ([] if sharding else [False, True])  # the second process ran out of memory, and both know


def test_a_step_that_fp16_skips_changes_nothing_and_the_next_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(scale: float | None) -> tuple[list[bool], dict[str, torch.Tensor]]:
        """Steps until one is not skipped, and the weights it leaves."""
        accelerator = compute_init(seed=0)
        if scale is not None:
            monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=scale))
        torch.manual_seed(0)
        model = GPT(GPTConfig.tiny())
        settings = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.004, "weight_decay": 0.1}
        prepared, optimizer = accelerator.prepare(model, make_optimizer(model, **settings))
        if scale is not None:  # what accelerate asks before it undoes the scale
            monkeypatch.setattr(accelerator, "native_amp", True)
            monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        skipped: list[bool] = []
        while not skipped or skipped[-1]:
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            rows = worker.rows_of(0)
            terms = [Term([collate(part, worker.T) for part in (rows[:5], rows[5:])], scale=1e3)]
            skipped.append(train_step(accelerator, prepared, optimizer, terms).skipped)
        return skipped, {name: p.detach() for name, p in model.named_parameters()}

    (once, plain), (several, scaled) = run(None), run(2.0**127)  # overflows fp32, as fp16 overflows at 2^16
    assert once == [False]
    assert len(several) > 1
    for name, p in plain.items():
        torch.testing.assert_close(scaled[name], p, atol=1e-6, rtol=1e-5, msg=name)


def prepared(seed: int = 0) -> tuple[Accelerator, GPT, MuonAdamW]:
    """A tiny model and its optimizer, ready to train."""
    accelerator = compute_init(seed=seed)
    torch.manual_seed(seed)
    model = GPT(GPTConfig.tiny())
    settings = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.004, "weight_decay": 0.1}
    return accelerator, *accelerator.prepare(model, make_optimizer(model, **settings))


def state_of(model: torch.nn.Module, optimizer: MuonAdamW) -> dict[str, torch.Tensor]:
    """Everything that an update changes."""
    state = {f"{i}.{k}": v for i, of in optimizer.state_dict()["state"].items() for k, v in of.items()}
    return {name: x.detach().clone() for name, x in (dict(model.named_parameters()) | state).items()}


def unweighed(rows: list[list[TrainingExample]]) -> list[list[TrainingExample]]:
    return [[replace(example, weight=0.0) for example in row] for row in rows]


def untargeted(rows: list[list[TrainingExample]]) -> list[list[TrainingExample]]:
    return [[replace(example, mask=np.zeros(len(example.ids), int)) for example in row] for row in rows]


@pytest.mark.parametrize(
    ("nothing", "scale", "left_out"),
    [(unweighed, 1.0, 0), (untargeted, 1.0, 9), (list, 0.0, 0)],
    ids=["weights", "targets", "scale"],
)
def test_an_update_in_which_nothing_was_weighed_changes_nothing(
    nothing: Callable[..., list[list[TrainingExample]]], scale: float, left_out: int
) -> None:
    accelerator, model, optimizer = prepared()
    for step in range(3):  # so that momentum is there to move the weights
        assert not train_step(accelerator, model, optimizer, [Term([collate(worker.rows_of(step), worker.T)])]).skipped
    before = state_of(model, optimizer)
    rows = nothing(worker.rows_of(3))
    result = train_step(accelerator, model, optimizer, [Term([collate(rows, worker.T)], scale, left_out)])
    assert result.skipped
    assert (result.losses, result.grad_norm) == ([0.0], 0.0)
    after = state_of(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert not train_step(accelerator, model, optimizer, [Term([collate(worker.rows_of(4), worker.T)])]).skipped


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_memory_that_ran_out_in_forward_or_backward_leaves_the_step_to_be_tried_again(error: RuntimeError) -> None:
    batches = [collate(part, worker.T) for part in (worker.rows_of(0)[:4], worker.rows_of(0)[4:])]

    def run(fail: bool) -> dict[str, torch.Tensor]:
        accelerator, model, optimizer = prepared()
        calls = []

        def check(*_: object) -> None:
            calls.append(1)
            if fail and len(calls) == 2:  # after a gradient is there
                raise error

        hook = model.register_forward_pre_hook(check)
        if fail:
            with pytest.raises(OutOfMemory):
                train_step(accelerator, model, optimizer, [Term(batches)])
        train_step(accelerator, model, optimizer, [Term(batches)])
        hook.remove()
        return state_of(model, optimizer)

    clean, again = run(fail=False), run(fail=True)
    assert all(torch.equal(again[name], x) for name, x in clean.items())


def test_memory_that_ran_out_in_the_optimizer_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, model, optimizer = prepared()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("edu.training.optimizer.orthogonalize", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(accelerator, model, optimizer, [Term([collate(worker.rows_of(0), worker.T)])])


def test_the_state_of_the_optimizer_is_in_memory_before_the_first_update() -> None:
    _, model, optimizer = prepared()
    optimizer.optimizer.allocate()  # type: ignore[attr-defined]
    entries = {id(p): {name: x.numel() for name, x in optimizer.state[p].items()} for p in model.parameters()}
    assert all(
        sum(entries[id(p)].values()) == (p.numel() if "layers" in name else 2 * p.numel() + 1)
        for name, p in model.named_parameters()
    )


def test_the_batch_with_most_positions_is_the_one_that_is_tried() -> None:
    accelerator, model, _ = prepared()
    tried = []
    model.register_forward_pre_hook(lambda _, args: tried.append(tuple(args[0].shape)))
    few = [TrainingExample([1, 2, 3], [0, 0, 1])]
    many = [TrainingExample([1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 1])]
    assert fits(accelerator, model, [Term([collate([many], 6), collate([few], 24)])])
    assert set(tried) == {(1, 24)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of itself
def test_a_compiled_model_evaluates_without_compiling_new_shapes_and_too_many_in_training_are_an_error() -> None:
    torch._dynamo.reset()  # programs of other tests in this process count too
    counter = CompileCounter()
    accelerator = compute_init(seed=0)
    model = GPT(GPTConfig.tiny(num_hidden_layers=1))
    compile_steps(model, backend=counter)
    ids = torch.zeros(1, 4, dtype=torch.long)
    for length in (8, 9, 10):
        with generating(accelerator, model) as plain, torch.no_grad():
            plain(torch.zeros(1, length, dtype=torch.long), targets=torch.zeros(1, length, dtype=torch.long))
    assert counter.frame_count == 0
    with torch._dynamo.config.patch(recompile_limit=1):
        model(ids, targets=ids, weights=ids.float())
        compiled = counter.frame_count
        model(ids, targets=ids, weights=ids.float())
        assert counter.frame_count == compiled == 1  # one graph for a shape
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            model(ids[:, :3], targets=ids[:, :3], weights=ids[:, :3].float())


def test_rl_whose_rows_change_their_shapes_refuses_to_compile() -> None:
    with pytest.raises(ValueError, match="--compile: rows of rollouts"):
        RLConfig(compile=True)


def test_schedule_depends_on_the_step_alone() -> None:
    factors = [lr_factor(step, 100, warmup=10, decay=0.4) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[60] == 1.0
    assert factors[80] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.03


@pytest.mark.parametrize("config", [PretrainConfig, SFTConfig, RLConfig])
def test_settings_are_checked_by_name(config: type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--batch-size 0"):
        config(batch_size=0)
    settings = tmp_path / "x.yaml"
    settings.write_text("max_steps: 7\nout: here\n")
    parsed = parse(config, ["--config", str(settings), "--seed", "3"])
    assert (parsed.max_steps, parsed.seed, parsed.out) == (7, 3, Path("here"))
    settings.write_text("max_stepz: 7\n")
    with pytest.raises(ValueError, match="unknown setting 'max_stepz'"):
        parse(config, ["--config", str(settings)])
    with pytest.raises(ValueError, match=r"nowhere.yaml: no such file"):
        parse(config, ["--config=nowhere.yaml"])
