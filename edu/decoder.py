"""One token a row through a GPT, with as few operators as it takes: at small batches their number is the time.

The same mathematics as `edu.model`, which a test holds it to. Queries, keys and values are one product,
rotated, normed and cached together; heads that share a key are more queries of it, so that nothing is repeated in memory;
there is no mask where all rows have one length.

B rows, S cached tokens, C channels, H query heads, K key/value heads, G = H/K, D head dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from edu.fused import at_least_fp32
from edu.kv_cache import KVCache
from edu.losses import softcap
from edu.model import GPT, rotary_angles


class Decoder:
    """Holds the weights as they were when it was made; `is_current` says whether they still are."""

    def __init__(self, model: GPT) -> None:
        self.model, self.config = model, model.config
        self.read = _fingerprint(model)
        self.embedding, self.head = model.model.embed_tokens.weight, _factor(model.lm_head.weight)
        self.layers = []
        for block in model.model.layers:
            weights = tuple(block.get_parameter(f"self_attn.{name}_proj.weight") for name in "qkv")
            others = [block.get_parameter(f"{name}.weight") for name in ("self_attn.o_proj", "mlp.fc1", "mlp.fc2")]
            self.layers.append((_factor(torch.cat(weights)), *map(_factor, others)))
        # At least fp32, as in the model's norms and angles.
        device, H, K = self.head.device, self.config.num_attention_heads, self.config.kv_heads
        self.eps = at_least_fp32(torch.full((), self.config.rms_norm_eps, dtype=self.head.dtype, device=device))
        positions = torch.arange(self.config.max_position_embeddings, device=device)[:, None]
        angles = [angle[:, 0] for angle in rotary_angles(positions, self.config)]  # (S, 1, D/2)
        still = [torch.ones_like(angles[0]), torch.zeros_like(angles[0])]  # values are not rotated
        # Of every position and head, (S, H + 2K, D): x * cos + swapped x * sin rotates by minus the angle.
        self.cos = torch.cat([angles[0].expand(-1, H + K, -1), still[0].expand(-1, K, -1)], 1).repeat(1, 1, 2)
        sin = torch.cat([angles[1].expand(-1, H + K, -1), still[1].expand(-1, K, -1)], 1)
        self.sin = torch.cat((sin, -sin), -1)

    @property
    def is_current(self) -> bool:
        """Whether no weight was changed or moved since."""
        return self.read == _fingerprint(self.model)

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"], lengths: list[int], cache: KVCache) -> Float[Tensor, "B V"]:
        """Append a token to each of the cache's first rows, which hold `lengths` tokens; softcapped logits in fp32."""
        B, span = len(lengths), max(lengths) + 1
        K, D, H = self.config.kv_heads, self.config.head_dim, self.config.num_attention_heads
        positions = torch.tensor(lengths, device=tokens.device)
        mask = None
        if min(lengths) < max(lengths):
            hidden = torch.arange(span, device=tokens.device) > positions[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.head.dtype, device=tokens.device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]  # (B, 1, 1, S)
        cos, sin = self.cos[positions], self.sin[positions]  # (B, H + 2K, D)
        x = self._norm(self.embedding[tokens])
        for i, (qkv, out, fc1, fc2) in enumerate(self.layers):
            heads = (self._norm(x) @ qkv).view(B, H + 2 * K, D)
            heads = torch.addcmul(heads * cos, heads.roll(D // 2, -1), sin)
            scales = self._scales(heads)
            scales[:, H + K :] = 1  # nor are values normed
            heads = (heads * scales).to(x.dtype)
            cached = cache.insert_kv(i, heads[:, H:].view(B, 2, K, 1, D), positions[:, None])
            keys, values = cached[:, :, :, :span].unbind(1)
            y = F.scaled_dot_product_attention(heads[:, :H].view(B, K, H // K, D), keys, values, attn_mask=mask)
            x = x + y.view(B, H * D) @ out
            x = x + (self._norm(x) @ fc1).relu_().square_() @ fc2
        return softcap(at_least_fp32(self._norm(x) @ self.head), self.config.final_logit_softcapping)

    def _scales(self, x: Tensor) -> Tensor:
        """What RMS norm multiplies the last dimension with."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.eps.dtype)
        return torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()

    def _norm(self, x: Tensor) -> Tensor:
        return (x * self._scales(x)).to(x.dtype)


def _factor(weight: Tensor) -> Tensor:
    """The matrix to multiply rows with; on a CPU in memory order, which thin products read faster."""
    return weight.T.contiguous() if weight.device.type == "cpu" else weight.T


def _fingerprint(model: GPT) -> list[tuple[int, int]]:
    """Changes with every update in place and every move of a weight."""
    return [(p._version, p.data_ptr()) for p in model.parameters()]
