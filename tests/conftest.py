"""The environment of the tests, the same whatever is exported, and a small tokenizer that several test files share."""

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edu.data.tokenizer import Tokenizer

# The tests and all processes that they start see only these variables of whoever runs them, and the same umask.
# It happens before anything of ours is imported, since libraries read the environment at import.
KEPT = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "CI", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
KEPT |= {
    "SYSTEMROOT",
    "WINDIR",
    "COMSPEC",
    "PATHEXT",
    "USERPROFILE",
    "APPDATA",
    "LOCALAPPDATA",
    "TEMP",
    "TMP",
}  # Windows
KEPT_FAMILIES = ("PYTEST_", "CUDA_", "NVIDIA_", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
for name in set(os.environ) - KEPT:
    if not name.startswith(KEPT_FAMILIES):
        del os.environ[name]
os.environ["PYTHONUTF8"] = "1"
os.umask(0o022)

SENTENCES = [
    "Tom has 12 apples and buys 30 more. How many apples does Tom have? He has 12 + 30 = 42 apples.",
    "The quick brown fox jumps over the lazy dog; the dog doesn't care, and I'd say it's asleep.",
    "Die Straße führt über die Brücke. Où est le café ? Привет, мир! 你好，世界。 🙂🙂 👩‍👩‍👧",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(add(i, 2 * i))\n",
    "You are a helpful assistant. What is your name? My name is Ada. Who made you? People who like small models.",
]


@pytest.fixture(scope="session")
def tokenizer() -> "Tokenizer":
    """A vocabulary of 512 ids."""
    from edu.data.train_tokenizer import train_tokenizer

    return train_tokenizer(SENTENCES * 3, vocab_size=512)
