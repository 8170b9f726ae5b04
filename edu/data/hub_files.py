"""Checkpoints by folder or Hub id: the files one consists of, its download, and the Hub's errors as one line. No torch."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edu.config.network import public_url
from edu.config.reading import read_json

EVAL_RESULTS = ".eval_results/gsm8k.yaml"
HUGGING_FACE_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    EVAL_RESULTS,
)
"""Files of a checkpoint's repository, as glob patterns: never `state/`, older checkpoints or samples."""


def is_hub_id(name: str) -> bool:
    """Return whether a name can only be that of something on the Hub: `name` or `user/name`, and no such file here.

    >>> is_hub_id("openai/gsm8k"), is_hub_id("runs/tiny/sft"), is_hub_id("runs/never"), is_hub_id("./model")
    (True, False, False, False)
    """
    named = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
    return named and not name.startswith("runs/") and not Path(name).exists()


@contextmanager
def hub_errors(what: str, may: str) -> Iterator[None]:
    """Raise errors of the Hub and its client as one line: ValueError where the user must act, ConnectionError where time may help.

    `what` names the flag and its value, `may` what the token has to allow: read or write.
    """
    from httpx2 import TransportError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{what}: {error}") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"{what}: not in the cache, and the Hub cannot be reached") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = f"{what}: the Hub answered {status} ({error.server_message or error.response.reason_phrase})"
        if status in (401, 403, 404):
            login = f"run `hf auth login` with a token that may {may} it, or set HF_TOKEN"
            raise ValueError(f"{said}; check the name, or {login}") from error
        raise ConnectionError(f"{said}; try again later") from error
    except (TransportError, RuntimeError, ConnectionError) as error:  # the last two: a file's upload failed for good
        why = " ".join(f"{error} {error.__cause__}".split()) if isinstance(error, RuntimeError) else error
        other = f", or correct HF_ENDPOINT ({public_url(constants.ENDPOINT)})" if os.environ.get("HF_ENDPOINT") else ""
        raise ConnectionError(f"{what}: the connection to the Hub failed ({why}); try again later{other}") from error


def model_folder(name: str, patterns: Sequence[str] = HUGGING_FACE_FILES) -> Path:
    """Return the folder with a checkpoint of this architecture: `name` itself, or where the cache holds the files of that Hub id.

    What is not in the cache yet is downloaded. Raises ValueError where there is no such checkpoint, ConnectionError where the
    Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    folder = Path(name)
    if is_hub_id(name):
        with hub_errors(f"--model {name}", may="read"):
            folder = Path(snapshot_download(name, allow_patterns=list(patterns)))
    elif not folder.is_dir():
        raise ValueError(f"--model {name}: no such folder; run the stage that makes it first, or ./my_pipeline.sh")
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {name}: no config.json in it, so it holds no checkpoint")
    try:
        kind = read_json(folder / "config.json").get("model_type")
    except ValueError as error:
        raise ValueError(f"--model {name}: its config.json cannot be read ({error}); the file is damaged") from None
    if kind != "nanochat":
        raise ValueError(f"--model {name}: its model_type is {kind!r}; only 'nanochat' is computed here")
    return folder


def check_token() -> None:
    """Raise ValueError if a push could not work, whatever the Hub says."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
    if get_token() is None:
        raise ValueError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN to a token that may write")
