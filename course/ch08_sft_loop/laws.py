"""The laws of chapter 8, and the mistakes that they must name."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from course.grading import Mutant

TITLE = "the SFT loop"
PROVIDES = ("train_step", "save_checkpoint", "load_checkpoint", "train")
V = 7
Batch = tuple[Tensor, Tensor]


class Broken(Exception):
    """What a sampler raises that breaks."""


class Model(nn.Module):
    """The next token depends on the present one, through two layers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(V, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(8, V, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed[ids].tanh() @ self.head


def _batch(step: int, rows: int = 4, length: int = 6, learned: float = 0.5) -> Batch:
    """Rows whose targets follow the inputs by a rule; some do not count."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(V, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) > learned
    return inputs, ((inputs * 3 + 1) % V).masked_fill(ignored, -1)


def _sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]).clone()


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def law_loss(m: Any) -> None:
    """The loss is the mean of -log p over the targets that count."""
    model, (inputs, targets) = Model(), _batch(0)
    expected = float(cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1).detach())
    found = m.train_step(model, _sgd(model), [(inputs, targets)])
    assert isinstance(found, float), f"train_step returns {type(found).__name__}; expected a float"
    assert abs(found - expected) < 1e-4, f"the loss of one batch is {found:.4f}, expected {expected:.4f}"


def law_accumulation(m: Any) -> None:
    """Micro-batches with unequal numbers of targets give the update of one batch."""
    one, many = Model(), Model()
    inputs, targets = _batch(1)
    targets[0] = -1
    targets[0, 0] = 1  # row 0 has one target, the others have several
    whole = m.train_step(one, _sgd(one), [(inputs, targets)], max_norm=1e9)
    split = m.train_step(many, _sgd(many), [(inputs[i : i + 1], targets[i : i + 1]) for i in range(4)], max_norm=1e9)
    assert abs(whole - split) < 1e-4, (
        f"the loss is {whole:.4f} for one batch, {split:.4f} for the same in four: N is counted over all"
    )
    apart = _apart(_weights(one), _weights(many))
    assert apart < 1e-5, f"the updates differ by {apart:.5f}: a mean of means weighs rows with few targets too much"


def law_clipping(m: Any) -> None:
    """The norm of the whole gradient is clipped once, after the last micro-batch."""
    rows = [_batch(step) for step in range(3)]
    model = Model()
    N = sum(int((targets != -1).sum()) for _, targets in rows)
    for inputs, targets in rows:
        (cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum") / N).backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    norm = float(gradient.norm())
    for limit in (norm / 4, norm * 4):
        trained = Model()
        before = _weights(trained)
        m.train_step(trained, _sgd(trained, lr=1.0), rows, max_norm=limit)
        moved, expected = before - _weights(trained), gradient * min(1.0, limit / norm)
        assert _apart(moved, expected) < 1e-4, (
            f"the gradient's norm is {norm:.4f}, the limit {limit:.4f}: a step at rate 1 moved the weights by "
            f"{float(moved.norm()):.4f}, expected {float(expected.norm()):.4f}, in the gradient's direction; "
            "clip the sum of all micro-batches once, not each"
        )


def law_gradients_are_fresh(m: Any) -> None:
    """A step does not add to the gradients of the one before."""
    twice, once = Model(), Model()
    m.train_step(twice, _sgd(twice, lr=0.0), [_batch(2)], max_norm=1e9)
    m.train_step(twice, _sgd(twice), [_batch(3)], max_norm=1e9)
    m.train_step(once, _sgd(once), [_batch(3)], max_norm=1e9)
    apart = _apart(_weights(twice), _weights(once))
    assert apart < 1e-6, (
        f"a step at rate 0 before it changes the update of a step by {apart:.4f}: are gradients zeroed?"
    )


def law_one_update(m: Any) -> None:
    """The optimizer makes one step, whatever the number of micro-batches."""
    model = Model()
    optimizer, calls = _sgd(model), []
    original = optimizer.step
    optimizer.step = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    m.train_step(model, optimizer, [_batch(step) for step in range(3)])
    assert len(calls) == 1, f"three micro-batches, {len(calls)} steps of the optimizer; expected one, after the last"


def law_no_targets(m: Any) -> None:
    """Where no target counts nothing changes, momentum or not, and the loss is a number."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    m.train_step(model, optimizer, [_batch(0)])
    before = _weights(model)
    found = m.train_step(model, optimizer, [_batch(1, learned=0.0)])
    assert found == 0.0, f"the loss of a step without targets is {found}; a division by N = 0?"
    moved = _apart(before, _weights(model))
    assert moved == 0, (
        f"a step without targets moved the weights by {moved:.4f}: leave the optimizer out, it has momentum"
    )


def _run(
    m: Any, path: Path, steps: int, sample: Callable[[int], None] = lambda _: None, **settings: Any
) -> tuple[Tensor, list[float]]:
    """Train a fresh model with Adam in this folder, resuming what is there; its weights and losses."""
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    settings = {"save_every": 4, "sample_every": 5, **settings}
    losses = list(
        m.train(
            model, optimizer, lambda step: [_batch(step), _batch(step + 100)], steps, path, sample=sample, **settings
        )
    )
    return _weights(model), losses


def law_learns(m: Any) -> None:
    """The loss falls."""
    with tempfile.TemporaryDirectory() as folder:
        _, losses = _run(m, Path(folder) / "state.pt", 120)
    assert len(losses) == 120, f"120 steps were asked for, {len(losses)} losses came"
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < first / 4, (
        f"the mean loss went {first:.3f} -> {last:.3f} in 120 steps of a rule that is easy to learn"
    )


def law_resume(m: Any) -> None:
    """Stopped and started again, the run ends with the very weights of one that was not stopped."""
    with tempfile.TemporaryDirectory() as folder:
        whole, losses = _run(m, Path(folder) / "whole.pt", 12)
        _, begun = _run(m, Path(folder) / "parts.pt", 8)
        rest, more = _run(m, Path(folder) / "parts.pt", 12)
    assert len(begun) == 8, f"8 steps were asked for, {len(begun)} were made"
    assert len(more) == 4, (
        f"8 of 12 steps were saved: 4 are left, {len(more)} were made; does the checkpoint hold the step?"
    )
    apart = _apart(whole, rest)
    assert apart < 1e-7, (
        f"weights {apart:.5f} apart from an uninterrupted run: the optimizer has state too, and batch {8} comes next"
    )
    worst = max(abs(a - b) for a, b in zip(losses[8:], more, strict=True))
    assert worst < 1e-6, f"the losses of steps 8 to 11 differ by {worst:.5f} after the restart"


def law_last_is_saved(m: Any) -> None:
    """The last step is saved, whatever save_every says."""
    with tempfile.TemporaryDirectory() as folder:
        _run(m, Path(folder) / "state.pt", 6)
        saved = m.load_checkpoint(Path(folder) / "state.pt", Model(), torch.optim.Adam(Model().parameters()))
    assert saved == 6, (
        f"6 steps were made, saved every 4: the checkpoint holds step {saved}; two steps of work are lost"
    )


def law_save_is_atomic(m: Any) -> None:
    """A crash while saving leaves the old checkpoint."""
    model = Model()
    optimizer = _sgd(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        m.save_checkpoint(path, model, optimizer, 3)
        original = torch.save

        def crash(value: object, file: Any, *args: Any, **kwargs: Any) -> None:
            original(value, file, *args, **kwargs)
            if isinstance(file, str | Path):
                Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise OSError("no space left on device")

        torch.save = crash
        try:
            m.save_checkpoint(path, model, optimizer, 4)
        except OSError:
            pass
        finally:
            torch.save = original
        try:
            step = m.load_checkpoint(path, Model(), _sgd(Model()))
        except Exception as error:
            raise AssertionError(
                f"the disk was full while step 4 was saved, and step 3 can no longer be read ({type(error).__name__}): "
                "write to another name, then rename"
            ) from None
        assert step == 3, f"the disk was full while step 4 was saved; the checkpoint now says step {step}, expected 3"


def law_fresh_start(m: Any) -> None:
    """Without a checkpoint a run starts at step 0."""
    with tempfile.TemporaryDirectory() as folder:
        step = m.load_checkpoint(Path(folder) / "none.pt", Model(), _sgd(Model()))
    assert step == 0, f"there is no checkpoint, and load_checkpoint returned {step!r}; expected 0"


def law_sampling(m: Any) -> None:
    """The model is sampled after every so many steps, counted from 1, and saved before that."""
    calls: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"

        def sample(done: int) -> None:
            calls.append(done)
            if done == 8:
                raise Broken

        with suppress(Broken):
            _run(m, path, 12, sample, save_every=4, sample_every=4)
        assert calls == [4, 8], f"sampled after steps {calls}, expected 4 and 8 (it breaks at 8)"
        saved = m.load_checkpoint(path, Model(), torch.optim.Adam(Model().parameters()))
        assert saved == 8, (
            f"the sampler broke after step 8, and the checkpoint holds step {saved}: save first, then sample"
        )


MUTANTS = [
    Mutant("mean of means", 'ignore_index=-1, reduction="sum") / N', 'ignore_index=-1) / len(micro_batches)', "accumulation"),
    Mutant("N of all targets, ignored ones too", "int((targets != -1).sum())", "targets.numel()", "loss"),
    Mutant("every micro-batch is clipped", "        loss += part.item()\n    nn.utils.clip_grad_norm_(model.parameters(), max_norm)", "        loss += part.item()\n        nn.utils.clip_grad_norm_(model.parameters(), max_norm)", "clipping"),
    Mutant("no clipping", "    nn.utils.clip_grad_norm_(model.parameters(), max_norm)\n", "", "clipping"),
    Mutant("a step after every micro-batch", "        loss += part.item()\n", "        loss += part.item()\n        optimizer.step()\n", "one_update"),
    Mutant("gradients add up", "    optimizer.zero_grad()\n", "", "gradients_are_fresh"),
    Mutant("a step without targets is taken", "        return 0.0", "        N = 1", "no_targets"),
    Mutant("only the last micro-batch", "    for inputs, targets in micro_batches:", "    for inputs, targets in micro_batches[-1:]:", "accumulation"),
    Mutant("the optimizer is not saved", '    optimizer.load_state_dict(saved["optimizer"])\n', "", "resume"),
    Mutant("the step is not saved", '"step": step}', '"step": 0}', "resume"),
    Mutant("saved in place", '    temporary = path.with_name(f".{path.name}.tmp")', "    temporary = path", "save_is_atomic"),
    Mutant("sampled before saving", "        if done % save_every == 0 or done == steps:\n            save_checkpoint(checkpoint, model, optimizer, done)\n        if done % sample_every == 0:\n            sample(done)\n", "        if done % sample_every == 0:\n            sample(done)\n        if done % save_every == 0 or done == steps:\n            save_checkpoint(checkpoint, model, optimizer, done)\n", "sampling"),
    Mutant("the last step is not saved", " or done == steps", "", "last_is_saved"),
]  # fmt: skip
