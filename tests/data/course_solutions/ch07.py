"""My renderer: a stream of (token, learned) pairs."""

import itertools

import torch
from torch.nn.utils.rnn import pad_sequence


class Renderer:
    def __init__(self, tok):
        self.tok = tok

    def pairs(self, messages):
        tok = self.tok
        yield tok.bos, 0
        messages = [dict(m) for m in messages]
        if messages and messages[0]["role"] == "system":
            first, *messages = messages
            messages[0]["content"] = first["content"] + "\n\n" + messages[0]["content"]
        # one user message, or a run of assistant and tool messages, is a turn
        for is_user, group in itertools.groupby(messages, key=lambda m: m["role"] == "user"):
            if is_user:
                for m in group:
                    yield from self.mark([tok.user_start, *tok.encode(m["content"]), tok.user_end], 0)
            else:
                yield from self.assistant(list(group))

    @staticmethod
    def mark(ids, bit):
        return zip(ids, itertools.repeat(bit))

    def assistant(self, group):
        tok = self.tok
        yield tok.assistant_start, 0
        for i, m in enumerate(group):
            if m["role"] == "tool":
                yield from self.mark([tok.output_start, *tok.encode(m["content"]), tok.output_end], 0)
                continue
            yield from self.mark(tok.encode(m["content"]), 1)
            for call in m.get("tool_calls") or []:
                ids = tok.encode(call["function"]["arguments"]["expression"])
                yield from self.mark([tok.python_start, *ids, tok.python_end], 1)
            if i + 1 == len(group):
                yield tok.assistant_end, 1


def render(conversation, tokenizer):
    ids, mask = zip(*Renderer(tokenizer).pairs(conversation["messages"]), strict=True)
    return list(ids), list(mask)


def sft_batch(conversations, tokenizer):
    xs, ys = [], []
    for c in conversations:
        ids, mask = map(torch.tensor, render(c, tokenizer))
        xs.append(ids[:-1])
        ys.append(ids.where(mask.bool(), -1)[1:])
    return (
        pad_sequence(xs, batch_first=True, padding_value=tokenizer.pad),
        pad_sequence(ys, batch_first=True, padding_value=-1),
    )
