"""Tokens through a GPT from its cache, with as few operators as it takes: at small batches their number is the time.

The same mathematics as `edu.model.gpt`, which a test holds it to. Queries, keys and values are one product, rotated and
cached together; of one new token a row, heads that share a key are more queries of it, so nothing is repeated in memory;
no mask where all rows have one length; weights are arranged as this machine multiplies them fastest. In fp32 on a CPU,
where most sampling of small models is done, the operators between the products of a step are loops (`edu.fast.cpu_kernels`).

B rows, T new tokens, S cached tokens, C channels, H query heads, K key/value heads, D head dim, V vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from edu.fast.cpu_kernels import add_weighted, attend, divided, layer_of_one, norm, relu_squared
from edu.fast.operators import ONEDNN
from edu.model.gpt import GPT, rotary_angles
from edu.model.kv_cache import KVCache
from edu.model.linear import at_least_fp32

Product = Callable[..., Tensor]
"""(rows, arranged weights, what to add or nothing) -> rows."""
FROM_CACHE = 6_000_000
"""Parameters to multiply with (24 MB) that a processor's cache keeps from step to step: more are worth more cores."""


class Decoder:
    """Copies the weights when they are first needed, in fp32 on a CPU once for each way to multiply.

    `is_current` says whether any has changed since it was made.
    """

    def __init__(self, model: GPT) -> None:
        self.model, self.config = model, model.config
        self.read = _fingerprint(model)
        self.embedding, self.parameters = model.model.embed_tokens.weight, model.num_parameters(exclude_embeddings=True)
        self.arranged: dict[Product, tuple[list[tuple[Tensor, ...]], Tensor]] = {}
        self.eps = at_least_fp32(self.embedding.new_full((), self.config.rms_norm_eps))  # as the model's norms
        device, H, K = self.embedding.device, self.config.num_attention_heads, self.config.kv_heads
        positions = torch.arange(self.config.max_position_embeddings, device=device)[:, None]
        cos, sin = (angles[:, 0] for angles in rotary_angles(positions, self.config))  # (S, 1, D/2)
        rotated = torch.stack((torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)), 1)  # (S, 2, 1, D)
        values = torch.tensor([1.0, 0.0], device=device)[:, None, None].expand_as(rotated)  # stay as they are
        # What to multiply a position's heads with, and the same heads with their halves exchanged: (S, 2, H + 2K, D).
        self.rotation = torch.cat((rotated.expand(-1, -1, H + K, -1), values.expand(-1, -1, K, -1)), 2)

    @property
    def is_current(self) -> bool:
        """Whether no weight was changed or moved since."""
        return self.read == _fingerprint(self.model)

    @torch.inference_mode()
    def extend(self, tokens: Int[Tensor, "B T"], lengths: Sequence[int], cache: KVCache) -> Float[Tensor, "B T C"]:
        """Append T tokens to each of the cache's first rows, which hold `lengths` tokens; the normed hidden states.

        Rows of unlike lengths take one token each.
        """
        B, T = tokens.shape
        K, D, H = self.config.kv_heads, self.config.head_dim, self.config.num_attention_heads
        start, span = min(lengths), max(lengths) + T
        product, layers, _ = self.weights(B * T)
        x = _filled(F.embedding(tokens.reshape(-1), self.embedding), product)
        if T == 1 and _fp32_on_cpu(self.embedding):
            return self._by_loops(x, lengths, cache)[:B, None]
        x = self._norm(x)
        mask = None
        if start + T == span:
            at = slice(start, span)
            if T > 1 and start:
                mask = torch.ones(T, span, dtype=torch.bool, device=tokens.device).tril(start)
        else:
            assert T == 1, f"{T} tokens a row for rows of {start} to {span - T} tokens"
            at = torch.tensor(lengths, device=tokens.device)[:, None]
            mask = (torch.arange(span, device=tokens.device) <= at)[:, None, None]  # (B, 1, 1, S)
        cos, sin = self.rotation[at].unbind(-3)  # (T, H + 2K, D), or (B, 1, H + 2K, D) for rows of unlike lengths
        for i, (qkv, out, fc1, fc2) in enumerate(layers):
            heads = at_least_fp32(product(self._norm(x), qkv)[: B * T]).view(B, T, H + 2 * K, D)
            exchanged = heads.roll(D // 2, -1)
            heads.mul_(cos).addcmul_(exchanged, sin)
            normed = heads[:, :, : H + K]
            normed.mul_(self._scales(normed))
            heads = heads.to(x.dtype)
            cached = cache.insert_kv(i, heads[:, :, H:].view(B, T, 2, K, D).permute(0, 2, 3, 1, 4), at)
            keys, values = cached[:, :, :, :span].unbind(1)
            queries = heads[:, 0, :H].view(B, K, H // K, D) if T == 1 else heads[:, :, :H].transpose(1, 2)
            masking = {"attn_mask": mask, "is_causal": T > 1 and mask is None}
            y = F.scaled_dot_product_attention(queries, keys, values, **masking, enable_gqa=T > 1)
            y = y if T == 1 else y.transpose(1, 2)
            x = product(_filled(y.reshape(B * T, H * D), product), out, x)
            hidden = product(self._norm(x), fc1).relu_()
            x = product(hidden.mul_(hidden), fc2, x)
        return self._norm(x)[: B * T].view(B, T, -1)

    def _by_loops(self, x: Float[Tensor, "B C"], lengths: Sequence[int], cache: KVCache) -> Float[Tensor, "B C"]:
        """From the embeddings of one new token a row to its hidden states; x may have more rows, which count for nothing."""
        product, layers, _ = self.weights(len(lengths))
        H, K, D = self.config.num_attention_heads, self.config.kv_heads, self.config.head_dim
        room = min(len(self.rotation), cache.memory.shape[-2])
        assert max(lengths) < room, f"rows of {max(lengths)} tokens and one more: there is room for {room}"
        parts = divided(len(lengths) * K, 2 * K * D * sum(lengths))
        at, eps = np.array(lengths), np.float32(self.config.rms_norm_eps)
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
        return x

    def logits(self, hidden: Float[Tensor, "B C"]) -> Float[Tensor, "B V"]:
        """Softcapped, in fp32. c tanh(x / c) is 2c sigmoid(2x / c) - c, which a CPU computes in a quarter of the time."""
        (product, _, head), cap = self.weights(len(hidden)), self.config.final_logit_softcapping
        logits = at_least_fp32(product(_filled(hidden, product), head)[: len(hidden)])
        return logits if cap is None else logits.mul_(2 / cap).sigmoid_().mul_(2 * cap).sub_(cap)

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"], lengths: Sequence[int], cache: KVCache) -> Float[Tensor, "B V"]:
        """Append a token to each of the cache's first rows, which hold `lengths` tokens; the logits of the next."""
        return self.logits(self.extend(tokens[:, None], lengths, cache)[:, 0])

    def _scales(self, x: Tensor) -> Tensor:
        """What RMS norm multiplies the last dimension with."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.eps.dtype)
        return torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()

    def _norm(self, x: Tensor) -> Tensor:
        normed = x * self._scales(x)
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    def weights(self, rows: int) -> tuple[Product, list[tuple[Tensor, ...]], Tensor]:
        """How to multiply so many rows with weights; the layers' weights and the head, arranged for it."""
        product, arrange = ways(self.embedding, rows, self.parameters)
        if product not in self.arranged:
            layers = []
            for block in self.model.model.layers:
                qkv = torch.cat([block.get_parameter(f"self_attn.{name}_proj.weight") for name in "qkv"])
                others = [block.get_parameter(f"{name}.weight") for name in ("self_attn.o_proj", "mlp.fc1", "mlp.fc2")]
                layers.append(tuple(map(arrange, (qkv, *others))))
            self.arranged[product] = layers, arrange(self.model.lm_head.weight)
        return product, *self.arranged[product]


def ways(weight: Tensor, rows: int, parameters: int) -> tuple[Product, Callable[[Tensor], Tensor]]:
    """How to multiply so many rows with weights like this one, of so many in all, and how to arrange these for it.

    On an AMD EPYC oneDNN's packed weights are 1.5 to 2.4 times as fast as MKL. For one row our loops are faster than both
    on one core, and on two, since one can read as fast as memory gives.
    """
    if _fp32_on_cpu(weight):
        if rows == 1 and (parameters <= FROM_CACHE or torch.get_num_threads() <= 2):
            return _product_by_loops, _transpose
        if ONEDNN:
            return _product_packed, torch.ops.mkldnn._reorder_linear_weight
    return _product, _transpose


def _fp32_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


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
    """The matrix to multiply rows with; on a CPU in memory order, which a single row reads faster."""
    return weight.T.contiguous() if weight.device.type == "cpu" else weight.T


def _product(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    return x @ weight if plus is None else torch.addmm(plus, x, weight)


def _fingerprint(model: GPT) -> list[tuple[int, int]]:
    """Changes with every update in place and every move of a weight."""
    return [(p._version, p.data_ptr()) for p in model.parameters()]
