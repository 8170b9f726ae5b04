"""Chapter 5: transformers' `generate` on our GPT, with every cache it knows and ours, gives the Engine's tokens."""

from typing import Any

import pytest
import torch
from test_04_model import random_gpt
from transformers import ContinuousBatchingConfig, DynamicCache, StaticCache
from transformers.models.nanochat.modeling_nanochat import NanoChatForCausalLM

from edu.inference.engine import Engine, KVCache, generate_naive
from edu.model.gpt import GPT

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [9, 7]]
PAD, NEW = 0, 20


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_gpt(vocab_size=50, seed=3)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """The prompts padded on the left, as `generate` wants them."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


def test_every_way_to_generate_gives_the_same_greedy_tokens(model: GPT, inputs: dict[str, torch.Tensor]) -> None:
    expected = [list(generate_naive(model, prompt, NEW)) for prompt in PROMPTS]
    length = inputs["input_ids"].shape[1] + NEW
    stock = NanoChatForCausalLM(model.config).eval()
    stock.load_state_dict(model.state_dict())
    assert len({tuple(tokens) for tokens in expected}) == 3, "a model that repeats itself proves nothing"
    assert [s.tokens for (s,) in Engine(model).generate(PROMPTS, max_new_tokens=NEW, temperature=0)] == expected
    assert new_tokens(stock, inputs) == expected
    assert new_tokens(model, inputs) == expected
    assert new_tokens(model, inputs, use_cache=False) == expected
    assert new_tokens(model, inputs, cache=DynamicCache(config=model.config)) == expected
    assert new_tokens(model, inputs, cache=StaticCache(config=model.config, max_cache_len=length)) == expected
    assert new_tokens(model, inputs, cache_implementation="static", disable_compile=True) == expected
    cache = KVCache(3, length, model)
    assert new_tokens(model, inputs, cache=cache) == expected
    assert new_tokens(stock, inputs, cache=KVCache(3, length, model)) == expected
    assert cache.get_seq_length() == length - 1, "the last token's keys are not needed"
    cache.reset()
    assert new_tokens(model, inputs, cache=cache) == expected


def test_beams_fork_our_cache_as_they_fork_transformers_own(model: GPT, inputs: dict[str, torch.Tensor]) -> None:
    expected = new_tokens(model, inputs, num_beams=3, num_return_sequences=2)
    assert expected != [tokens for tokens in new_tokens(model, inputs) for _ in range(2)]
    cache = KVCache(9, inputs["input_ids"].shape[1] + NEW, model)
    assert new_tokens(model, inputs, num_beams=3, num_return_sequences=2, cache=cache) == expected
    static = StaticCache(config=model.config, max_cache_len=cache.get_max_length())
    assert new_tokens(model, inputs, num_beams=3, num_return_sequences=2, cache=static) == expected


@pytest.mark.parametrize("draft", ["itself", "another"])
def test_assisted_decoding_rolls_our_cache_back(model: GPT, inputs: dict[str, torch.Tensor], draft: str) -> None:
    one = {name: value[1:2] for name, value in inputs.items()}
    assistant = model if draft == "itself" else random_gpt(vocab_size=50, seed=4)
    expected = new_tokens(model, one)
    assert new_tokens(model, one, assistant_model=assistant) == expected
    cache = KVCache(1, one["input_ids"].shape[1] + NEW, model)
    assert new_tokens(model, one, assistant_model=assistant, cache=cache) == expected
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}):
        assert new_tokens(model, one, **options) == expected
    static = StaticCache(config=model.config, max_cache_len=one["input_ids"].shape[1] + NEW)
    assert new_tokens(model, one, assistant_model=assistant, cache=static) == expected
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        new_tokens(model, inputs, assistant_model=assistant)


def test_a_cache_that_is_too_small_says_so(model: GPT, inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="holds 2 rows of 64 tokens, not 3 of 9"):
        new_tokens(model, inputs, cache=KVCache(2, 64, model))
    with pytest.raises(ValueError, match="holds 3 rows of 12 tokens, not 3 of 13"):
        new_tokens(model, inputs, cache=KVCache(3, 12, model))


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 5])], ids=["last", "last four", "chosen"])
def test_only_the_logits_that_are_asked_for_are_computed(model: GPT, keep: int | torch.Tensor) -> None:
    ids = torch.tensor([PROMPTS[1]])
    whole, part = model(ids).logits, model(ids, logits_to_keep=keep).logits
    torch.testing.assert_close(part, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep])


def test_our_cache_takes_a_prompt_in_pieces(model: GPT) -> None:
    cache, ids = KVCache(1, 16, model), torch.tensor([PROMPTS[1]])
    pieces = [model(ids[:, part], cache=cache).logits for part in (slice(0, 4), slice(4, 5), slice(5, 9))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_cache_has_its_old_name_too_with_a_warning(model: GPT) -> None:
    """transformers 5.24 calls past_key_values cache; what was written before still runs."""
    ids = torch.tensor([PROMPTS[1]])
    with pytest.warns(FutureWarning, match=r"`past_key_values` is deprecated .* `GPT.forward`. Use `cache`"):
        first = model(ids[:, :4], past_key_values=KVCache(1, 16, model))
    assert first.past_key_values is first["past_key_values"] is first.cache
    torch.testing.assert_close(model(ids[:, 4:], cache=first.cache).logits, model(ids).logits[:, 4:], atol=1e-5, rtol=0)
    expected = new_tokens(model, {"input_ids": ids})
    with pytest.warns(FutureWarning, match=r"`past_key_values` is deprecated .* `GPT.generate`. Use `cache`"):
        assert new_tokens(model, {"input_ids": ids}, past_key_values=KVCache(1, 9 + NEW, model)) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_gives_the_tokens_of_one_by_one(attention: str) -> None:
    model = random_gpt(vocab_size=50, seed=3)
    expected = [list(generate_naive(model, prompt, NEW)) for prompt in PROMPTS]
    model.set_attn_implementation(attention)
    model.generation_config.update(do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)  # else it takes most of the memory there is
    outputs = model.generate_batch(PROMPTS, max_new_tokens=NEW, continuous_batching_config=small)
    assert [output.generated_tokens for output in outputs.values()] == expected
