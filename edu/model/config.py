"""Sizes of a GPT, as config.json holds them."""

from typing import Any

from transformers.models.nanochat.configuration_nanochat import NanoChatConfig

LARGEST = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 10**6)
LARGEST |= {"num_hidden_layers": 10**4, "vocab_size": 10**7, "max_position_embeddings": 10**7}


class GPTConfig(NanoChatConfig):
    """NanoChatConfig's fields and config.json; `tiny` has a ready-made size."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, most in LARGEST.items():
            if (value := getattr(self, name)) is not None and not 1 <= value <= most:
                raise ValueError(f"{name}={str(value)[:20]}: must be from 1 to {most:,}")
        C, H, K = self.hidden_size, self.num_attention_heads, self.kv_heads
        if C % H or H % K or (C // H) % 2:
            raise ValueError(f"hidden_size={C}, num_attention_heads={H}, num_key_value_heads={K}: heads must divide")
        if self.rope["rope_type"] != "default":
            raise ValueError(f"rope_type {self.rope['rope_type']!r}: only 'default' is computed here")
        if self.hidden_act != "relu2" or self.attention_bias or self.tie_word_embeddings or self.attention_dropout:
            raise ValueError(
                "only relu2, no attention_bias, untied embeddings and attention_dropout=0 are computed here"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of config.json, which names the stock class, so that no remote code is ever needed."""
        return super().to_dict() | {"architectures": ["NanoChatForCausalLM"]}

    @property
    def head_dim(self) -> int:
        """Return the channels of one head, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Return the number of key/value heads, K."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rope(self) -> dict[str, Any]:
        """Return the parameters of the rotary embedding."""
        return dict(self.rope_parameters or {})

    @classmethod
    def tiny(cls, **overrides: Any) -> "GPTConfig":
        """Return the size that tests and examples use: about 100 thousand parameters."""
        sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        return cls(**{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **sizes, **overrides})
