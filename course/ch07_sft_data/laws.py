"""The laws of chapter 7, and the mistakes that they must name."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from course.grading import Mutant

TITLE = "SFT data with masking"
PROVIDES = ("render", "sft_batch")
MARKS = [
    "bos",
    "user_start",
    "user_end",
    "assistant_start",
    "assistant_end",
    "python_start",
    "python_end",
    "output_start",
    "output_end",
    "pad",
]


class Bytes:
    """A tokenizer of bytes, with the marks behind them."""

    def __init__(self) -> None:
        for i, name in enumerate(MARKS):
            setattr(self, name, 256 + i)

    def __getattr__(self, name: str) -> int:
        raise AttributeError(f"the tokenizer has no {name}; its marks are {', '.join(MARKS)}")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def show(self, ids: list[int]) -> str:
        """Return tokens as text, marks in angle brackets, ignored targets as dots."""
        return "".join("." if i == -1 else chr(i) if i < 256 else f"<{MARKS[i - 256]}>" for i in ids)


T = Bytes()


def _chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ONE = _chat(("user", "Hi"), ("assistant", "Hello"))
TWO = _chat(("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "e!"))
SYSTEM = _chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))
CALL = {
    "messages": [
        {"role": "user", "content": "7 x 7?"},
        {
            "role": "assistant",
            "content": "7*7 = ",
            "tool_calls": [{"function": {"name": "calculator", "arguments": {"expression": "7*7"}}}],
        },
        {"role": "tool", "content": "49"},
        {"role": "assistant", "content": "49."},
    ]
}
WRITTEN = {
    "one turn": (ONE, "<bos><user_start>Hi<user_end><assistant_start>Hello<assistant_end>"),
    "two turns": (
        TWO,
        "<bos><user_start>a<user_end><assistant_start>bc<assistant_end><user_start>d<user_end><assistant_start>e!<assistant_end>",
    ),
    "a system message": (
        SYSTEM,
        "<bos><user_start>Be kind.\n\nHi<user_end><assistant_start>Hello<assistant_end>",
    ),
}
CALLED = "<bos><user_start>7 x 7?<user_end><assistant_start>7*7 = <python_start>7*7<python_end><output_start>49<output_end>49.<assistant_end>"


def law_tokens(m: Any) -> None:
    """A conversation becomes these tokens, in this order."""
    for name, (conversation, expected) in WRITTEN.items():
        ids, mask = m.render(conversation, T)
        assert T.show(ids) == expected, f"{name}: {T.show(ids)!r}, expected {expected!r}"
        assert len(ids) == len(mask), f"{name}: {len(ids)} tokens and a mask of {len(mask)}"


def law_mask(m: Any) -> None:
    """Learned is exactly what the assistant says: text and end token of every turn, nothing else."""
    for name, (conversation, _) in WRITTEN.items():
        ids, mask = m.render(conversation, T)
        expected = "".join(
            message["content"] + "<assistant_end>"
            for message in conversation["messages"]
            if message["role"] == "assistant"
        )
        learned = T.show([token for token, learn in zip(ids, mask, strict=True) if learn])
        assert learned == expected, f"{name}: learned {learned!r}, expected {expected!r}"


def law_calls(m: Any) -> None:
    """A call of the calculator is learned with its marks; its output, which the program writes, is not."""
    ids, mask = m.render(CALL, T)
    assert T.show(ids) == CALLED, f"{T.show(ids)!r}, expected {CALLED!r}"
    learned = T.show([token for token, learn in zip(ids, mask, strict=True) if learn])
    assert learned == "7*7 = <python_start>7*7<python_end>49.<assistant_end>", (
        f"learned {learned!r}: a model that learns to write outputs invents them instead of asking"
    )


def law_shape(m: Any) -> None:
    """Inputs and targets are (B, T) of int64, and T is one less than the longest conversation has tokens."""
    x, y = m.sft_batch([ONE, TWO], T)
    assert x.shape == y.shape, f"inputs {tuple(x.shape)}, targets {tuple(y.shape)}"
    expected = (2, max(len(m.render(c, T)[0]) for c in (ONE, TWO)) - 1)
    assert tuple(x.shape) == expected, f"inputs are {tuple(x.shape)}, expected {expected}"
    assert x.dtype == y.dtype == torch.int64, f"inputs {x.dtype}, targets {y.dtype}, expected torch.int64"


def law_shift(m: Any) -> None:
    """A target is the next input."""
    x, y = m.sft_batch([TWO, CALL], T)
    for row, (ids, target) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        for t in range(len(ids) - 1):
            if target[t] != -1 and ids[t + 1] != T.pad:
                assert target[t] == ids[t + 1], (
                    f"row {row}, position {t}: the target is {T.show([target[t]])}, the next input {T.show([ids[t + 1]])}"
                    + ("; it is the input itself: not shifted" if target[t] == ids[t] else "")
                )


def law_masked_targets(m: Any) -> None:
    """After the shift, the targets are still exactly what the assistant says."""
    for name, conversation, said in (
        ("two turns", TWO, "bc<assistant_end>e!<assistant_end>"),
        ("one turn", ONE, "Hello<assistant_end>"),
    ):
        _, y = m.sft_batch([conversation], T)
        learned = T.show([token for token in y[0].tolist() if token != -1])
        assert learned == said, (
            f"{name}: the targets that count are {learned!r}, expected {said!r}; do ids and mask shift together?"
        )


def law_first_word(m: Any) -> None:
    """The first word of an answer is predicted at assistant_start."""
    x, y = m.sft_batch([ONE], T)
    at = x[0].tolist().index(T.assistant_start)
    assert int(y[0, at]) == ord("H"), f"at assistant_start the target is {T.show([int(y[0, at])])!r}, expected 'H'"
    assert int(y[0, at - 1]) == -1, (
        "at user_end the target is assistant_start, which the program places: it is not learned"
    )


def law_stop(m: Any) -> None:
    """Every turn's end token is learned, so that the model stops."""
    _, y = m.sft_batch([TWO], T)
    ends = y[0].tolist().count(T.assistant_end)
    assert ends == 2, (
        f"2 assistant turns, {ends} end tokens among the targets: a model that never learns to stop talks on"
    )


def law_padding(m: Any) -> None:
    """Padding is pad in the inputs and -1 in the targets."""
    x, y = m.sft_batch([ONE, TWO], T)
    n = len(m.render(ONE, T)[0]) - 1
    assert (y[0, n:] == -1).all(), (
        f"targets behind the end of row 0: {T.show(y[0, n:].tolist())!r}, expected dots alone"
    )
    assert (x[0, n:] == T.pad).all(), f"inputs behind the end of row 0: {T.show(x[0, n:].tolist())!r}, expected pad"


def law_loss_without_padding(m: Any) -> None:
    """The summed loss of two conversations is the same in one batch and alone."""
    logits = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))  # of the next token, by the present one

    def loss(conversations: list[dict[str, Any]]) -> float:
        x, y = m.sft_batch(conversations, T)
        return float(cross_entropy(logits[x].flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum"))

    both, apart = loss([ONE, TWO]), loss([ONE]) + loss([TWO])
    assert abs(both - apart) < 1e-2, (
        f"together {both:.2f}, alone {apart:.2f} in sum: something of the padding is learned"
    )


def law_nothing_is_changed(m: Any) -> None:
    """The conversation that is given stays as it is, and is rendered the same again."""
    import copy

    before = copy.deepcopy(SYSTEM)
    first, second = m.render(SYSTEM, T), m.render(SYSTEM, T)
    assert before == SYSTEM, "render changed the messages it was given: the next epoch would read another conversation"
    assert first == second, "the same conversation gave other tokens the second time"


MUTANTS = [
    Mutant("targets not shifted", "torch.where(torch.tensor(mask[1:]) == 1, torch.tensor(ids[1:]), -1)", "torch.where(torch.tensor(mask[:-1]) == 1, torch.tensor(ids[:-1]), -1)", "shift"),
    Mutant("mask not shifted with the ids", "torch.tensor(mask[1:]) == 1", "torch.tensor(mask[:-1]) == 1", "masked_targets"),
    Mutant("stop token not learned", "add([tokenizer.assistant_end], 1)", "add([tokenizer.assistant_end], 0)", "stop"),
    Mutant("start token learned", "add([tokenizer.assistant_start], 0)", "add([tokenizer.assistant_start], 1)", "mask"),
    Mutant("padding is a target", "targets = torch.full((len(rendered), T), -1)", "targets = torch.full((len(rendered), T), tokenizer.pad)", "padding"),
    Mutant("padding with the end token", "inputs = torch.full((len(rendered), T), tokenizer.pad)", "inputs = torch.full((len(rendered), T), tokenizer.assistant_end)", "padding"),
    Mutant("only the last answer is learned", "    return ids, mask", "    last = max(i for i, token in enumerate(ids) if token == tokenizer.assistant_start)\n    return ids, [learn if i > last else 0 for i, learn in enumerate(mask)]", "mask"),
    Mutant("the question is learned too", "tokenizer.user_end], 0)", "tokenizer.user_end], 1)", "mask"),
    Mutant("the tool's output is learned", "*text, tokenizer.output_end], 0)", "*text, tokenizer.output_end], 1)", "calls"),
    Mutant("the call is not learned", "tokenizer.python_end], 1)", "tokenizer.python_end], 0)", "calls"),
    Mutant("a turn begins anew after a tool", "if not in_turn:", "if True:", "calls"),
    Mutant("the system message is dropped", 'tokenizer.encode(system + message["content"])', 'tokenizer.encode(message["content"])', "tokens"),
    Mutant("the system message before every question", 'tokenizer.user_end], 0)\n            system = ""', 'tokenizer.user_end], 0)\n            message["content"] = system + message["content"]', "nothing_is_changed"),
]  # fmt: skip
