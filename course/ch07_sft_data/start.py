"""Chapter 7: conversations to tokens, inputs and targets. Fill in the bodies; `make grade CHALLENGE=7` says what holds.

B conversations, T tokens of a row. A target of -1 is ignored by the loss.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class Tokenizer(Protocol):
    """What you are given: text to ids, and the ids of the marks, which no text ever becomes."""

    bos: int
    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int
    python_start: int
    python_end: int
    output_start: int
    output_end: int
    pad: int

    def encode(self, text: str) -> list[int]: ...


def render(conversation: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation and a mask of the same length: 1 on what the assistant says, else 0.

        bos, user_start question user_end, assistant_start answer assistant_end, user_start ...

    conversation["messages"] is a list of {"role": ..., "content": ...}:

    1. system (only the first): its text, two newlines, then the text of the first user message, as one user turn.
    2. user: between user_start and user_end.
    3. assistant: between assistant_start and assistant_end. The mask is 1 on the text and on assistant_end, which says
       "I am done"; it is 0 on assistant_start, which the program places.
    4. A use of the calculator is three messages and one assistant turn:

           {"role": "assistant", "content": "7*7 = ", "tool_calls": [{"function": {"name": "calculator",
                                                      "arguments": {"expression": "7*7"}}}]}
           {"role": "tool", "content": "49"}
           {"role": "assistant", "content": "49"}

           assistant_start "7*7 = " python_start "7*7" python_end output_start "49" output_end "49" assistant_end

       The call with its two marks is the assistant's (1), the output with its two marks is the program's (0).
    """
    raise NotImplementedError


def sft_batch(conversations: list[dict[str, Any]], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (B, T) int64 each, T as long as the longest conversation needs.

    The target at t is the token at t + 1, if the assistant said it, else -1. Shorter rows are filled with pad.
    """
    raise NotImplementedError
