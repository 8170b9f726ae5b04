"""Laws of the import from nanochat: same logits, same ids, nothing executed, nothing dropped in silence."""

import json
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from edu.chat.chat_format import render, render_prompt
from edu.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from edu.hub.nanochat import import_nanochat, read_encoding, read_tokenizer
from edu.model.load import load_model, load_tokenizer
from tests.test_tokenizer import HARD

ROOT = Path(__file__).parent.parent
# The split that nanochat trains its vocabularies with.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SIZES = {"sequence_len": 64, "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
PADDED = 320  # rows of the embedding and the head: nanochat pads them to a multiple of 64


def encoding() -> tiktoken.Encoding:
    """A vocabulary of 300 of nanochat's form: bytes, merges, nine special tokens."""
    words = [
        "th",
        "the",
        " the",
        "in",
        "er",
        "12",
        "42",
        "  ",
        "'s",
        "ll",
        "'ll",
        "é",
        "\n\n",
        " a",
        "an",
        "and",
        " and",
    ]
    words += [
        "ab",
        "abc",
        "cd",
        "xx",
        "xxxx",
        "on",
        "re",
        "he",
        "hello",
        "llo",
        "is",
        "it",
        " is",
        "ou",
        "you",
        " W",
        "!!",
        "99",
    ]
    ranks = {bytes([byte]): byte for byte in range(256)} | {word.encode(): 256 + i for i, word in enumerate(words)}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS[:-1])}
    return tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under nanochat's names, the embedding in bf16 as it keeps it, and larger than trained ones are."""
    g = torch.Generator().manual_seed(seed)
    C, D = SIZES["n_embd"], SIZES["n_embd"] // SIZES["n_head"]
    shapes = {"transformer.wte": (PADDED, C), "lm_head": (PADDED, C)}
    for i in range(SIZES["n_layer"]):
        shapes |= {
            f"transformer.h.{i}.attn.c_{x}": (D * SIZES["n_kv_head" if x in "kv" else "n_head"], C) for x in "qkv"
        }
        shapes |= {f"transformer.h.{i}.attn.c_proj": (C, C)}
        shapes |= {f"transformer.h.{i}.mlp.c_fc": (4 * C, C), f"transformer.h.{i}.mlp.c_proj": (C, 4 * C)}
    tensors = {f"{name}.weight": 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return tensors | {"transformer.wte.weight": tensors["transformer.wte.weight"].bfloat16()}


def nanochat_logits(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """nanochat's forward pass of 2025, written from its description: (B, T) -> (B, T, vocab_size), fp32."""
    w = {name.removesuffix(".weight"): tensor.float() for name, tensor in w.items()}
    (B, T), H, K, D = ids.shape, SIZES["n_head"], SIZES["n_kv_head"], SIZES["n_embd"] // SIZES["n_head"]

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],))

    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)

    def rotate(x: Tensor) -> Tensor:  # (B, heads, T, D), by minus the angle
        a, b = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), -1)

    x = norm(w["transformer.wte"][ids])
    for i in range(SIZES["n_layer"]):
        h, y = f"transformer.h.{i}", norm(x)
        q, k, v = ((y @ w[f"{h}.attn.c_{name}"].T).view(B, T, -1, D).transpose(1, 2) for name in "qkv")
        q, k, v = norm(rotate(q)), norm(rotate(k)).repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        scores = (q @ k.transpose(2, 3) / D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1) @ w[f"{h}.attn.c_proj"].T
        x = x + F.relu(norm(x) @ w[f"{h}.mlp.c_fc"].T).square() @ w[f"{h}.mlp.c_proj"].T
    logits = (norm(x) @ w["lm_head"].T)[..., : SIZES["vocab_size"]]
    return 15 * torch.tanh(logits / 15)


def write(folder: Path, w: dict[str, Any], step: int = 650, **settings: Any) -> Path:
    """nanochat's files, all in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(w, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": SIZES | settings}))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
    return folder


def script(monkeypatch: pytest.MonkeyPatch, name: str, *args: str, code: int = 0) -> None:
    """Run a script in this process."""
    monkeypatch.setattr(sys, "argv", [name, *args])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    assert end.value.code == code


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nanochat")
    write(root / "d2", weights(1), step=40)
    write(root / "d2", {f"_orig_mod.{name}": tensor for name, tensor in weights().items()}, step=650)
    return import_nanochat(root / "d2", root / "out")


def test_logits_are_those_of_nanochat_here_and_in_stock_transformers(imported: Path) -> None:
    ids = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = nanochat_logits(weights(), ids)
    assert expected.std() > 1
    for model in (load_model(str(imported)), AutoModelForCausalLM.from_pretrained(imported)):
        with torch.no_grad():
            logits = model.eval()(ids).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_ids_are_those_of_nanochat_here_and_in_stock_transformers(imported: Path) -> None:
    ours, auto, theirs = load_tokenizer(str(imported)), AutoTokenizer.from_pretrained(imported), encoding()
    for text in (*HARD[:-1], "hello the 12345 abcd it's IT'LL and!!", "\u212aelvin ſ 'ſ 'T"):
        expected = theirs.encode_ordinary(text)
        assert ours.encode(text) == expected
        assert auto.encode(text, add_special_tokens=False, split_special_tokens=True) == expected
        assert ours.decode(expected) == text
    assert len(auto) == ours.vocab_size == theirs.n_vocab == 300
    assert ours.special == {name: theirs.encode_single_token(name) for name in SPECIAL_TOKENS[:-1]}
    assert ours.pad == ours.assistant_end == auto.pad_token_id == auto.eos_token_id
    assert ours.decode(ours.encode(" " * 1_000_000)) == " " * 1_000_000


def test_the_folder_chats_in_stock_transformers(imported: Path) -> None:
    messages = [{"role": "system", "content": "Be it."}, {"role": "user", "content": "hello"}]
    auto, tokenizer = AutoTokenizer.from_pretrained(imported), load_tokenizer(str(imported))
    whole = [*messages, {"role": "assistant", "content": "the 42"}]
    out = auto.apply_chat_template(whole, return_dict=True, return_assistant_tokens_mask=True)
    rendered = render(whole, tokenizer)
    assert (out["input_ids"], out["assistant_masks"]) == (rendered.ids, rendered.mask)
    prompt = render_prompt(messages, tokenizer)
    assert auto.parse_response(rendered.ids[len(prompt) :], prefix=prompt)["content"] == "the 42"
    chat = pipeline("text-generation", model=str(imported))
    assert chat.model.generation_config.eos_token_id == [tokenizer.assistant_end, tokenizer.bos]
    answer: Any = chat(messages, max_new_tokens=8, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    assert "nanochat d2" in (imported / "README.md").read_text()


def test_the_folder_chats_in_our_script_and_saves_again(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script(monkeypatch, "chat.py", "--model", str(imported), "-p", "hello", "--max-new-tokens", "4")
    assert capsys.readouterr().err == ""
    tokenizer = load_tokenizer(str(imported))
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.ranks, again.special, again.pad) == (tokenizer.ranks, tokenizer.special, tokenizer.pad)


def test_bf16_weights_stay_bf16(tmp_path: Path) -> None:
    write(tmp_path / "d2", {name: tensor.bfloat16() for name, tensor in weights().items()})
    model = load_model(str(import_nanochat(tmp_path / "d2", tmp_path / "out")))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, weights()["lm_head.weight"][:300].bfloat16())


def test_the_script_imports_a_step_with_the_tokenizer_from_nanochats_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "chatsft_checkpoints" / "d2", weights(1), step=40)
    write(folder, weights(2), step=650)
    (tmp_path / "tokenizer").mkdir()
    (folder / "tokenizer.pkl").rename(tmp_path / "tokenizer" / "tokenizer.pkl")
    args = ("import_nanochat.py", "--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--step", "40")
    script(monkeypatch, *args)
    assert f"chat.py --model {tmp_path / 'out'}" in capsys.readouterr().out
    script(monkeypatch, *args, code=2)
    assert capsys.readouterr().err == f"error: --out {tmp_path / 'out'}: is not empty; give a new folder\n"
    model = load_model(str(tmp_path / "out"))
    assert torch.equal(model.lm_head.weight, weights(1)["lm_head.weight"][:300])
    with pytest.raises(ValueError, match=r"--step 41: .*d2 has steps 40, 650"):
        import_nanochat(folder, tmp_path / "new", step=41)


NEWER = [
    ("resid_lambdas", (2,)),
    ("value_embeds.1.weight", (320, 16)),
    ("transformer.h.1.attn.ve_gate.weight", (2, 32)),
    ("smear_gate.weight", (1, 24)),
]


@pytest.mark.parametrize(("name", "shape"), NEWER, ids=[name for name, _ in NEWER])
def test_a_newer_nanochat_is_refused_by_the_tensors_name(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    write(tmp_path, weights() | {name: torch.ones(shape)}, window_pattern="SSSL")
    with pytest.raises(
        ValueError, match=rf"model_000650.pt: tensors {name.replace('.1.', '.N.')}: of a newer nanochat"
    ):
        import_nanochat(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_nanochat(folder, folder / "out")
    assert not (folder / "out").exists()


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    refused(tmp_path, r"no model_\*\.pt here")
    write(tmp_path, weights(), window_pattern="SSSL")
    refused(tmp_path, r"meta_000650.json: window_pattern in `model_config`: of a newer nanochat")
    write(tmp_path, weights(), n_layer=3)
    refused(tmp_path, r"6 tensors are not of .*: model.layers.2.self_attn.q_proj.weight is None, expected \[32, 32\]")
    write(tmp_path, weights(), vocab_size=301)
    refused(tmp_path, "a model of 301 tokens, a tokenizer of 300")
    meta = tmp_path / "meta_000650.json"
    for text in ("{", "[]", '{"model_config": {"n_layer": 2}}', '{"model_config": 3}'):
        meta.write_text(text)
        refused(tmp_path, "meta_000650.json: expected `model_config` with sequence_len")
    meta.unlink()
    refused(tmp_path, "meta_000650.json: no such file")
    write(tmp_path, weights())
    (tmp_path / "tokenizer.pkl").unlink()
    refused(tmp_path, "no tokenizer at .*tokenizer.pkl with --tokenizer")


class Bomb:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    spot = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(spot)))
    spot.unlink()  # it works, where it is unpickled
    write(tmp_path, weights() | {"lm_head.weight": Bomb(spot)})
    refused(tmp_path, "model_000650.pt: not weights that torch reads without running code")
    write(tmp_path, weights())
    good = encoding()
    state = {"name": "x", "pat_str": PATTERN, "mergeable_ranks": {}, "special_tokens": {}}
    for attack in (Bomb(spot), {**state, "pat_str": Bomb(spot)}, [good, Bomb(spot)], tiktoken.Encoding, state):
        for protocol in range(6):
            (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(attack, protocol))
            refused(tmp_path, r"tokenizer.pkl: not the tokenizer that nanochat saves: .*(names|instruction|ends)")
    assert not spot.exists()


def test_every_damaged_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, weights())
    path, good = tmp_path / "tokenizer.pkl", pickle.dumps(encoding())
    assert read_encoding(good).keys() == {"name", "pat_str", "mergeable_ranks", "special_tokens"}
    for size in [0, 1, 30, *range(60, len(good) - 2, 97), len(good) - 2]:
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="not the tokenizer that nanochat saves"):
            read_tokenizer(path)
    for old, new in ((b"<|bos|>", b"<|boz|>"), (b"pat_str", b"pat_stx"), (b"tiktoken.core", b"tiktoken.cord")):
        path.write_bytes(good.replace(old, new))
        with pytest.raises(ValueError, match="not the tokenizer that nanochat saves"):
            read_tokenizer(path)
    path.write_bytes(good)
    model = tmp_path / "model_000650.pt"
    whole = model.read_bytes()
    for damaged in (b"", b"PK", whole[: len(whole) // 2], b"\x80\x04." + whole):
        model.write_bytes(damaged)
        refused(tmp_path, "model_000650.pt: not weights")
    for no_model in (weights()["lm_head.weight"], {}, {"transformer.wte.weight": 3}):
        torch.save(no_model, model)
        refused(tmp_path, "expected a dict of tensors")
