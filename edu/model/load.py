"""Open a trained model and its tokenizer, from a folder or a Hub id; weights that do not match are refused."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from edu.config.scaling import Sizes
from edu.data.hub_files import model_folder
from edu.data.tokenizer import Tokenizer
from edu.model.config import GPTConfig
from edu.model.gpt import GPT


def load_model(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """Return the GPT in a folder or of a Hub id, on a device, in a dtype or else in that of its checkpoint.

    transformers draws weights that the files lack at random and drops those that the model lacks. Both, and weights of
    another shape, are a ValueError here that names them.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise ValueError(f"--model {name}: a LoRA adapter; merge it into its model first (merge_and_unload, then save)")
    folder = model_folder(name)
    config = _read_config(name, folder)
    try:
        with _without_report():
            options: Any = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded: Any = GPT.from_pretrained(folder, dtype=dtype or "auto", **options)
    except (SafetensorError, UnpicklingError, EOFError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"--model {name}: config.json or weights are damaged or missing ({why})") from None
    model, found = loaded
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    others = [
        f"{key}: {list(saved)} where config.json says {list(expected)}"
        for key, saved, expected in sorted(found["mismatched_keys"])
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": others}
    if wrong := [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys]:
        raise ValueError(
            f"--model {name}: its weights are not those of its config.json: {', '.join(wrong)}{_cure(unexpected)}"
        )
    assert isinstance(model, GPT)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model


def _read_config(name: str, folder: Path) -> GPTConfig:
    """Read config.json; ValueError if its sizes are none, or far more than the weight files hold: they would fill the memory."""
    try:
        config = GPTConfig.from_pretrained(folder)
        assert isinstance(config, GPTConfig)
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        OSError,
    ) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"--model {name}: its config.json describes no model of this architecture ({why})") from None
    held, described = (
        sum(path.stat().st_size for path in folder.glob("model*.safetensors")),
        Sizes.of_config(config).parameters,
    )
    if held and described > 2 * held:
        raise ValueError(
            f"--model {name}: config.json describes {described:,} parameters, its files have {held:,} bytes"
        )
    return config


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer beside a model, in a folder or on the Hub."""
    return Tokenizer.load(model_folder(name, ["config.json", "tokenizer*", "*.jinja"]))


def quiet_transformers() -> None:
    """Turn transformers' own progress bars off where stderr is not a terminal."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence the table that transformers logs of weights that do not match."""
    quiet_transformers()
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first(names: Sequence[str], most: int = 3) -> str:
    """Join the first few names, and count the rest."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _cure(unexpected: Sequence[str]) -> str:
    """Say what to do about unexpected names whose origin is known."""
    if any("_orig_mod." in name for name in unexpected):
        return "; torch.compile named them: save them again without `_orig_mod.`"
    if any("lora_" in name or ".base_layer." in name for name in unexpected):
        return "; they hold a LoRA adapter: merge it first (merge_and_unload, then save)"
    return ""
