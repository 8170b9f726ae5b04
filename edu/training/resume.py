"""What a stage's folder says before torch is imported: whether these settings may go on there, and whether all is done."""

import json
from shlex import quote

from edu.config.reading import read_yaml
from edu.config.stages import StageConfig, as_settings, flag

# What may differ when a run is resumed: how it is saved, split and measured, not what is learnt.
FREE_ON_RESUME = {"out", "save_every", "keep", "eval_every", "micro_batch_size", "log_with", "compile", "eval_batches"}
FREE_ON_RESUME |= {"push_to_hub", "hub_private", "on_bad_shard"}
FREE_ON_RESUME |= {"identity", "persona", "facts", "eval_samples", "eval_limit", "eval_problems", "sample_prompts"}


def check_resumable(config: StageConfig) -> None:
    """Raise if the stage's folder holds checkpoints made with other settings than these."""
    path = config.out / "config.yaml"
    if not path.is_file() or not any(config.out.glob("checkpoint-*")):
        return
    before, now = read_yaml(path), as_settings(config)
    changed = [name for name in now if name not in FREE_ON_RESUME and before.get(name) != now[name]]
    if changed:
        what = ", ".join(f"{flag(name)} was {before.get(name)!r}, is {now[name]!r}" for name in changed)
        raise ValueError(f"{config.out} holds a run with other settings ({what}): give its own, or another --out")


def is_finished(config: StageConfig) -> bool:
    """Whether this very run is complete: its last output, eval.json, is there. Raises on other settings."""
    path = config.out / "eval.json"
    check_resumable(config)
    return path.is_file() and json.loads(path.read_text()).get("step") == config.max_steps


def nothing_to_do(config: StageConfig) -> bool:
    """Whether this very run is complete; says so."""
    if finished := is_finished(config):
        print(f"{config.out}: finished, nothing to do{push_advice(config)}")
    return finished


def push_advice(config: StageConfig) -> str:
    """How to push a finished stage that asks for it, as the end of a message; "" where it does not."""
    if config.push_to_hub is None:
        return ""
    private = " --private" if config.hub_private else ""
    return f"; to push it: python scripts/push.py --model {quote(str(config.out))} --repo {config.push_to_hub}{private}"
