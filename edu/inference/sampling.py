"""Choose tokens from logits. B rows, V vocabulary."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from edu.inference.params import SamplingParams

PROBABLE = 512
"""Number of most probable tokens that nearly always reach top_p: finding them is much faster than sorting on a CPU."""


def sample_tokens(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, "B"], params: SamplingParams
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """Choose one token per row and return it with its log-probability, in nats.

    1. Greedy: the most probable token.
    2. Otherwise divide by the temperature, remove what top_k, min_p and top_p exclude, in this order, and renormalize.
    3. Invert the cumulative distribution at the row's uniform number in [0, 1): each row has its own number,
       so its token does not depend on the other rows of the batch.

    >>> logits = torch.log(torch.tensor([[0.2, 0.8], [0.2, 0.8]]))
    >>> tokens, logprobs = sample_tokens(logits, torch.tensor([0.1, 0.3]), SamplingParams())
    >>> tokens.tolist(), [round(p, 3) for p in logprobs.exp().tolist()]
    ([0, 1], [0.2, 0.8])
    """
    if params.temperature == 0:
        # numpy's argmax is vectorized on a CPU and torch's is not; numpy has no bf16.
        by_numpy = logits.device.type == "cpu" and logits.dtype != torch.bfloat16
        best = torch.from_numpy(logits.numpy().argmax(-1)) if by_numpy else logits.argmax(-1)
        return best, logits.log_softmax(-1).gather(1, best[:, None]).squeeze(1)
    if params.temperature != 1:
        logits = logits / params.temperature
    if params.top_k is not None and params.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[:, -1:], float("-inf"))
    if params.min_p is not None:
        most = logits.max(-1, keepdim=True).values
        logits = logits.masked_fill(logits < most + math.log(params.min_p), float("-inf"))
    if params.top_p is not None:
        probs = logits.softmax(-1)
        sorted_probs = probs.topk(min(PROBABLE, probs.shape[-1])).values
        if bool((sorted_probs.cumsum(-1)[:, -1] < params.top_p).any()):
            sorted_probs = probs.sort(descending=True).values
        inside = sorted_probs.cumsum(-1) - sorted_probs < params.top_p  # the token that reaches top_p is still inside
        last = sorted_probs.gather(1, inside.sum(-1, keepdim=True) - 1)
        logits = logits.masked_fill(probs < last, float("-inf"))
    probs = logits.softmax(-1)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    # Less than the total, so that a token of probability 0 is never found, even if rounding makes u * total the total.
    point = torch.minimum(uniforms[:, None].to(total.dtype) * total, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, point, right=True)
    return tokens.squeeze(1), probs.gather(1, tokens).squeeze(1).log()
