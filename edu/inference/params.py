"""The Engine's input and output: sampling settings and samples. No torch here."""

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request: how its tokens are chosen and when it ends."""

    max_new_tokens: int = 64
    """Maximum number of new tokens, the stop token included"""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy"""
    top_k: int | None = None
    """Keep the k most probable tokens"""
    top_p: float | None = None
    """Keep the fewest most probable tokens that together reach this probability (arXiv:1904.09751)"""
    min_p: float | None = None
    """Keep tokens whose probability is at least this fraction of the greatest one (arXiv:2407.01082)"""
    stop_tokens: Collection[int] = frozenset()
    """Tokens that end a sample when sampled; the sample keeps the token"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: ask for at least one")
        bounds = {"temperature": (0, 1e3), "top_k": (1, 1e9), "top_p": (1e-9, 1), "min_p": (1e-9, 1)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value}: must lie between {low:g} and {high:g}")


@dataclass
class Sample:
    """The new tokens of one sample, the stop token included. The scheduler appends to it until it is finished."""

    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    """1 where the token was sampled, 0 where a tool forced it."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability, in nats, of each token in the distribution sampled from (greedy: the model's); 0.0 where mask is 0."""
    finish_reason: str = "length"
    """"stop" (a stop token), "length" (max_new_tokens or the context is full), "tool_error" or "cancelled"."""
