"""Run a stage as its script does: skip it when it is finished, else train, measure, write the model card, push."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edu.config.pretrain import PretrainConfig
from edu.config.sft import SFTConfig
from edu.config.stages import ChatConfig, StageConfig
from edu.training.finished import nothing_to_do, push_advice

if TYPE_CHECKING:
    from edu.training.loop import Hooks, Result


def run(config: StageConfig) -> int:
    """Run a stage and return the exit status: 0 when it is finished, 130 when a signal ended it."""
    return 0 if nothing_to_do(config) or train(config).finished else 130


def train(config: StageConfig) -> "Result":
    """Train a stage with all that surrounds it.

    What is measured at the end is read first, so that a wrong file costs nothing. A push that fails is said, with the
    command that repeats it, and costs the run nothing.
    """
    from edu.data.hub_files import check_token
    from edu.hub.push import push

    if config.push_to_hub is not None:
        check_token()
    if isinstance(config, PretrainConfig):
        from edu.stages import pretrain as stage
    elif isinstance(config, SFTConfig):
        from edu.stages import sft as stage
    else:
        from edu.stages import rl as stage
    result = stage.train(config, hooks_of(config))  # type: ignore[arg-type]
    if result.results and config.push_to_hub is not None:
        try:
            print(f"pushed: {push(config.out, config.push_to_hub, config.hub_private)}", flush=True)
        except (ValueError, OSError) as error:
            said = f"{config.out}: finished and saved, but not pushed: {error}{push_advice(config)}"
            print(said, file=sys.stderr)
    return result


def hooks_of(config: StageConfig) -> "Hooks":
    """Return the model card and the final measurement of a stage; ValueError or OSError names a file that is missing."""
    from edu.data.tokenizer import Tokenizer
    from edu.evaluation.suite import load_suite, run_suite
    from edu.hub.push import Card, write_card
    from edu.inference.engine import Engine
    from edu.model.gpt import GPT
    from edu.training.loop import Hooks, Summary

    def card(folder: Path, summary: Summary) -> None:
        write_card(folder, Card(**vars(summary)))

    if not isinstance(config, ChatConfig):
        return Hooks(write_card=card)
    suite = load_suite(config)

    def measure(model: GPT, tokenizer: Tokenizer) -> dict[str, object]:
        return run_suite(Engine(model), tokenizer, config, suite)

    return Hooks(measure, card)
