"""One token a row through a GPT, with as few operators as it takes: at small batches their number is the time.

The same mathematics as `edu.model`, which a test holds it to. Every product takes its matrix as it lies best in memory, and
adds the residual in the same pass; heads that share a key are more queries of it; nothing is computed for a mask when
all rows have one length.

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
    """Holds the weights as they were when it was made."""

    def __init__(self, model: GPT) -> None:
        self.config = model.config
        self.embedding = model.model.embed_tokens.weight
        self.head = _factor(model.lm_head.weight)
        # At least fp32, as in the model's norms.
        self.eps = at_least_fp32(
            torch.full((), self.config.rms_norm_eps, dtype=self.head.dtype, device=self.head.device)
        )
        self.layers = []
        for block in model.model.layers:
            weights = tuple(block.get_parameter(f"self_attn.{name}_proj.weight") for name in "qkv")
            others = [block.get_parameter(f"{name}.weight") for name in ("self_attn.o_proj", "mlp.fc1", "mlp.fc2")]
            self.layers.append((_factor(torch.cat(weights)), *map(_factor, others)))

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, "B"], lengths: list[int], cache: KVCache) -> Float[Tensor, "B V"]:
        """Append a token to each of the cache's first rows, which hold `lengths` tokens; softcapped logits in fp32."""
        c, B, span = self.config, len(lengths), max(lengths) + 1
        K, D, H = c.kv_heads, c.head_dim, c.num_attention_heads
        positions = torch.tensor(lengths, device=tokens.device)[:, None]
        mask = None
        if min(lengths) < max(lengths):
            hidden = torch.arange(span, device=tokens.device) > positions
            mask = torch.zeros(hidden.shape, dtype=self.head.dtype, device=tokens.device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]  # (B, 1, 1, S)
        cos, sin = (angle.squeeze(1) for angle in rotary_angles(positions, c))  # (B, 1, D/2)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)
        x = self._norm(self.embedding[tokens])
        for i, (qkv, out, fc1, fc2) in enumerate(self.layers):
            heads = (self._norm(x) @ qkv).view(B, H + 2 * K, D)
            qk = heads[:, : H + K]
            qk = self._norm(torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin))
            cached = cache.insert_kv(i, qk[:, H:, None], heads[:, H + K :, None], positions)
            keys, values = cached[:, :, :, :span].unbind(1)
            query = qk[:, :H].reshape(B, K, H // K, D)
            y = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            x = torch.addmm(x, y.reshape(B, H * D), out)
            x = torch.addmm(x, (self._norm(x) @ fc1).relu_().square_(), fc2)
        return softcap(at_least_fp32(self._norm(x) @ self.head), c.final_logit_softcapping)

    def _norm(self, x: Tensor) -> Tensor:
        """RMS norm of the last dimension."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.eps.dtype)
        return (x * torch.addcmul(self.eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()).to(self.head.dtype)


def _factor(weight: Tensor) -> Tensor:
    """The matrix to multiply rows with; on a CPU in memory order, which thin products read faster."""
    return weight.T.contiguous() if weight.device.type == "cpu" else weight.T
