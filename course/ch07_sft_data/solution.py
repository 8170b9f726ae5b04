"""The plain solution of chapter 7: render a conversation, shift, mask, pad."""

from typing import Any

import torch
from torch import Tensor


def render(conversation: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    ids, mask = [tokenizer.bos], [0]

    def add(tokens: list[int], learn: int) -> None:
        ids.extend(tokens)
        mask.extend([learn] * len(tokens))

    system, in_turn = "", False
    for message in conversation["messages"]:
        text = tokenizer.encode(message["content"])
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            add([tokenizer.user_start, *tokenizer.encode(system + message["content"]), tokenizer.user_end], 0)
            system = ""
        elif message["role"] == "tool":
            add([tokenizer.output_start, *text, tokenizer.output_end], 0)
        else:
            if not in_turn:
                add([tokenizer.assistant_start], 0)
            add(text, 1)
            in_turn = bool(message.get("tool_calls"))
            if in_turn:
                expression = message["tool_calls"][0]["function"]["arguments"]["expression"]
                add([tokenizer.python_start, *tokenizer.encode(expression), tokenizer.python_end], 1)
            else:
                add([tokenizer.assistant_end], 1)
    return ids, mask


def sft_batch(conversations: list[dict[str, Any]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    rendered = [render(conversation, tokenizer) for conversation in conversations]
    T = max(len(ids) for ids, _ in rendered) - 1
    inputs = torch.full((len(rendered), T), tokenizer.pad)
    targets = torch.full((len(rendered), T), -1)
    for row, (ids, mask) in enumerate(rendered):
        n = len(ids) - 1
        inputs[row, :n] = torch.tensor(ids[:-1])
        targets[row, :n] = torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -1)
    return inputs, targets
