"""Tell whether a stage is finished, before torch is imported."""

from shlex import quote

from edu.config.reading import read_json
from edu.config.stages import StageConfig
from edu.training.resume import check_made_from, check_resumable


def is_finished(config: StageConfig) -> bool:
    """Return whether this very run is complete: its last output, eval.json, is there. Raises on other settings or inputs."""
    path = config.out / "eval.json"
    check_resumable(config)
    try:
        results = read_json(path) if path.is_file() else {}
    except ValueError as error:
        print(f"{error}: the stage is measured again")
        return False
    finished = results.get("step") == config.max_steps
    if finished and (changed := check_made_from(config, results.get("made_from", {}))):
        print(
            f"{config.out}: measured on other files ({', '.join(changed)}); delete {path} and run again to measure anew"
        )
    return finished


def nothing_to_do(config: StageConfig) -> bool:
    """Return whether this very run is complete, and say so."""
    if finished := is_finished(config):
        print(f"{config.out}: finished, nothing to do{push_advice(config)}")
    return finished


def push_advice(config: StageConfig) -> str:
    """Return how to push a finished stage that asks for it, as the end of a message; "" where it does not."""
    if config.push_to_hub is None:
        return ""
    private = " --private" if config.hub_private else ""
    return f"; to push it: python scripts/push.py --model {quote(str(config.out))} --repo {config.push_to_hub}{private}"
