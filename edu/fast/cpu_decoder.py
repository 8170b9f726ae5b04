"""Incremental decoding in fp32 on a CPU. At small batch sizes operator overhead dominates, so this path launches few.

The same mathematics as `edu.model.gpt`, which tests hold it to. In prefill, queries, keys and values are one product,
rotated and cached together. In a step, what lies between the matrix products is compiled loops (`edu.fast.cpu_kernels`).
Weights are arranged as this machine multiplies them fastest.

B rows, T prompt positions, S cached tokens, C channels, H query heads, K key/value heads, D head dim, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from edu.fast.cpu_kernels import add_weighted, attend, divided, fingerprint, layer_of_one, norm, relu_squared
from edu.fast.operators import ONEDNN
from edu.inference.decoder import padded_chunks
from edu.model.gpt import GPT, rotary_angles
from edu.model.kv_cache import KVCache

Product = Callable[..., Tensor]
"""(rows, arranged weights, what to add or nothing) -> rows."""
FROM_CACHE = 6_000_000
"""Parameters to multiply with (24 MB) that a processor's cache keeps from step to step: more are worth more cores."""


class CPUDecoder:
    """Copies the weights when they are first needed, once for each way to multiply; `is_current` compares them."""

    def __init__(self, model: GPT) -> None:
        self.model, self.config = model, model.config
        self.read = self._fingerprint()
        self.parameters = model.num_parameters(exclude_embeddings=True)
        self.arranged: dict[Product, tuple[list[tuple[Tensor, ...]], Tensor]] = {}
        self.eps = torch.tensor(self.config.rms_norm_eps)
        H, K = self.config.num_attention_heads, self.config.kv_heads
        cos, sin = (
            x[:, 0] for x in rotary_angles(torch.arange(self.config.max_position_embeddings)[:, None], self.config)
        )
        rotated = torch.stack((torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)), 1)  # (S, 2, 1, D)
        values = torch.tensor([1.0, 0.0])[:, None, None].expand_as(rotated)  # stay as they are
        # Factors of a position's heads, and of the same heads with their halves exchanged: (S, 2, H + 2K, D).
        self.rotation = torch.cat((rotated.expand(-1, -1, H + K, -1), values.expand(-1, -1, K, -1)), 2)

    def _fingerprint(self) -> list[int]:
        """Hash the contents of all weights: optimizers that are fused, and writes to `.data`, leave no other trace."""
        weights = (p.detach() for p in self.model.parameters())
        return [int(fingerprint(w.contiguous().numpy().reshape(-1).view(np.uint32))) for w in weights]

    @property
    def is_current(self) -> bool:
        """Return True while the weights are those that were copied."""
        return self.read == self._fingerprint()

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[list[int]], cache: KVCache) -> None:
        """Fill the first rows of an empty cache with prompts, padded on the right, some positions of all at a time."""
        for start, ids in padded_chunks(prompts, cache):
            self._append(ids, start, cache)
        cache.lengths[: len(prompts)] = map(len, prompts)

    def _append(self, tokens: Int[Tensor, "B T"], start: int, cache: KVCache) -> None:
        """Compute and cache the keys and values of T tokens a row, for rows that hold `start` tokens."""
        B, T = tokens.shape
        K, D, H = self.config.kv_heads, self.config.head_dim, self.config.num_attention_heads
        span = start + T
        product, layers, _ = self.weights(max(2, B * T))  # the loops for one row have no product that adds
        x = self._norm(_filled(F.embedding(tokens.reshape(-1), self.model.model.embed_tokens.weight), product))
        mask = torch.ones(T, span, dtype=torch.bool).tril(start) if T > 1 and start else None
        cos, sin = self.rotation[start:span].unbind(-3)  # (T, H + 2K, D)
        for i, (qkv, out, fc1, fc2) in enumerate(layers):
            heads = product(self._norm(x), qkv)[: B * T].view(B, T, H + 2 * K, D)
            exchanged = heads.roll(D // 2, -1)
            heads.mul_(cos).addcmul_(exchanged, sin)
            normed = heads[:, :, : H + K]
            normed.mul_(self._scales(normed))
            cached = cache.memory[i, :B]  # (B, 2, K, S, D)
            cached[:, :, :, start:span] = heads[:, :, H:].view(B, T, 2, K, D).permute(0, 2, 3, 1, 4)
            if i + 1 == len(layers):
                return
            keys, values = cached[:, :, :, :span].unbind(1)
            queries = heads[:, :, :H].transpose(1, 2)
            masking = {"attn_mask": mask, "is_causal": T > 1 and mask is None}
            y = F.scaled_dot_product_attention(queries, keys, values, **masking, enable_gqa=True).transpose(1, 2)
            x = product(_filled(y.reshape(B * T, H * D), product), out, x)
            hidden = product(self._norm(x), fc1).relu_()
            x = product(hidden.mul_(hidden), fc2, x)

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"], cache: KVCache) -> Float[Tensor, "B V"]:
        """Append a token to each of the cache's first B rows, and return the logits of the next."""
        lengths = cache.lengths[: len(tokens)]
        product, layers, _ = self.weights(len(lengths))
        H, K, D = self.config.num_attention_heads, self.config.kv_heads, self.config.head_dim
        room = min(len(self.rotation), cache.get_max_length())
        assert max(lengths) < room, f"rows of {max(lengths)} tokens and one more: there is room for {room}"
        parts = divided(len(lengths) * K, 2 * K * D * sum(lengths))
        at, eps = np.array(lengths), np.float32(self.config.rms_norm_eps)
        # Rows may be filled up for the product; those count for nothing.
        x = _filled(F.embedding(tokens, self.model.model.embed_tokens.weight), product)
        rotation, y = self.rotation[:, :, 0].numpy(), x.new_zeros(len(x), H * D)
        norm(x.numpy(), eps)
        for (qkv, out, fc1, fc2), cached in zip(layers, cache.memory.numpy(), strict=True):
            if product is _product_by_loops:
                weights = qkv.numpy(), out.numpy(), fc1.numpy(), fc2.numpy()
                layer_of_one(x.numpy(), *weights, rotation, cached, at, eps)
            else:
                heads = product(x, qkv)
                attend(parts, x.numpy(), heads.numpy(), rotation, cached, at, eps, y.numpy())
                x = product(y, out, x)
                hidden = product(x, fc1)
                relu_squared(x.numpy(), hidden.numpy(), eps)
                x = product(hidden, fc2, x)
        norm(x.numpy(), eps)
        cache.lengths[: len(lengths)] = [length + 1 for length in lengths]
        return self._logits(x[: len(lengths)])

    def _logits(self, hidden: Float[Tensor, "B C"]) -> Float[Tensor, "B V"]:
        """Softcap: c tanh(x / c) is 2c sigmoid(2x / c) - c, which a CPU computes in a quarter of the time."""
        (product, _, head), cap = self.weights(len(hidden)), self.config.final_logit_softcapping
        logits = product(_filled(hidden, product), head)[: len(hidden)]
        return logits if cap is None else logits.mul_(2 / cap).sigmoid_().mul_(2 * cap).sub_(cap)

    def _scales(self, x: Tensor) -> Tensor:
        """Return the factors by which RMS norm multiplies the last dimension."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()

    def _norm(self, x: Tensor) -> Tensor:
        return x * self._scales(x)

    def weights(self, rows: int) -> tuple[Product, list[tuple[Tensor, ...]], Tensor]:
        """Select the matmul backend for this number of rows, and return the layers' weights and the head in its layout."""
        product, arrange = ways(rows, self.parameters)
        if product not in self.arranged:
            layers = []
            for block in self.model.model.layers:
                qkv = torch.cat([block.get_parameter(f"self_attn.{name}_proj.weight") for name in "qkv"])
                others = [block.get_parameter(f"{name}.weight") for name in ("self_attn.o_proj", "mlp.fc1", "mlp.fc2")]
                layers.append(tuple(map(arrange, (qkv, *others))))
            self.arranged[product] = layers, arrange(self.model.lm_head.weight)
        return product, *self.arranged[product]


def ways(rows: int, parameters: int) -> tuple[Product, Callable[[Tensor], Tensor]]:
    """Select the matmul backend for so many rows and parameters, and return it with what arranges weights for it.

    On an AMD EPYC oneDNN's packed weights are 1.5 to 2.4 times as fast as MKL. For one row our loops are faster than both
    on one core, and on two, since one can read as fast as memory gives.
    """
    if rows == 1 and (parameters <= FROM_CACHE or torch.get_num_threads() <= 2):
        return _product_by_loops, _transpose
    return (_product_packed, torch.ops.mkldnn._reorder_linear_weight) if ONEDNN else (_product, _transpose)


def _product_by_loops(x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_zeros(1, weight.shape[1])
    add_weighted(x.numpy()[0], weight.numpy(), y.numpy()[0])
    return y


def _product_packed(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    if plus is None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, None, "add")


def _filled(x: Tensor, product: Product) -> Tensor:
    """For oneDNN, rows of zeros added up to one of four numbers between two powers of two, at most a quarter more.

    It compiles and keeps a program for each number of rows and each matrix, 0.6 MB and more: let them be few.

    >>> [len(_filled(torch.ones(rows, 2), _product_packed)) for rows in (1, 7, 9, 16, 17, 100)]
    [1, 7, 10, 16, 20, 112]
    """
    step = 1 << max(0, len(x).bit_length() - 3) if product is _product_packed else 1
    missing = -len(x) % step
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _transpose(weight: Tensor) -> Tensor:
    """Return the matrix to multiply rows with, in memory order, which a single row reads faster."""
    return weight.T.contiguous()


def _product(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    return x @ weight if plus is None else torch.addmm(plus, x, weight)
