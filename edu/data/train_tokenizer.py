"""Learn a tokenizer's vocabulary from text, by rustbpe."""

from collections.abc import Iterable

from edu.data.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer, clean

# A chunk that holds two ASCII digits holds nothing else, so these merges touch no other one, wherever they rank.
NUMBERS = tuple(str(number).encode() for number in range(10, 100))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of exactly vocab_size ids, special tokens included; texts may be a stream.

    >>> tokenizer = train_tokenizer(["the cat and the hat and the bat"], vocab_size=360)
    >>> [tokenizer.decode([token]) for token in tokenizer.encode("the 42")]
    ['the', ' ', '42']
    """
    import rustbpe

    room = vocab_size - 256 - len(NUMBERS) - len(SPECIAL_TOKENS)
    if room < 0:
        raise ValueError(
            f"--vocab-size {vocab_size}: at least {vocab_size - room} are needed for bytes, numbers, marks"
        )
    bpe = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]  (it ships no stubs)
    bpe.train_from_iterator(map(clean, texts), 256 + len(NUMBERS) + room, pattern=PATTERN)
    by_rank = sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
    learned = [bytes(token) for token, _ in by_rank[256:] if bytes(token) not in NUMBERS][:room]
    if len(learned) < room:
        most = vocab_size - room + len(learned)
        raise ValueError(
            f"--vocab-size {vocab_size}: the text has merges for {most} only; give more text or a lower size"
        )
    tokens = [bytes([byte]) for byte in range(256)] + list(NUMBERS) + learned
    return Tokenizer({token: rank for rank, token in enumerate(tokens)})
