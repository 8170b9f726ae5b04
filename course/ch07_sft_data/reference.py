"""edu's rendering and packing under the names of chapter 7."""

from typing import Any

from torch import Tensor

from edu.chat.chat_format import render as render_chat
from edu.data.packing import TrainingExample, collate


def render(conversation: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    rendered = render_chat(conversation, tokenizer)
    return list(rendered.ids), list(rendered.mask)


def sft_batch(conversations: list[dict[str, Any]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """One conversation a row, as long as the longest needs."""
    rows = [[TrainingExample(*render(conversation, tokenizer))] for conversation in conversations]
    longest = max(len(example.ids) for (example,) in rows) - 1
    batch = collate(rows, longest, tokenizer.pad)
    return batch.inputs, batch.targets
