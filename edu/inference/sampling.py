"""Choosing tokens from logits, and what a sample is. B rows, V vocabulary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

PROBABLE = 512
"""Tokens that nearly always hold top_p: a CPU finds them in a quarter to an eighth of the time of sorting a vocabulary."""


@dataclass
class Sample:
    """The new tokens of one sample, the stop token included."""

    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    """1 where the token was sampled, 0 where a tool forced it."""
    logprobs: list[float] = field(default_factory=list)
    """Of each sampled token under the distribution asked for (greedy: the model's own), nats; 0.0 where mask is 0."""
    finish_reason: str = "length"
    """"stop" (a stop token), "length" (max_new_tokens or the context is full) or "tool_error"."""


def sample_tokens(
    logits: Float[Tensor, "B V"],
    uniforms: Float[Tensor, "B"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """One token a row, and its log-probability, by inverting the cumulative distribution at the row's uniform number.

    >>> tokens, logprobs = sample_tokens(torch.log(torch.tensor([[0.2, 0.8], [0.2, 0.8]])), torch.tensor([0.1, 0.3]))
    >>> tokens.tolist(), [round(p, 3) for p in logprobs.exp().tolist()]
    ([0, 1], [0.2, 0.8])
    """
    if temperature == 0:
        # On a CPU numpy looks at sixteen numbers at once, torch at one; numpy has no bf16.
        by_numpy = logits.device.type == "cpu" and logits.dtype != torch.bfloat16
        best = torch.from_numpy(logits.numpy().argmax(-1)) if by_numpy else logits.argmax(-1)
        return best, logits.log_softmax(-1).gather(1, best[:, None]).squeeze(1)
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if min_p is not None:
        logits = logits.masked_fill(logits < logits.max(-1, keepdim=True).values + math.log(min_p), float("-inf"))
    if top_p is not None:
        probs = logits.softmax(-1)
        sorted_probs = probs.topk(min(PROBABLE, probs.shape[-1])).values
        if bool((sorted_probs.cumsum(-1)[:, -1] < top_p).any()):
            sorted_probs = probs.sort(descending=True).values
        inside = sorted_probs.cumsum(-1) - sorted_probs < top_p  # the first token that reaches top_p is still inside
        last = sorted_probs.gather(1, inside.sum(-1, keepdim=True) - 1)
        logits = logits.masked_fill(probs < last, float("-inf"))
    probs = logits.softmax(-1)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total, so that the token found has a probability of its own even if rounding made u * total the total.
    point = torch.minimum(uniforms[:, None].to(total.dtype) * total, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, point, right=True)
    return tokens.squeeze(1), probs.gather(1, tokens).squeeze(1).log()


def check_request(
    prompts: Sequence[list[int]],
    samples: Sequence[list[Sample]],
    seed: int | Sequence[int],
    max_new_tokens: int,
    context: int,
    vocabulary: int,
    options: dict,
) -> None:
    """Refuse what cannot be sampled, with a message that says why."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: the context holds 1 to {context - 1} and an answer")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ValueError(
                f"prompt {i} has tokens {min(prompt)} to {max(prompt)}: the model knows 0 to {vocabulary - 1}"
            )
    if not all(samples):
        raise ValueError("num_samples=0: ask for at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: ask for at least one")
    if not isinstance(seed, int) and len(seed) != len(prompts):
        raise ValueError(f"{len(seed)} seeds for {len(prompts)} prompts: give one each")
    bounds = {"temperature": (0, 1e3), "top_k": (1, 1e9), "top_p": (1e-9, 1), "min_p": (1e-9, 1)}
    for name, (low, high) in bounds.items():
        if options[name] is not None and not low <= options[name] <= high:
            raise ValueError(f"{name}={options[name]}: must lie between {low:g} and {high:g}")
