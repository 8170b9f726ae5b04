"""Show a random problem, its ground truth and the prompt the model reads. Example: python scripts/show_problem.py --task tiny"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edu.config.cli import parse, run_script
from edu.config.terminal import printable


@dataclass(frozen=True)
class Args:
    task: Literal["tiny", "gsm8k"] = "tiny"
    """tiny: the embedded problems; gsm8k: openai/gsm8k, from the Hub unless --path names a file."""
    path: Path | None = None
    """A jsonl file in GSM8K's form, or a folder that holds {split}.jsonl."""
    split: str = "train"
    """train, test, or another file of the folder."""
    socratic: bool = False
    """The Hub's configuration "socratic" in place of "main"."""
    seed: int | None = None
    """Shows the same problem again; without it, another one each time."""


def main() -> None:
    args = parse(Args)
    from edu.chat.chat_format import render_prompt
    from edu.data.tokenizer import Tokenizer
    from edu.tasks.gsm8k import GSM8K

    path = Path("data/tiny/problems") if args.path is None and args.task == "tiny" else args.path
    task = GSM8K(args.split, path, config="socratic" if args.socratic else "main")
    index = random.Random(args.seed).randrange(len(task))
    example = task.get_example(index)
    by_bytes = Tokenizer({bytes([byte]): byte for byte in range(256)})  # shows any prompt, without a trained vocabulary
    question, prompt = example["messages"][-1]["content"], by_bytes.decode(render_prompt(example["messages"], by_bytes))
    print(f"problem {index} of {len(task)} ({args.split})\n\n{printable(question)}\n")
    print(f"ground truth: {printable(example['answer'])}\n\nworked answer:\n{printable(example['solution'])}\n")
    print(f"prompt: {printable(prompt)}")
    print(
        f"reward of the worked answer: {task.reward(example, example['solution'])}, of 'I give up': {task.reward(example, 'I give up')}"
    )


if __name__ == "__main__":
    run_script(main)
