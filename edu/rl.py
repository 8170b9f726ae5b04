"""Reinforcement learning: sample answers, reward the right ones, make the better ones of each group more likely.

On-policy and without tricks (REINFORCE with a group baseline): one update on what was just sampled, so there is no old
policy to clip against. Normalised by all sampled tokens of the step (DAPO, arXiv:2503.14476, section 3.3).
"""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object

from edu.checkpoint import Run, generating, load_model, load_tokenizer
from edu.config import RLConfig
from edu.engine import Engine
from edu.evals import evaluate_task
from edu.loop import Result, StepData, Training, split_rows
from edu.measure import measure_chat, read_measures, show_answers
from edu.metrics import PASS_AT_1
from edu.packing import pack_rows
from edu.report import environment
from edu.rollouts import Rollout, draw, fitting, roll_out, seed_of, shuffled, summarise
from edu.runtime import compute_init
from edu.sft_data import Epochs, batches_of, load_sft_data
from edu.step import Term
from edu.tasks import Subset, Task
from edu.tasks.gsm8k import GSM8K


def train(config: RLConfig) -> Result:
    """Reinforce, or continue where the folder stands.

    1. Draw the step's problems, the same for any number of processes; process r takes every world-th.
    2. Roll out K answers of each, score them, and weigh each by its advantage.
    3. One update on them, plus a share of SFT conversations.
    """
    accelerator = compute_init(config.seed, config.mixed_precision, config.log_with, str(config.out))
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model)
    T = model.config.max_position_embeddings
    measures = read_measures(config)
    task, left_out = fitting(GSM8K("train", config.problems), tokenizer, T - config.max_new_tokens)
    accelerator.print(f"{len(task):,} problems; {left_out:,} more leave no room for an answer in a context of {T}")
    measured: Task = measures.tasks["math"]
    if config.num_problems is not None:
        task = measured = Subset(task, shuffled(len(task), config.seed, 0)[: config.num_problems])
    trained_on = [(str(config.problems or "openai/gsm8k"), f"{len(task):,} problems, right answers rewarded")]
    replay = None
    if config.replay is not None:
        data = load_sft_data(config.replay, tokenizer, T)
        accelerator.print(data.describe())
        trained_on += [(name, f"in the replay: {words}") for name, words in data.counts().items()]
        replay = Epochs(data.train, T, config.seed)
    run = Run(config, "rl", accelerator, tokenizer, trained_on)
    training = Training(run, model)

    def local_rollouts(step: int) -> list[list[Rollout]]:
        chosen = draw(len(task), config.seed, step * config.batch_size, config.batch_size)
        mine = range(accelerator.process_index, config.batch_size, accelerator.num_processes)
        with generating(accelerator, training.model) as model:
            return roll_out(
                Engine(model),
                tokenizer,
                task,
                [task.get_example(chosen[i]) for i in mine],
                [seed_of(config.seed, step, i) for i in mine],
                num_samples=config.samples,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
            )

    def next_data(step: int) -> StepData:
        groups = local_rollouts(step)
        # Rollouts without advantage have no gradient: they count in N, and are not computed.
        useful = [r.piece for group in groups for r in group if r.advantage != 0]
        counted = sum(sum(r.sample.mask) for group in groups for r in group)
        rows = [[useful[i] for i in row] for row in pack_rows(useful, T)]
        passes = max(gather_object([-(-len(rows) // config.micro_batch_size)])) or 1
        micro = [rows[i * config.micro_batch_size :][: config.micro_batch_size] for i in range(passes)]
        left_out = counted - sum(sum(piece.mask) for piece in useful)
        terms = [Term(batches_of(micro, T, tokenizer.pad), left_out=left_out)]
        if replay is not None:
            again = replay.rows(step * config.replay_rows, config.replay_rows)
            micro = split_rows(again, config.micro_batch_size, accelerator)
            terms.append(Term(batches_of(micro, T, tokenizer.pad), config.replay_weight))
        return StepData(terms, figures=summarise(gather_object(groups)))

    def evaluate(step: int) -> Mapping[str, float]:
        if not accelerator.is_main_process:
            return {}
        with generating(accelerator, training.model) as model:
            asked = [measured.get_example(i)["messages"][-1]["content"] for i in range(min(4, len(measured)))]
            asked += config.sample_prompts
            run.show(step, show_answers(Engine(model), tokenizer, asked, config.max_new_tokens))
            evaluation = evaluate_task(
                Engine(model),
                tokenizer,
                measured,
                num_samples=config.eval_samples,
                temperature=1.0,
                max_new_tokens=config.max_new_tokens,
                limit=config.eval_problems,
                quiet=True,
            )
        return {PASS_AT_1: evaluation.summary["pass@1"]["value"]}

    if not training.fit(next_data, evaluate, "reinforcing"):
        return Result(training.step, finished=False)
    results: dict[str, Any] = {}
    if accelerator.is_main_process:
        with generating(accelerator, training.model) as model:
            figures = measure_chat(Engine(model), tokenizer, config, measures)
        results = {"step": training.step, "seconds": run.seconds(), "environment": environment(), **figures}
    run.finish(results)
    return Result(training.step, True, results)
