"""The GPT: nanochat's architecture, computed by our own code under the parameter names of transformers' `nanochat`.

One checkpoint therefore opens in both: `GPT.from_pretrained(dir)` here, `AutoModelForCausalLM.from_pretrained(dir)`
anywhere. Read from top to bottom:

1. `rms_norm`, `relu_squared`, `apply_rotary_emb`: functions without weights.
2. `CausalSelfAttention`, `MLP`, and `Block`, which adds both to the residual stream: x + attention(norm(x)), x + MLP(norm(x)).
3. `GPTModel`: token embedding, norm, the blocks, norm. `GPT`: the head on top, with softcapped logits or log-probabilities.

Norms have no weights, so no checkpoint holds them; rotary angles are computed, so no buffer can be lost on loading.

B batch, T time (queries), S time (keys), C channels, H query heads, K key/value heads, D head dim, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from edu.model.config import GPTConfig
from edu.model.fast_path import accelerated
from edu.model.linear import Linear, at_least_fp32
from edu.model.loss import head_log_probs, head_weighted_sum, softcap
from edu.model.masks import attend_in_quarters, mask_for


# accelerated: edu/fast's version, equal up to rounding, runs instead where it is available
@accelerated
def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to unit mean square, in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467); no weights."""
    wide = at_least_fp32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x)


@accelerated
def relu_squared(x: Tensor) -> Tensor:
    """Return max(x, 0)^2: cheap, and many of its outputs are exactly zero (Primer, arXiv:2109.08668)."""
    return x.relu().square()


def rotary_angles(position_ids: Int[Tensor, "B T"], config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles, (B, 1, T, D/2) each, in fp32 (RoFormer, arXiv:2104.09864).

    Pair i = 0, 1, ..., D/2 - 1 of a head turns by theta^(-2i/D) radians per position (theta is config.rope["rope_theta"]):
    the first by 1, the last by about 1/theta. Fast pairs tell neighbors apart, slow ones distant positions.
    """
    D = config.head_dim
    exponents = torch.arange(0, D, 2, device=position_ids.device, dtype=torch.float32) / D
    angles = position_ids[:, None, :, None].float() * config.rope["rope_theta"] ** -exponents
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: Float[Tensor, "B H T D"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B H T D"]:
    """Rotate the pairs (x_i, x_{i+D/2}) by minus the angle of their position, nanochat's direction."""
    # Attention by itself knows no order. Let R be the rotation of one step. A query at position m is turned m times, a
    # key at n n times, and their product depends on m - n alone: (R^m q) . (R^n k) = q . R^(n-m) k. Lengths do not change.
    left, right = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1).type_as(x)


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention as in "Attention Is All You Need" (arXiv:1706.03762), for attn_implementation="eager"."""
    # query (B, H, T, D), key and value (B, K, S, D) in; (B, T, H, D) and weights (B, H, T, S) out.
    # Grouped queries: H / K query heads share a key/value head.
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    # Without a mask it is causal: the last query sees all S keys, the one before it S - 1, and so on.
    if attention_mask is None:
        T, S = scores.shape[2:]
        attention_mask = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
    if attention_mask.dtype == torch.bool:  # True where a query may look
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    else:  # added to the scores: 0 or a large negative number
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Head(Linear):
    """Linear layer to the logits, or with `targets` to their log-probabilities; it starts near zero."""

    # Log-probabilities are computed in here because FSDP2 gathers a sharded weight only while its own module computes.

    def forward(
        self, input: Tensor, targets: Tensor | None = None, weights: Tensor | None = None, cap: float | None = None
    ) -> Tensor:
        """Return logits; with targets, their log-probabilities (B, T); with weights too, the weighted sum."""
        if targets is None:
            return super().forward(input)
        if weights is None:
            return head_log_probs(input, self.weight, targets, cap)
        return head_weighted_sum(input, self.weight, targets, weights, cap)


class OutputLinear(Linear):
    """Linear layer that writes to the residual stream; it starts at zero."""


class CausalSelfAttention(nn.Module):
    """Causal self-attention: every token looks at itself and those before it, and takes a weighted mean of their values.

    Grouped-query attention (arXiv:2305.13245) lets H query heads share K key/value heads: the cache, which generation
    reads at every step, is H / K times smaller.
    """

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_dim
        self.config, self.layer_idx, self.head_dim = config, layer_idx, D
        # transformers' attention functions read these three.
        self.num_key_value_groups, self.scaling, self.is_causal = H // K, D**-0.5, True
        self.q_proj = Linear(C, H * D, bias=False)
        self.k_proj = Linear(C, K * D, bias=False)
        self.v_proj = Linear(C, K * D, bias=False)
        self.o_proj = OutputLinear(H * D, C, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        cos_sin: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        cache: Cache | None = None,
        packed: bool = False,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B T C"], Tensor | None]:
        B, T, _ = x.shape
        # 1. Queries, keys and values of every token: q (B, H, T, D); k and v (B, K, T, D).
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # 2. Positions by RoPE; without angles the tokens stand at positions 0 to T - 1. QK norm (arXiv:2010.04245) then
        # scales both to length sqrt(D), so a score q . k / sqrt(D) lies within +-sqrt(D) however large the weights grow.
        # Rotation keeps lengths, so norm and rotation may swap.
        if cos_sin is None:
            cos_sin = rotary_angles(torch.arange(T, device=x.device)[None], self.config)
        q, k = (rms_norm(apply_rotary_emb(y, *cos_sin), self.config.rms_norm_eps) for y in (q, k))
        # 3. The cache appends this layer's new keys and values, and returns all that it holds: (B, K, S, D).
        # All caches in transformers call this method update; KVCache.update calls insert_kv, which writes and reads.
        # kwargs are passed as a dict: transformers' paged attention adds to it.
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        # 4. softmax(q k^T / sqrt(D)) v, by the implementation that the model was loaded with; causal without a mask.
        # eager_attention_forward above shows it in full.
        name = self.config._attn_implementation or "eager"
        dense = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4
        if dense and name != "eager":  # flash and flex attention take no dense mask
            name = "sdpa"
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        attend = partial(attention_interface, self, dropout=0.0, scaling=self.scaling, **kwargs)
        # Packed rows on a CPU: a quarter of the queries at a time, each with only the keys up to its end (same result, 5/8
        # of the work).
        if packed and T >= 256 and x.device.type == "cpu" and dense:
            attend = partial(attend_in_quarters, attend)
        y, weights = attend(q, k, v, attention_mask)  # (B, T, H, D)
        # 5. Back to the residual stream.
        return self.o_proj(y.reshape(B, T, -1)), weights


class MLP(nn.Module):
    """Process each token by itself: C to intermediate_size channels, squared ReLU, back to C. No gate, no biases."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = OutputLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        # (B, T, C) -> (B, T, intermediate_size) -> (B, T, C)
        return self.fc2(relu_squared(self.fc1(x)))


class Block(GradientCheckpointingLayer):
    """One layer: (B, T, C) in, (B, T, C) out; causal, at positions 0 to T - 1 unless told otherwise."""

    def __init__(self, config: GPTConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = CausalSelfAttention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(
        self, x: Float[Tensor, "B T C"], cos_sin: tuple[Tensor, Tensor] | None = None, **kwargs: Any
    ) -> Float[Tensor, "B T C"]:
        x = x + self.self_attn(rms_norm(x, self.eps), cos_sin, **kwargs)[0]  # tokens exchange information
        return x + self.mlp(rms_norm(x, self.eps))  # each token by itself


class GPTPreTrainedModel(PreTrainedModel):
    """Interface to transformers, and initialization of the weights."""

    config: GPTConfig
    config_class = GPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block, "attentions": CausalSelfAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as nanochat does: outputs of a block at zero, head near zero, so that training starts from the identity.

        Check the leaf modules: transformers never calls this for a module without parameters of its own.
        """
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, OutputLinear):
            init.zeros_(module.weight)
        elif isinstance(module, Head):
            init.normal_(module.weight, std=0.001)
        elif isinstance(module, nn.Linear):
            bound = (3 / self.config.hidden_size) ** 0.5  # uniform with the standard deviation 1/sqrt(C)
            init.uniform_(module.weight, -bound, bound)


class GPTModel(GPTPreTrainedModel):
    """Embedding and layers, without the head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    # transformers' plumbing: config defaults, recorded outputs, and the old argument name past_key_values
    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T C"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        # 1. Tokens to vectors (B, T, C), and their positions, which continue after the tokens in the cache.
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        # 2. Which token sees which, in the form that the attention implementation wants; a dense mask stays as it is.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        cos_sin = rotary_angles(position_ids, self.config)
        kwargs |= {"attention_mask": mask, "cache": cache, "position_ids": position_ids}
        # 3. The layers, with a norm before and after them. transformers' early-exit decoding lowers num_hidden_layers for
        # its draft.
        x = rms_norm(x, self.config.rms_norm_eps)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, cos_sin, **kwargs)
        return BaseModelOutputWithPast(rms_norm(x, self.config.rms_norm_eps), cache)


class GPT(GPTPreTrainedModel, GenerationMixin):
    """The language model: a Hugging Face causal LM, and the log-probabilities that every trainer here needs."""

    # transformers' name for what could be tied; here the two stay separate (GPTConfig refuses tying)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # PreTrainedModel reads it from the class's name, and our class name has none
        self.model = GPTModel(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T C"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Int[Tensor, "B T"] | None = None,
        weights: Float[Tensor, "B T"] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | Float[Tensor, "B T"] | Float[Tensor, ""]:
        """Return log-probabilities (B, T) of `targets`, 0.0 where a target is -1; without targets, logits, as in transformers.

        With `weights` too: the sum of weights times log-probabilities, which is all that training needs, and costs less.
        `targets` are already shifted, and packed documents are told apart by `position_ids`, which restart at 0. `labels`
        are as in every Hugging Face model: shifted inside, -100 ignored.
        """
        if targets is not None:
            if any(x is not None for x in (attention_mask, cache, inputs_embeds, labels)):
                raise ValueError("targets= goes with input_ids and position_ids alone: -1 leaves a target out")
            mask = None if position_ids is None else mask_for(self.config._attn_implementation, position_ids)
            hidden = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=False,
                packed=mask is not None,
            ).last_hidden_state
            return self.lm_head(hidden, targets, weights, self.config.final_logit_softcapping)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        # softcap: cap * tanh(logits / cap) keeps logits within (-cap, cap)
        logits = softcap(self.lm_head(hidden), self.config.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, outputs.cache, outputs.hidden_states, outputs.attentions)
