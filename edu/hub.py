"""The Hub: a model card beside every checkpoint, and the push of a checkpoint's Hugging Face files. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edu.metrics import measures

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
)
"""What a checkpoint's repository holds, as glob patterns: never `state/`, older checkpoints or samples."""

_HERE = "path/to/this/folder"  # stands for the model's name in a card until it is pushed
_WORDS = {
    "base": "pretrained on text: it continues a text, it does not chat",
    "sft": "pretrained, then fine-tuned on conversations",
    "rl": "pretrained, fine-tuned on conversations, then trained by reinforcement learning on problems with checkable answers",
}
_USE_CHAT = """\
from transformers import pipeline

chat = pipeline("text-generation", model="{model}")
messages = [{{"role": "user", "content": "Who are you?"}}]
print(chat(messages, max_new_tokens=64)[0]["generated_text"][-1]["content"])"""
_USE_TEXT = """\
from transformers import pipeline

write = pipeline("text-generation", model="{model}")
print(write("The sky is", max_new_tokens=32)[0]["generated_text"])"""
_LIMITS = """\
A small model made for learning how such models are made. It knows little, states falsehoods with confidence, and was not
trained for safety: do not rely on its answers, and do not put it before users who would."""


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = [(name.replace("|", "\\|"), value.replace("|", "\\|").replace("\n", " ")) for name, value in rows]
    return "\n".join(f"| {name} | {value} |" for name, value in [header, ("---", "---"), *cells])


def write_card(folder: Path, info: Mapping[str, Any]) -> Path:
    """Write the model card `README.md` into a checkpoint's folder, offline.

    `info`, all optional: `stage` (base, sft, rl), `name`, `settings` (name -> value), `figures` (a tree of numbers as in
    eval.json), `datasets` (Hub ids), `data` (a sentence on what it was trained on), `base_model` (Hub id), `step`, `limits`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    stage = str(info.get("stage", "base"))
    head = ModelCardData(
        language="en",
        license="mit",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["edu-chat", "nanochat", stage],
        datasets=list(info.get("datasets") or []) or None,
        base_model=info.get("base_model"),
    )
    use = (_USE_TEXT if stage == "base" else _USE_CHAT).format(model=_HERE)
    at = f", checkpoint of step {info['step']}" if "step" in info else ""
    parts = [
        f"# {info.get('name', f'edu-chat {stage}')}",
        f"A small language model, {_WORDS.get(stage, stage)}{at}. Its architecture is transformers' own `nanochat`.",
        f"## Use\n\nPlain transformers, no remote code:\n\n```python\n{use}\n```",
    ]
    if info.get("data"):
        parts.append(f"## Data\n\n{info['data']}")
    figures = [(" / ".join(path), str(measure)) for path, measure in measures(info.get("figures") or {})]
    if figures:
        parts.append(
            "## Evaluation\n\nSquare brackets hold 95% intervals, n is the number of examples.\n\n"
            + _table(("figure", "value"), figures)
        )
    if settings := info.get("settings"):
        rows = [(str(name), json.dumps(value, ensure_ascii=False, default=str)) for name, value in settings.items()]
        parts.append("## Recipe\n\n" + _table(("setting", "value"), rows))
    parts.append(f"## Limits\n\n{info.get('limits') or _LIMITS}")
    path = folder / "README.md"
    _replace(path, str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")))
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all; a hard link of the old one elsewhere keeps the old text."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def push(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Upload a checkpoint's Hugging Face files as one commit, making the repository and branch if need be; gives its URL.

    The card's example then names the repository. Raises ValueError, saying what to do, when the folder is no checkpoint, there is
    no token, or the Hub refuses; ConnectionError when it cannot be reached.
    """
    import huggingface_hub as hub
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise ValueError(f"--model {folder}: no config.json and model.safetensors in it; name a checkpoint's folder")
    if "/" not in repo_id:
        raise ValueError(f"--repo {repo_id}: name the repository as user/name")
    if hub.get_token() is None:
        raise ValueError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = hub.HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        if (folder / "README.md").is_file():
            card = (folder / "README.md").read_text(encoding="utf-8")
            _replace(folder / "README.md", card.replace(_HERE, url.repo_id))
        commit = api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            allow_patterns=list(HUGGING_FACE_FILES),
            revision=revision,
            commit_message=f"Upload {folder.name}",
        )
    except HFValidationError as error:
        raise ValueError(f"--repo {repo_id}: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = (
            "; the token may not write there: run `hf auth login` with one that may"
            if status in (401, 403, 404)
            else ""
        )
        raise ValueError(f"the Hub refused --repo {repo_id} ({status}): {error}{advice}") from error
    except TransportError as error:
        raise ConnectionError(
            f"cannot reach the Hub at {api.endpoint}: {error}; nothing was lost, push again later"
        ) from error
    return str(commit.commit_url)
