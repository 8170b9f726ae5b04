"""What several test files share: a small tokenizer, made once."""

import pytest

from edu.data.tokenizer import Tokenizer, train_tokenizer

SENTENCES = [
    "Tom has 12 apples and buys 30 more. How many apples does Tom have? He has 12 + 30 = 42 apples.",
    "The quick brown fox jumps over the lazy dog; the dog doesn't care, and I'd say it's asleep.",
    "Die Straße führt über die Brücke. Où est le café ? Привет, мир! 你好，世界。 🙂🙂 👩‍👩‍👧",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n\tprint(add(i, 2 * i))\n",
    "You are a helpful assistant. What is your name? My name is Ada. Who made you? People who like small models.",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A vocabulary of 512 ids."""
    return train_tokenizer(SENTENCES * 3, vocab_size=512)
