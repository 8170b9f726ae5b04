"""Sample from a GPT: many prompts at once, several samples of each, rows that finish make room for those that wait.

`generate_naive` is the definition: the whole sequence through the model for every token. `Engine` gives the same tokens
from a cache of keys and values: a prompt is computed once (prefill), its cache row is copied for each sample, then every
step computes one token a row (decode). Rows have lengths of their own, so nothing is padded on the left.

B rows, T new tokens, S cached tokens, C channels, H query heads, K key/value heads, G = H/K, D head dim, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from edu.fused import rms_norm
from edu.losses import softcap
from edu.model import GPT, Block, apply_rotary_emb, rotary_angles
from edu.sampling import Sample, check_request, sample_tokens

Tool = Callable[[list[int]], list[int]]
"""New tokens so far -> tokens to force, [] for none; raises ValueError to end the sample."""

MAX_ROWS = 128
"""Rows decoded at once unless told otherwise."""


class KVCache:
    """Keys and values of B rows, pre-allocated: logically (B, n_layer, 2, K, S, D), layer first in memory."""

    def __init__(self, rows: int, max_seq_len: int, model: GPT) -> None:
        c = model.config
        shape = (c.num_hidden_layers, rows, 2, c.kv_heads, max_seq_len, c.head_dim)
        weight = model.lm_head.weight
        self.layers = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    @property
    def tensor(self) -> Float[Tensor, "B L 2 K S D"]:
        """The cache in its logical order."""
        return self.layers.transpose(0, 1)

    def insert_kv(
        self, layer: int, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"], positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B 2 K S D"]:
        """Write new keys and values of the first B rows at their positions; return those rows' cache."""
        B, T = positions.shape
        rows = torch.arange(B, device=positions.device)[:, None].expand(B, T)
        cached = self.layers[layer]
        cached[rows, :, :, positions] = torch.stack((k, v), 1).permute(0, 3, 1, 2, 4)  # (B, T, 2, K, D)
        return cached[:B]

    def copy_rows(self, targets: list[int], sources: list[int], length: int, source: "KVCache | None" = None) -> None:
        """Copy the first `length` positions of rows of `source` (or this cache) to rows of this cache."""
        if targets:
            self.layers[:, targets, :, :, :length] = (source or self).layers[:, sources, :, :, :length]


@dataclass
class _Row:
    """One sample being decoded."""

    prompt: int
    number: int
    length: int
    limit: int
    sample: Sample
    forced: deque[int] = field(default_factory=deque)


class Engine:
    """Generates with a GPT in eval mode on its device. The weights are read anew at every call."""

    def __init__(self, model: GPT, max_rows: int = MAX_ROWS) -> None:
        self.model, self.config, self.max_rows = model, model.config, max_rows
        self.device = model.lm_head.weight.device

    def read_weights(self) -> None:
        """Join each block's query, key and value matrices into one: a third of the products per layer."""
        self._qkv_weights = [
            torch.cat([block.get_parameter(f"self_attn.{name}_proj.weight") for name in "qkv"])
            for block in self.model.model.layers
        ]

    @torch.inference_mode()
    def forward(self, ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], cache: KVCache, span: int) -> Tensor:
        """Final hidden states (B, T, C) of new tokens of the cache's first B rows, whose longest reaches `span`."""
        B, T = ids.shape
        K, D, eps = self.config.kv_heads, self.config.head_dim, self.config.rms_norm_eps
        cos, sin = rotary_angles(positions, self.config)
        visible = torch.arange(span, device=self.device) <= positions[:, :, None]  # (B, T, S)
        G = self.config.num_attention_heads // K
        mask = visible[:, None].expand(B, G, T, span).reshape(B, 1, G * T, span)
        x = rms_norm(self.model.model.embed_tokens(ids), eps)
        for i, (block, qkv_weight) in enumerate(zip(self.model.model.layers, self._qkv_weights, strict=True)):
            heads = F.linear(rms_norm(x, eps), qkv_weight).view(B, T, -1, D).transpose(1, 2)  # (B, H + 2K, T, D)
            rotated = rms_norm(apply_rotary_emb(heads[:, : -K or None], cos, sin), eps)
            cached = cache.insert_kv(i, rotated[:, -K:], heads[:, -K:], positions)[:, :, :, :span]
            # A group's query heads become more queries of one key head: nothing is repeated in memory.
            q = rotated[:, :-K].reshape(B, K, G * T, D)
            y = F.scaled_dot_product_attention(q, cached[:, 0], cached[:, 1], attn_mask=mask)
            assert isinstance(block, Block)
            x = x + block.self_attn.o_proj(y.view(B, K * G, T, D).transpose(1, 2).reshape(B, T, -1))
            x = x + block.mlp(rms_norm(x, eps))
        return rms_norm(x, eps)

    def logits(self, hidden: Float[Tensor, "B C"]) -> Float[Tensor, "B V"]:
        """Softcapped logits in fp32."""
        return softcap(self.model.lm_head(hidden).float(), self.config.final_logit_softcapping)

    def prefill(self, prompts: Sequence[list[int]], cache: KVCache) -> Float[Tensor, "B V"]:
        """Fill the first rows with prompts, padded on the right, and return the logits after each one's last token."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        width = int(lengths.max())
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=self.device)
        positions = torch.arange(width, device=self.device).expand(len(prompts), width)
        hidden = self.forward(ids, positions, cache, span=width)
        return self.logits(hidden[torch.arange(len(prompts), device=self.device), lengths - 1])

    def decode(self, tokens: list[int], lengths: list[int], cache: KVCache) -> Float[Tensor, "B V"]:
        """Append one token to each of the first rows, which hold `lengths` tokens, and return the logits after it."""
        ids, positions = torch.tensor([tokens, lengths], device=self.device).unsqueeze(-1)
        return self.logits(self.forward(ids, positions, cache, span=max(lengths) + 1)[:, 0])

    def generate(
        self,
        prompts: Sequence[list[int]],
        num_samples: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int | Sequence[int] = 0,
        tool: Tool | None = None,
    ) -> list[list[Sample]]:
        """Samples [prompt][sample]. Sample k of a prompt draws from (its seed, k), wherever it stands in the batch."""
        samples = [[Sample() for _ in range(num_samples)] for _ in prompts]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        for _ in self._run(prompts, samples, max_new_tokens, options, set(stop_tokens), seed, tool):
            pass
        return samples

    def stream(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        seed: int = 0,
        tool: Tool | None = None,
    ) -> Iterator[int]:
        """The tokens of one sample, each as soon as it is known."""
        samples = [[Sample()]]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        for _ in self._run([prompt], samples, max_new_tokens, options, set(stop_tokens), seed, tool):
            yield samples[0][0].tokens[-1]

    @torch.inference_mode()
    def _run(
        self,
        prompts: Sequence[list[int]],
        samples: list[list[Sample]],
        max_new_tokens: int,
        options: dict,
        stop_tokens: set[int],
        seed: int | Sequence[int],
        tool: Tool | None,
    ) -> Iterator[None]:
        """Decode until every sample is finished; one yield a step.

        1. Admit waiting prompts while there are rows for all samples of the next one: prefill, copy its cache row.
        2. Choose each row's next token: forced by its tool, or sampled.
        3. Drop the finished rows, moving rows from the end into their places, and decode the others.
        """
        check_request(prompts, seed, max_new_tokens, self.config.max_position_embeddings, options)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        K = len(samples[0]) if samples else 0
        capacity = max(K, min(self.max_rows, K * len(prompts)))
        context = min(self.config.max_position_embeddings, max(map(len, prompts), default=0) + max_new_tokens)
        self.read_weights()
        cache = KVCache(capacity, context, self.model)
        draws = torch.empty(capacity, max_new_tokens)
        waiting, rows = deque(range(len(prompts))), list[_Row]()
        logits = torch.empty(0, self.config.vocab_size, device=self.device)
        while waiting or rows:
            arrivals = list[int]()
            while waiting and len(rows) + (len(arrivals) + 1) * K <= capacity:
                arrivals.append(waiting.popleft())
            if arrivals:
                lengths = [len(prompts[i]) for i in arrivals]
                fresh = KVCache(len(arrivals), max(lengths), self.model)
                first = self.prefill([prompts[i] for i in arrivals], fresh)
                forks = [(place, i, k) for place, i in enumerate(arrivals) for k in range(K)]
                at = range(len(rows), len(rows) + len(forks))
                cache.copy_rows(list(at), [place for place, _, _ in forks], max(lengths), fresh)
                logits = torch.cat((logits, first.repeat_interleave(K, 0)))
                for row, (_, i, k) in zip(at, forks, strict=True):
                    limit = min(max_new_tokens, self.config.max_position_embeddings - len(prompts[i]))
                    rows.append(_Row(i, k, len(prompts[i]), limit, samples[i][k]))
                    draws[row] = torch.from_numpy(np.random.default_rng((seeds[i], k)).random(max_new_tokens))
            steps = torch.tensor([len(row.sample.tokens) for row in rows])
            uniforms = draws[: len(rows)].gather(1, steps[:, None]).squeeze(1).to(self.device)
            chosen, logprobs = sample_tokens(logits, uniforms, **options)
            live = [
                _advance(row, token, logprob, stop_tokens, tool)
                for row, token, logprob in zip(rows, chosen.tolist(), logprobs.tolist(), strict=True)
            ]
            yield
            rows = self._compact(rows, live, cache, draws)
            if rows:
                logits = self.decode([r.sample.tokens[-1] for r in rows], [r.length for r in rows], cache)
                for row in rows:
                    row.length += 1
            else:
                logits = logits[:0]

    @staticmethod
    def _compact(rows: list[_Row], live: list[bool], cache: KVCache, draws: Tensor) -> list[_Row]:
        """Close the gaps of finished rows with rows from the end; the live ones are the cache's first rows again."""
        count = sum(live)
        gaps = [i for i in range(count) if not live[i]]
        movers = [i for i in range(count, len(rows)) if live[i]]
        cache.copy_rows(gaps, movers, max((rows[i].length for i in movers), default=0))
        draws[gaps] = draws[movers]
        for gap, mover in zip(gaps, movers, strict=True):
            rows[gap] = rows[mover]
        return rows[:count]


def _advance(row: _Row, token: int, logprob: float, stop_tokens: set[int], tool: Tool | None) -> bool:
    """Give a row its next token, forced or else the sampled one; False when that ends it."""
    sample, forced = row.sample, bool(row.forced)
    sample.tokens.append(row.forced.popleft() if forced else token)
    sample.mask.append(int(not forced))
    sample.logprobs.append(0.0 if forced else logprob)
    if not forced and token in stop_tokens:
        sample.finish_reason = "stop"
        return False
    if tool is not None and not forced:
        try:
            row.forced.extend(tool(sample.tokens))
        except ValueError:
            sample.finish_reason = "tool_error"
            return False
    return len(sample.tokens) < row.limit


@torch.inference_mode()
def generate_naive(model: GPT, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
    """Greedy tokens without a cache: the whole sequence is computed again for each one."""
    ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    for _ in range(max_new_tokens):
        token = model(ids, logits_to_keep=1, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat((ids, token[:, None]), dim=1)
        yield int(token)
