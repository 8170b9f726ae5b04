"""Chapter 4, continued: from one folder, our GPT and transformers' own NanoChatForCausalLM compute the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_04_model import random_gpt
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from edu.data.packing import IGNORE
from edu.model.gpt import GPT
from edu.model.masks import document_mask

B, T = 3, 40
IDS = torch.randint(0, 512, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(B, T, dtype=torch.long)
MASK[0, :7] = MASK[1, :1] = 0
PACKED = torch.cat((torch.arange(15), torch.arange(25)))[None].expand(B, -1)
INPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "left padding": {"attention_mask": MASK},
    "left padding, positions": {"attention_mask": MASK, "position_ids": (MASK.cumsum(-1) - 1).clamp(min=0)},
    "positions with gaps": {"position_ids": torch.arange(T)[None] * 3},  # a mere shift would change nothing
    # transformers looks for restarting positions only where there is no cache: without the flag, nothing is told apart.
    "packed": {"position_ids": PACKED, "use_cache": False},
}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} kv heads".format)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, PreTrainedModel]:
    """The same weights in both classes; 4 query heads."""
    folder = tmp_path_factory.mktemp("model")
    ours = random_gpt(num_key_value_heads=request.param)
    ours.save_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(stock).__name__ == "NanoChatForCausalLM"
    return ours, stock


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_gpt().save_pretrained(folder)
    return folder


def text_of(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The logits at the positions that are no padding."""
    return logits[inputs.get("attention_mask", torch.ones(B, T)).bool()]


def gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
def test_logits_loss_and_gradients_equal_stock(pair: tuple[GPT, PreTrainedModel], inputs: dict[str, Any]) -> None:
    ours, stock = pair
    assert ours.loss_type == stock.loss_type == "ForCausalLM", "transformers guesses it from the name of a class"
    labels = IDS.masked_fill(inputs.get("attention_mask", torch.ones(B, T)) == 0, -100)
    for options in ({}, {"num_items_in_batch": torch.tensor(50)}):
        found, expected = (model(IDS, labels=labels, **inputs, **options) for model in (ours, stock))
        torch.testing.assert_close(text_of(found.logits, inputs), text_of(expected.logits, inputs), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.loss, expected.loss)
        for a, b in zip(gradients(ours, found.loss), gradients(stock, expected.loss), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_larger_model_is_as_near_to_stock_as_stocks_own_attentions_are_to_each_other(tmp_path: Path) -> None:
    """Where 1e-5 says nothing: stock's eager and sdpa attention differ by rounding alone, and ours at most twice that."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    labels = IDS.clone()
    labels[:, :8] = -100  # what stands before the text predicts its first token anyhow
    random_gpt(**sizes, num_key_value_heads=3, vocab_size=512).save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    sdpa, eager = (AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=a) for a in ("sdpa", "eager"))

    def computed(model: PreTrainedModel, inputs: dict[str, Any]) -> list[Tensor]:
        found = model(IDS, labels=labels, **inputs)
        return [text_of(found.logits, inputs), torch.cat([g.flatten() for g in gradients(model, found.loss)])]

    for name, inputs in INPUTS.items():
        for a, b, c in zip(*(computed(model, inputs) for model in (sdpa, ours, eager)), strict=True):
            assert 0 < (a - b).abs().max() <= 2 * (a - c).abs().max(), name


def test_hidden_states_and_attention_weights_equal_stock(pair: tuple[GPT, PreTrainedModel]) -> None:
    for model in pair:
        model.set_attn_implementation("eager")
    ours, stock = (m(IDS, attention_mask=MASK, output_hidden_states=True, output_attentions=True) for m in pair)
    for model in pair:
        model.set_attn_implementation("sdpa")
    assert (len(ours.hidden_states), len(ours.attentions)) == (3, 2)
    for a, b in zip(ours.hidden_states + ours.attentions, stock.hidden_states + stock.attentions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_padding_and_packing_change_no_logit(pair: tuple[GPT, PreTrainedModel]) -> None:
    for model in pair:
        padded, packed = (model(IDS, **INPUTS[name]).logits for name in ("left padding", "packed"))
        torch.testing.assert_close(padded[0, 7:], model(IDS[:1, 7:]).logits[0], atol=1e-5, rtol=0)
        apart = torch.cat([model(IDS[:, part]).logits for part in (slice(0, 15), slice(15, T))], 1)
        torch.testing.assert_close(packed, apart, atol=1e-5, rtol=0)
        assert (model(IDS).logits - apart).abs().max() > 0.1


def test_bf16_is_as_near_to_fp32_as_stock(folder: Path) -> None:
    exact = GPT.from_pretrained(folder)
    models = [kind.from_pretrained(folder, dtype=torch.bfloat16) for kind in (GPT, AutoModelForCausalLM)]
    for inputs in INPUTS.values():
        right = text_of(exact(IDS, **inputs).logits, inputs)
        ours, stock = ((text_of(model(IDS, **inputs).logits, inputs) - right).abs() for model in models)
        assert 0 < ours.mean() < 1.1 * stock.mean()
        assert ours.max() < 2 * stock.max()


def test_what_stock_saves_we_load(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    ours, again = GPT.from_pretrained(folder), GPT.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, ours(IDS).logits)
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()


def test_loading_keeps_every_weight_and_starts_the_missing_ones_as_a_fresh_model(folder: Path, tmp_path: Path) -> None:
    """transformers loads onto meta, and asks for the initialisation of what the file has not."""
    weights = load_file(folder / "model.safetensors")
    missing = {"lm_head.weight", "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.fc2.weight"}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    kept = {name: weight for name, weight in weights.items() if name not in missing}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = GPT.from_pretrained(tmp_path).state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weight) for name, weight in kept.items())
    assert state["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.05)
    assert not any(state[name].any() for name in missing - {"lm_head.weight"})


def test_no_buffer_is_lost_on_loading(folder: Path) -> None:
    assert not list(GPT.from_pretrained(folder).buffers())
    angles = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    for name, buffer in AutoModelForCausalLM.from_pretrained(folder).named_buffers():
        torch.testing.assert_close(buffer, angles, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
@pytest.mark.parametrize("kind", [GPT, AutoModelForCausalLM])
@pytest.mark.parametrize("name", ["eager", "flex_attention"])
def test_attention_implementations_agree(kind: type, name: str, folder: Path) -> None:
    """Flex attention uncompiled: what inductor makes of it on a CPU is not to be trusted (see docs/ecosystem.md)."""
    sdpa = kind.from_pretrained(folder)
    other = kind.from_pretrained(folder, attn_implementation=name)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for inputs in INPUTS.values():
            found, expected = (text_of(model(IDS, **inputs).logits, inputs) for model in (other, sdpa))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            assert not torch.equal(found, expected), "the same kernel ran twice"
        if kind is GPT:
            found, expected = (model(IDS, targets=IDS, position_ids=PACKED) for model in (other, sdpa))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """What flash attention computes of what transformers gives it: (B, T, H, D), a mask of padding, positions."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    positions = options["position_ids"]
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    if mask is not None:
        allowed = allowed & mask[:, None, None].bool()
    elif len(positions) == 1 and len(positions[0]) == k.shape[2]:
        allowed = document_mask(positions)
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=options["softmax_scale"], enable_gqa=True)
    return y.transpose(1, 2)


@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_goes_through_transformers_interface(
    version: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package needs a GPU, so its kernel alone is a stand-in here; without it, transformers says what to install."""
    with pytest.raises(ImportError, match=f"FlashAttention{version}.*install"):
        GPT.from_pretrained(folder, attn_implementation=f"flash_attention_{version}")
    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", kernel)
    sdpa, flash = (GPT.from_pretrained(folder) for _ in range(2))
    flash.config._attn_implementation = f"flash_attention_{version}"
    for name, case in INPUTS.items():
        rows = slice(0, 1) if name == "packed" else slice(None)  # flash attention tells documents apart in one row only
        inputs = {key: x[rows] if isinstance(x, Tensor) else x for key, x in case.items()}
        found, expected = (model(IDS[rows], **inputs).logits for model in (flash, sdpa))
        mask = inputs.get("attention_mask", torch.ones(len(found), T)).bool()
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=0)
    prompt = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(flash.generate(**prompt), sdpa.generate(**prompt))
    with pytest.raises(ValueError, match=f"flash_attention_{version} would mix packed documents"):
        flash(IDS, targets=IDS, position_ids=PACKED)
    torch.testing.assert_close(flash(IDS, targets=IDS), sdpa(IDS, targets=IDS), atol=1e-5, rtol=0)


def test_what_targets_would_not_heed_is_refused(folder: Path) -> None:
    for other in ({"attention_mask": MASK}, {"labels": IDS}):
        with pytest.raises(ValueError, match="targets= goes with input_ids and position_ids alone"):
            GPT.from_pretrained(folder)(IDS, targets=IDS, **other)


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = random_gpt().train()
    before = gradients(model, model(IDS, labels=IDS, use_cache=False).loss)
    passes = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    model.activation_checkpointing_enable()
    for loss in (model(IDS, labels=IDS, use_cache=False).loss, -model(IDS, targets=IDS).sum()):
        gradients(model, loss)
    assert len(passes) == 4, "each layer runs again in the backward pass"
    after = gradients(model, model(IDS, labels=IDS, use_cache=False).loss)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of itself
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_forward_compiles_to_one_graph(backend: str) -> None:
    model = random_gpt(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    packed = {"targets": IDS.masked_fill(MASK == 0, IGNORE), "position_ids": PACKED}
    for inputs in (packed, packed | {"weights": MASK.float()}, {"use_cache": False}):
        found, expected = (run(IDS, **inputs) for run in (compiled, model))
        if "targets" not in inputs:
            found, expected = found.logits, expected.logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        for a, b in zip(gradients(model, found.sum()), gradients(model, expected.sum()), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
