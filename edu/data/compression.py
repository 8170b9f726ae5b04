"""Compression of a vocabulary in bytes per token, beside vocabularies that many know."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tiktoken

from edu.data.tokenizer import clean

SAMPLES = {
    "English": "The river rose in the night, and by morning the old bridge stood alone in a field of brown water.",
    "code": "def mean(values: list[float]) -> float:\n    return sum(values) / len(values) if values else 0.0\n",
    "numbers": "12 + 30 = 42, 7 * 8 = 56, 100 - 37 = 63, 48 / 2 = 24, 1,250 / 5 = 250 and 3.14 * 2 = 6.28.",
    "German": "In der Nacht stieg der Fluss, und am Morgen stand die alte Brücke allein in einem Feld aus Wasser.",
    "Russian": "Ночью река поднялась, и к утру старый мост стоял один посреди поля бурой воды.",
    "Chinese": "夜里河水上涨，到了早晨，那座老桥孤零零地立在一片褐色的水中。",
}
_STORE = "https://openaipublic.blob.core.windows.net"
PEERS = {
    "gpt2": (f"{_STORE}/gpt-2/encodings/main/vocab.bpe", f"{_STORE}/gpt-2/encodings/main/encoder.json"),
    "o200k_base": (f"{_STORE}/encodings/o200k_base.tiktoken",),
}
"""Known vocabularies, and the files from which tiktoken makes them."""


def bytes_per_token(encode: Callable[[str], Sequence[int]], texts: Iterable[str]) -> float:
    """Return UTF-8 bytes of the raw texts over the tokens they take; ValueError if there is no text.

    >>> bytes_per_token(lambda text: text.split(), ["12 34", "é"])
    2.3333333333333335
    """
    total_bytes = total_tokens = 0
    for text in texts:
        total_bytes += len(clean(text).encode("utf-8"))
        total_tokens += len(encode(text))
    if not total_tokens:
        raise ValueError("no text to measure compression on")
    return total_bytes / total_tokens


def peers() -> dict[str, tiktoken.Encoding]:
    """Return those of PEERS whose files are in tiktoken's cache: nothing is downloaded for a comparison."""
    found = {}
    for name, urls in PEERS.items():
        if all(_cached(url).is_file() for url in urls):
            try:
                found[name] = tiktoken.get_encoding(name)
            except (OSError, ValueError) as error:  # a damaged file, and no network to replace it
                print(f"{name} is left out of the comparison: {error}")
    return found


def _cached(url: str) -> Path:
    """Return the path of a file that tiktoken has downloaded (tiktoken/load.py)."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    return Path(folder or default) / hashlib.sha1(url.encode()).hexdigest()
