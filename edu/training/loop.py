"""Training loop of every stage: a stage brings the data of each update and its own evaluation."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FSDPModule

from edu.config import metrics
from edu.config.scaling import Sizes
from edu.config.stages import StageConfig, as_settings
from edu.config.terminal import progress
from edu.data.atomic_io import write_text
from edu.data.tokenizer import Tokenizer
from edu.model import fast_path
from edu.model.gpt import GPT
from edu.model.load import quiet_transformers
from edu.training import checkpoint
from edu.training.accelerator import StopSignals, environment, peak_flops
from edu.training.checkpoint import Checkpoint
from edu.training.optimizer import lr_factor, make_optimizer, sharded_as, whole
from edu.training.resume import made_from
from edu.training.run import Run
from edu.training.step import OutOfMemory, StepResult, Term, fits, train_step

R = TypeVar("R")


@dataclass(frozen=True)
class Update:
    """The data of one optimizer update on this process, complete when it is handed over."""

    terms: Sequence[Term]
    """The terms of its loss."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the data (rewards, lengths) for the step's row; those of a later update of the step win."""


@dataclass(frozen=True)
class Summary:
    """State of a run that a model card is written from."""

    stage: str
    step: int
    settings: Mapping[str, Any]
    data: Sequence[tuple[str, str]]
    """Paths or Hub ids, and how much of each is trained on."""
    course: Sequence[Mapping[str, Any]]
    """Rows of metrics.jsonl."""
    figures: Mapping[str, Any]
    """Results of the final measurement; empty before it."""


@dataclass(frozen=True)
class Hooks:
    """Additions of a stage's caller: the loop knows neither evaluation nor the Hub."""

    measure: Callable[[GPT, Tokenizer], Mapping[str, Any]] = lambda *_: {}
    """Measure the finished model, on the main process; the results go to eval.json."""
    write_card: Callable[[Path, Summary], None] = lambda *_: None
    """Write the model card into the folder of a checkpoint."""


@dataclass(frozen=True)
class Result:
    """End of a stage."""

    step: int
    finished: bool
    """False if a signal ended it before its last step."""
    results: dict[str, Any] = field(default_factory=dict)
    """Content of eval.json, on the main process of a finished stage."""


Updates = Callable[[int], Iterable[Update]]
"""Yield the updates of a step: one, or several on the same rollouts in RL. Each is made after the one before was applied."""
Evaluate = Callable[[int, GPT], Mapping[str, float]]
"""Return metrics of the model after a step, on the main process alone."""


class Training:
    """Model and optimizer of a stage, prepared by accelerate and restored from the newest checkpoint."""

    def __init__(
        self,
        run: Run,
        model: GPT,
        tokenizer: Tokenizer,
        data: Sequence[tuple[str, str]],
        stream: Stateful | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        """Load the newest checkpoint, if there is one, into model, optimizer and `stream`, which knows its position.

        tokenizer is saved beside each checkpoint; data: paths or Hub ids and how much of each is trained on, for the card.
        """
        self.run, self.config, self.accelerator, self.tokenizer = run, run.config, run.accelerator, tokenizer
        self.environment = environment(run.accelerator) | {"fast": fast_path.is_on()}
        self.data, self.stream, self.hooks = data, stream, hooks or Hooks()
        optimizer = make_optimizer(model, **optimizer_settings(run.config))
        if run.config.compile:
            compile_steps(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.optimizer.optimizer.allocate()
        self.sizes, self.peak = Sizes.of_config(model.config), peak_flops(self.accelerator.device.type)
        self.step = self.tokens = 0
        self.parts = 1
        """In how many parts each micro-batch is computed: doubled where memory runs out, and kept by checkpoints."""
        self.inputs = made_from(run.config) if self.accelerator.is_main_process else {}
        try:
            self._resume()
        except BaseException:
            run.close()
            raise
        self.saved = self.started = self.step

    def _resume(self) -> None:
        """Restore the newest checkpoint that the main process can read; the others read the one that it names."""
        run, main, device = self.run, self.accelerator.is_main_process, self.accelerator.device
        where = "cpu" if device.type == "cpu" else device  # accelerate may say cpu:0, which torch cannot load to
        found, said = None, list[Any]((0, None))  # its step, and why it cannot be used
        try:
            if main and (found := checkpoint.read_newest(run.folder, where)):
                checkpoint.check(found, self.config, run.stage, self.environment)
                said[0] = found.step
        except ValueError as error:
            said[1] = str(error)
        step, fault = broadcast_object_list(said)
        if fault is not None:
            raise ValueError(fault)
        if step and found is None:
            found = checkpoint.read(run.folder / f"checkpoint-{step}", where, verify=False)
        if found is not None:
            self._restore(found)
            self.accelerator.print(f"{run.stage}: resuming after step {step} from {found.path}")
        self.accelerator.wait_for_everyone()
        if main:
            run.rewind(step)
            if found is not None:
                checkpoint.publish(found.path, self.config.keep)

    def _restore(self, found: Checkpoint) -> None:
        """Put a checkpoint's state into model, optimizer and stream."""
        trainer, world = found.trainer, self.accelerator.num_processes
        if self.stream is not None:
            if len(trainer["data"]) != world:
                was = f"{self.run.folder} was trained by {len(trainer['data'])} processes"
                raise ValueError(f"{was}: resume with as many, not {world}")
            self.stream.load_state_dict(trainer["data"][self.accelerator.process_index])
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict({name: sharded_as(found.weights[name], p) for name, p in model.state_dict().items()})
        self.optimizer.load_state_dict(found.optimizer["optimizer"])
        if self.accelerator.scaler is not None and found.optimizer["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(found.optimizer["scaler"])
        self.step, self.tokens, self.parts = trainer["step"], trainer["tokens"], trainer.get("parts", 1)

    def save(self) -> None:
        """Write a checkpoint of this step and show it in the stage's folder. All processes must call this."""
        positions = gather_object([None if self.stream is None else self.stream.state_dict()])
        weights, learning = self.accelerator.get_state_dict(self.model), self.optimizer.state_dict()
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            scaler = self.accelerator.scaler
            trainer = {
                "stage": self.run.stage,
                "step": self.step,
                "tokens": self.tokens,
                "parts": self.parts,
                "settings": as_settings(self.config),
                "made_from": self.inputs,
                "environment": self.environment,
                "data": positions,
            }

            def fill(folder: Path) -> None:
                quiet_transformers()
                model.save_pretrained(folder, state_dict=weights)
                self.tokenizer.save(folder, model_max_length=model.config.max_position_embeddings)
                self.hooks.write_card(folder, self.summary({}))
                scaling = None if scaler is None else scaler.state_dict()
                torch.save({"optimizer": learning, "scaler": scaling}, folder / "state" / "optimizer.pt")
                write_text(folder / "state" / "trainer.json", json.dumps(trainer, default=str))
                self.run.sync()

            target = self.run.folder / f"checkpoint-{self.step}"
            checkpoint.write(target, fill)
            checkpoint.publish(target, self.config.keep)
        self.accelerator.wait_for_everyone()
        self.saved = self.step

    def summary(self, figures: Mapping[str, Any]) -> Summary:
        """Return the state of this step for the model card."""
        return Summary(self.run.stage, self.step, as_settings(self.config), self.data, self.run.rows(), figures)

    def fit(self, updates: Updates, evaluate: Evaluate, name: str) -> bool:
        """Train to the last step; return False if a signal ended it before. Any other end lets go of the folder."""
        try:
            finished = self._fit(updates, evaluate, name)
        except BaseException:
            self.run.close()
            raise
        self._unwrap()
        if not finished:
            self.run.close()
            self.accelerator.end_training()
        return finished

    def _fit(self, updates: Updates, evaluate: Evaluate, name: str) -> bool:
        """Run the loop.

        1. Save where it is due, where an evaluation follows, which may fail, and where a signal asks to leave.
        2. Evaluate where it is due, before the first step too. A signal breaks it off.
        3. Make one step: the learning rate, the updates on the next data, one line of metrics.
        """
        config, run, quiet = self.config, self.run, not self.accelerator.is_main_process
        trained_seconds = run.seconds()
        with StopSignals() as stopped, progress(config.max_steps, name, done=self.step, quiet=quiet) as bar:
            while True:
                # 1. Steps are counted when they are done: at step n the model has made n of them.
                last = self.step == config.max_steps
                evaluating, leaving = self.step % config.eval_every == 0 or last, self._any(stopped)
                if self.step > self.saved and (self.step % config.save_every == 0 or evaluating or leaving):
                    self.save()
                # 2. All processes leave together, or a collective operation would wait for one that has gone.
                if evaluating and not leaving:
                    self._evaluate(evaluate, name, stopped)
                    leaving = self._any(stopped)
                if leaving:
                    self.accelerator.print(f"stopped after step {self.step}; the same command continues")
                    return False
                if last:
                    return True
                # 3. The data are made inside the loop over updates: RL samples with the weights of this moment.
                started = time.perf_counter()
                factor = lr_factor(self.step, config.max_steps, config.warmup, config.decay)
                self.optimizer.optimizer.set_lr(factor)
                results, measured = list[StepResult](), dict[str, float]()
                for update in updates(self.step):
                    results.append(self._update(update.terms))
                    measured |= update.metrics
                seconds = time.perf_counter() - started
                trained_seconds += seconds
                self.step += 1
                self.tokens += results[-1].tokens
                if not math.isfinite(sum(results[-1].losses)):
                    raise ValueError(
                        f"step {self.step}: the loss is {results[-1].losses[0]}; the last checkpoint is of step "
                        f"{self.saved}. Lower --lr-scale ({config.lr_scale}) and give another --out"
                    )
                row = self._metrics(results, seconds) | {metrics.SECONDS: trained_seconds} | measured
                run.log(self.step, row)
                shown = metrics.REWARD if metrics.REWARD in row else metrics.LOSS
                bar.advance(1, tokens=results[-1].tokens, **{shown: row[shown]})

    def _metrics(self, results: Sequence[StepResult], seconds: float) -> dict[str, float]:
        """Return the metrics of a step from those of its updates; the last one counts where they cannot be added up."""
        last = results[-1]
        flops = sum(r.positions * self.sizes.flops_per_token(r.row_length) for r in results)
        return {
            metrics.LOSS: last.losses[0],
            metrics.GRAD_NORM: last.grad_norm,
            metrics.LEARNING_RATE: self.optimizer.param_groups[0]["lr"],
            metrics.TOKENS_PER_SECOND: last.tokens / seconds,
            metrics.MFU: flops / seconds / (self.peak * self.accelerator.num_processes),
            metrics.STEP_TOKENS: last.tokens,
            metrics.TOKENS: self.tokens,
            metrics.SKIPPED_UPDATES: sum(result.skipped for result in results),
        }

    def _evaluate(self, evaluate: Evaluate, name: str, stopped: StopSignals) -> None:
        """Log the main process's metrics. A signal breaks the evaluation off, but never what all processes do together."""
        with generating(self.accelerator, self.model) as model, stopped.breaking_off():
            figures = evaluate(self.step, model) if self.accelerator.is_main_process else {}
            self.run.log(self.step, figures)
            shown = ", ".join(f"{metric} {value:.3f}" for metric, value in figures.items())
            self.accelerator.print(f"{name}, step {self.step}: {shown}", flush=True)

    def finish(self, measure: Callable[[GPT], Mapping[str, Any]] | None = None) -> Result:
        """Measure the finished model on the main process and write eval.json, which makes the stage a finished one.

        measure: in addition to the caller's own measurement (`Hooks.measure`).
        """
        results: dict[str, Any] = {}
        with generating(self.accelerator, self.model) as model:
            if self.accelerator.is_main_process:
                about = {"stage": self.run.stage, "step": self.step, "seconds": self.run.seconds()}
                about |= {"environment": self.environment, "made_from": self.inputs}
                results = {**about, **(measure(model) if measure else {}), **self.hooks.measure(model, self.tokenizer)}
                self.hooks.write_card(self.run.folder, self.summary(results))
                write_text(self.run.folder / "eval.json", json.dumps(results, indent=1))
        self.accelerator.wait_for_everyone()
        self.run.close()
        self.accelerator.end_training()
        return Result(self.step, True, results)

    def _unwrap(self) -> None:
        """Let go of DDP while its process group stands.

        A reducer that outlives the group destroys it, and waits with the GIL for gloo's thread, which may wait for the GIL.
        """
        self.model = self.accelerator.unwrap_model(self.model)
        self.accelerator.free_memory()

    def _update(self, terms: Sequence[Term]) -> StepResult:
        """One step. Where memory runs out, the same in smaller micro-batches, and all later steps too.

        Several processes have to learn of it together: they try their first step. Later it is an error there, and so it
        is in the optimizer's update, which smaller micro-batches do not make smaller.
        """
        sharded = self.accelerator.distributed_type == DistributedType.FSDP  # nothing can be tried without the others
        trying = self.accelerator.num_processes > 1 and self.step == self.started and not sharded
        while True:
            split = [term.split(self.parts) for term in terms]
            rows = max(len(batch.inputs) for term in split for batch in term.batches)
            try:
                if not trying or fits(self.accelerator, self.model, split):
                    return train_step(self.accelerator, self.model, self.optimizer, split, self.config.clip)
            except torch.OutOfMemoryError:
                raise ValueError(
                    f"step {self.step + 1}: out of memory in the optimizer's update; the last checkpoint is of step "
                    f"{self.saved}. Use a smaller model, or shard it (docs/scaling.md)"
                ) from None
            except OutOfMemory:
                if self.accelerator.num_processes > 1:
                    raise ValueError(
                        f"step {self.step + 1}: out of memory with {rows} rows a forward pass. Give --micro-batch-size "
                        f"{max(rows // 2, 1)}: the same command continues, and the update stays the same"
                    ) from None
            if self.config.micro_batch_size <= self.parts:
                raise ValueError(
                    f"step {self.step + 1}: out of memory with one row a forward pass; use a smaller model"
                )
            clear_device_cache()
            self.parts *= 2
            self.accelerator.print(f"out of memory: each micro-batch in {self.parts} parts, the update stays the same")

    def _any(self, stopped: StopSignals) -> bool:
        """Return whether any process was told to stop, so that all leave together."""
        if self.accelerator.num_processes == 1:
            return bool(stopped)
        return bool(self.accelerator.reduce(torch.tensor(float(bool(stopped)), device=self.accelerator.device), "sum"))


def compile_steps(model: GPT, **options: Any) -> None:
    """Compile a model in place, one program for each shape, so that names and checkpoints stay as they are.

    More shapes than torch keeps programs (8) are an error; without this they would run eagerly, in silence.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model.compile(dynamic=False, **options)


@contextmanager
def generating(accelerator: Accelerator, model: nn.Module) -> Iterator[GPT]:
    """Yield the plain model in eval mode, for the Engine; training mode again afterwards. All processes enter together.

    Of a sharded model, a whole copy on every process, in the precision that it is trained in. A compiled model runs
    eagerly: rows of evaluations and rollouts have ever new shapes.
    """
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    assert isinstance(unwrapped, GPT)
    if isinstance(unwrapped, FSDPModule):
        with torch.device("meta"):
            copy = GPT(unwrapped.config)
        sharding: Any = accelerator.state.fsdp_plugin
        dtype = sharding.mixed_precision_policy.param_dtype
        copy.load_state_dict({name: whole(p).to(dtype) for name, p in unwrapped.state_dict().items()}, assign=True)
        yield copy.eval()
    else:
        unwrapped.eval()
        with torch.compiler.set_stance("force_eager"):
            yield unwrapped
        unwrapped.train()


def optimizer_settings(config: StageConfig) -> dict[str, float]:
    """Return the arguments of make_optimizer from a stage's settings."""
    rates = {name: getattr(config, name) * config.lr_scale for name in ("matrix_lr", "embedding_lr", "head_lr")}
    return rates | {"weight_decay": config.weight_decay}


def split_rows(rows: Sequence[R], micro_batch_size: int, accelerator: Accelerator) -> list[list[R]]:
    """Return this process's micro-batches of a step's rows: row i goes to process i mod world.

    Every process gets as many micro-batches, the last ones short or empty: a collective step waits for all.
    """
    world = accelerator.num_processes
    local = list(rows[accelerator.process_index :: world])
    most = -(-len(rows) // world)
    return [local[at : at + micro_batch_size] for at in range(0, max(most, 1), micro_batch_size)]
