"""Evaluate a model: bits per byte, problems solved, persona and facts.

Example: python scripts/eval_model.py --model runs/tiny/rl --task tiny --num-samples 8 --out rl.json
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edu.config.cli import parse, run_script
from edu.config.stages import Count, NonNegative, Seed
from edu.config.terminal import printable

if TYPE_CHECKING:
    from edu.evaluation.evals import Evaluation

TASKS = ("bpb", "tiny", "tiny-templates", "persona", "facts")


@dataclass(frozen=True)
class Args:
    model: str = "runs/tiny/sft"
    """Folder or Hub id of a model and its tokenizer."""
    task: str = "all"
    """bpb: bits per byte of validation text; tiny, tiny-templates: held-out problems, and those of held-out templates;
    gsm8k: its test split; persona: held-out identity questions; facts: held-out wordings. all: all but gsm8k.
    file.py:name: the "test" split of a task of your own (docs/tasks.md)."""
    out: Path = Path("eval.json")
    """Summaries go to this file, the records that they are computed from to the .jsonl beside it."""
    data: Path = Path("data/tiny")
    """Folder of the embedded corpus, or (for bpb) any folder with val/*.parquet."""
    path: Path | None = None
    """gsm8k's problems as a jsonl file, or a folder with test.jsonl; without it they come from the Hub."""
    persona: Path = Path("data/persona.yaml")
    """File of the persona that answers are graded against."""
    num_samples: Count = 1
    """Answers to each problem; 1 is greedy."""
    temperature: NonNegative | None = None
    """Default: 0 (greedy) for one sample, 1 for more."""
    max_new_tokens: Count = 96
    """A longer answer is cut off and counts as wrong."""
    calculator: bool = True
    """Let the calculator answer when it is called; without, an answer ends at its first call."""
    limit: Count | None = None
    """Only the first so many problems, facts, or validation batches."""
    batch_size: Count = 16
    """Rows of a validation batch."""
    seed: Seed = 0
    """Of the samples."""
    against: Path | None = None
    """An earlier --out, of another model: compare the two problem by problem."""

    def __post_init__(self) -> None:
        if self.task not in (*TASKS, "gsm8k", "all") and ":" not in self.task:
            raise ValueError(f"--task {self.task}: must be {', '.join(TASKS)}, gsm8k, all, or file.py:name")


def measure(args: Args, names: tuple[str, ...]) -> "dict[str, Evaluation]":
    from edu.data.loader import validation_batches
    from edu.data.shards import list_shards
    from edu.evaluation.bits_per_byte import evaluate_text
    from edu.evaluation.evals import evaluate_facts, evaluate_persona, evaluate_task
    from edu.inference.engine import Engine
    from edu.model.load import load_model, load_tokenizer
    from edu.synthetic.persona import load_identity_eval, load_persona
    from edu.tasks.gsm8k import GSM8K
    from edu.tasks.load import load
    from edu.training.accelerator import autodetect_device_type

    model, tokenizer = load_model(args.model, autodetect_device_type()).eval(), load_tokenizer(args.model)
    engine, length = Engine(model), model.config.max_position_embeddings
    temperature = args.temperature if args.temperature is not None else float(args.num_samples > 1)
    problems: dict[str, tuple[str, Path | None]] = {
        "tiny": ("test", args.data / "problems"),
        "tiny-templates": ("test_templates", args.data / "problems"),
        "gsm8k": ("test", args.path),
    }
    found = {}
    for name in names:
        if name == "bpb":
            shards = list_shards(args.data, "val")
            batches = validation_batches(shards, tokenizer, args.batch_size, length, args.limit)
            found[name] = evaluate_text(model, batches, tokenizer.token_bytes())
        elif name == "persona":
            persona = load_persona(args.persona)
            questions = load_identity_eval(Path("data/identity_eval.yaml"), persona)[: args.limit]
            found[name] = evaluate_persona(engine, tokenizer, questions, persona)
        elif name == "facts":
            found[name] = evaluate_facts(engine, tokenizer, args.data / "chats_test.jsonl", limit=args.limit)
        else:
            found[name.rpartition(":")[2]] = evaluate_task(
                engine,
                tokenizer,
                GSM8K(*problems[name]) if name in problems else load(name)("test"),
                num_samples=args.num_samples,
                temperature=temperature,
                max_new_tokens=args.max_new_tokens,
                seed=args.seed,
                limit=args.limit,
                calculator=args.calculator,
            )
    return found


def main() -> None:
    args = parse(Args)
    from edu.evaluation.comparison import compare_records, read_records, save
    from edu.evaluation.estimates import estimates

    earlier = read_records(args.against) if args.against else {}
    found = measure(args, TASKS if args.task == "all" else (args.task,))
    about = {"model": args.model, "settings": {k: v if isinstance(v, int) else str(v) for k, v in asdict(args).items()}}
    save(args.out, about, found)  # before what may turn out not to be comparable
    compared = {
        name: asdict(compare_records(earlier[name], found[name].records))
        for name in earlier.keys() & found.keys()
        if "samples" in found[name].records[0]
    }
    if args.against:
        save(args.out, about | {"compared": compared}, found)
    for path, number in estimates({name: evaluation.summary for name, evaluation in found.items()}):
        if "by_template" not in path:  # a long table: it is in the file
            print(printable(" / ".join(path)), "=", number)
    for name, comparison in compared.items():
        print(f"{name}, against {args.against}:", json.dumps(comparison))


if __name__ == "__main__":
    run_script(main)
