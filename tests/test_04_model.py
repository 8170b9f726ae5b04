"""Chapter 4: the transformer, against its parts' laws; test_04_parity.py holds it to transformers' own nanochat."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import edu.model.gpt
from edu.data.packing import IGNORE
from edu.model.gpt import GPT, Block, GPTConfig, apply_rotary_emb, rotary_angles
from edu.model.loss import chunked_log_probs, head_log_probs, head_weighted_sum
from edu.model.masks import document_mask
from edu.training.optimizer import MuonAdamW, make_optimizer, orthogonalize


def random_gpt(seed: int = 0, **overrides: float) -> GPT:
    """A tiny GPT whose weights are all random: at its initialisation the logits are nearly zero, and prove nothing."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig.tiny(**overrides)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_gpt()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))


def test_block_keeps_the_shape() -> None:
    config = GPTConfig.tiny()
    x = torch.randn(2, 7, config.hidden_size)
    y = Block(config)(x, rotary_angles(torch.arange(7)[None], config))
    assert y.shape == x.shape


def test_fresh_weights_have_nanochats_statistics() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny(hidden_size=128, intermediate_size=512, vocab_size=1024))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std["model.embed_tokens.weight"] == pytest.approx(1.0, rel=0.02)
    assert std["lm_head.weight"] == pytest.approx(0.001, rel=0.02)
    assert std["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(128**-0.5, rel=0.02)
    assert std["model.layers.1.mlp.fc1.weight"] == pytest.approx(128**-0.5, rel=0.02)
    assert std["model.layers.0.self_attn.o_proj.weight"] == std["model.layers.1.mlp.fc2.weight"] == 0


def test_no_query_sees_what_comes_later(model: GPT, ids: torch.Tensor) -> None:
    changed = ids.clone()
    changed[:, 20:] = (ids[:, 20:] + 1) % 512
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 0.1


def test_rotary_scores_depend_on_distance_alone() -> None:
    config = GPTConfig.tiny()
    q, k = torch.randn(2, 1, 1, 1, config.head_dim, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> float:
        at = [rotary_angles(torch.tensor([[position]]), config) for position in (query_at, key_at)]
        return float((apply_rotary_emb(q, *at[0]) * apply_rotary_emb(k, *at[1])).sum())

    assert score(10, 3) == pytest.approx(score(107, 100), abs=1e-4)
    assert abs(score(10, 3) - score(10, 4)) > 1e-3


def test_grouped_heads_equal_repeated_ones() -> None:
    grouped, full = random_gpt(), random_gpt(num_key_value_heads=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = weight.view(2, 16, -1).repeat_interleave(2, 0).reshape(64, -1)
    full.load_state_dict(state)
    x = torch.randint(0, 512, (1, 30))
    torch.testing.assert_close(grouped(x).logits, full(x).logits, atol=1e-5, rtol=1e-5)


def test_what_is_saved_is_what_is_loaded(model: GPT, tmp_path: Path, ids: torch.Tensor) -> None:
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_log_probs_equal_those_of_the_logits_in_value_and_gradient(model: GPT, ids: torch.Tensor) -> None:
    targets = ids.roll(-1, 1)
    targets[0, :9] = IGNORE
    weights = torch.randn(ids.shape) * (targets != IGNORE)
    weights[1, :5] = 0.0
    found = model(ids, targets=targets)
    logits = model(ids).logits
    expected = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != IGNORE)
    torch.testing.assert_close(found, expected)
    assert found[0, :9].abs().max() == 0
    total, parameters = model(ids, targets=targets, weights=weights), list(model.parameters())
    torch.testing.assert_close(total, (weights * expected).sum(), atol=1e-5, rtol=1e-6)
    reference = torch.autograd.grad(-3 * (weights * expected).sum(), parameters)
    for loss in (-3 * total, -3 * (weights * found).sum()):
        for a, b in zip(torch.autograd.grad(loss, parameters), reference, strict=True):
            torch.testing.assert_close(a, b, atol=6e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Notes the most elements that a result of an operation had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("cap", [15.0, None])
def test_the_logits_of_a_batch_are_never_held_whole(monkeypatch: pytest.MonkeyPatch, cap: float | None) -> None:
    monkeypatch.setattr("edu.model.loss.chunked_log_probs", chunked_log_probs._init_fn)  # its body, which is watched
    hidden, weight = torch.randn(3, 10, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, weights = torch.randint(0, 50, (3, 10)), torch.randn(3, 10)

    def passes() -> tuple[int, list[torch.Tensor]]:
        """The largest tensor of forward and backward of both ways, and what they give."""
        with Largest() as largest:
            total = head_weighted_sum(hidden, weight, targets, weights, cap)
            each = head_log_probs(hidden, weight, targets, cap)
            found = [torch.autograd.grad(loss, [hidden, weight]) for loss in (total, (weights * each).sum())]
        return largest.elements, [total, each, *found[0], *found[1]]

    (everything, whole), _ = passes(), monkeypatch.setattr("edu.model.loss.CPU_CHUNK", 7)
    most, parts = passes()
    assert (everything, most) == (30 * 50, 50 * 8)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of itself
@pytest.mark.parametrize("weighted", [True, False])
def test_a_compiled_head_does_not_grow_with_the_number_of_its_chunks(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = torch.randn(2, 64, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets, weights = torch.randint(0, 20, (2, 64)), torch.rand(2, 64)
    sizes = list[int]()

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        sizes.append(sum(len(module.graph.nodes) for module in modules))
        return graph.forward

    def head() -> torch.Tensor:
        if weighted:
            return head_weighted_sum(hidden, weight, targets, weights, 15.0)
        return head_log_probs(hidden, weight, targets, 15.0).mul(weights).sum()

    expected = torch.autograd.grad(head(), [hidden, weight])
    for rows in (128, 2):
        monkeypatch.setattr("edu.model.loss.CPU_CHUNK", rows)
        torch.compiler.reset()
        found = torch.autograd.grad(torch.compile(head, fullgraph=True, backend=count)(), [hidden, weight])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sizes[0] == sizes[1], "64 chunks give the graph of one"


def test_no_target_costs_nothing() -> None:
    hidden, weight = torch.randn(3, 10, 8, requires_grad=True), torch.randn(20, 8)
    nothing = torch.full((3, 10), IGNORE)
    for loss in (
        head_log_probs(hidden, weight, nothing, 15.0).sum(),
        head_weighted_sum(hidden, weight, nothing, torch.zeros(3, 10), 15.0),
    ):
        (gradient,) = torch.autograd.grad(loss, [hidden])
        assert loss == 0
        assert gradient.abs().max() == 0


def test_packed_documents_do_not_see_each_other(model: GPT, ids: torch.Tensor) -> None:
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None].expand(2, -1)
    targets = ids.roll(-1, 1)
    packed = model(ids, targets=targets, position_ids=positions)
    apart = torch.cat([model(ids[:, s], targets=targets[:, s]) for s in (slice(0, 15), slice(15, 40))], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)
    assert (model(ids, targets=targets) - apart)[:, 15:].abs().max() > 1e-2


def test_long_rows_attend_in_quarters_to_the_same(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 512, (2, 259))
    positions = torch.stack((torch.arange(259), torch.cat((torch.arange(130), torch.arange(129)))))
    attend, calls = edu.model.gpt.attend_in_quarters, []

    def whole(attend: Any, *args: Any) -> Any:
        calls.append(1)
        return attend(*args)

    parts = model(ids, targets=ids, position_ids=positions)
    monkeypatch.setattr(edu.model.gpt, "attend_in_quarters", whole)
    torch.testing.assert_close(parts, model(ids, targets=ids, position_ids=positions), atol=1e-5, rtol=1e-5)
    assert len(calls) == model.config.num_hidden_layers
    q, mask = torch.randn(2, 2, 259, 8), torch.ones(2, 1, 259, 259, dtype=torch.bool).tril()
    sizes: list[int] = []

    def noted(q: torch.Tensor, k: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        sizes.append(q.shape[2] * k.shape[2])
        return q.transpose(1, 2), None

    torch.testing.assert_close(attend(noted, q, q, q, mask)[0], q.transpose(1, 2))
    assert sum(sizes) < 0.63 * 259**2


def test_document_mask_by_hand() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_branch_sees_itself_and_what_was_before_it_in_its_document() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, 2, 1, 2, 1, 0, 1]]))[0, 0].int().tolist()
    assert mask[3] == [0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert mask[5] == [0, 1, 0, 0, 1, 1, 0, 0, 0]
    assert mask[6] == [0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert mask[8] == [0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_odd_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="num_attention_heads=3"):
        GPTConfig.tiny(num_attention_heads=3)
    with pytest.raises(ValueError, match="rope_type"):
        GPTConfig.tiny(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
def test_muon_steps_as_torchs_own(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    ours = MuonAdamW([{"kind": "muon", "lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "params": [a]}])
    theirs = torch.optim.Muon([b], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    for _ in range(3):
        a.grad = torch.randn(shape)
        b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    # Torch iterates in bf16, ours in fp32: the updates agree to bf16's rounding.
    assert (a - b).norm() / (a - 1).norm() < 0.02


@pytest.mark.parametrize("shape", [(2, 256, 512), (1, 512, 256)])
def test_orthogonalization_is_the_same_by_the_faster_product(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape)
    expected = orthogonalize(matrices.double())  # in fp64 by torch's own
    torch.testing.assert_close(orthogonalize(matrices).double(), expected, atol=1e-5, rtol=0)


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 40, 20)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_every_parameter_has_one_group_and_steps() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.tiny())
    optimizer = make_optimizer(model, matrix_lr=0.02, embedding_lr=0.2, head_lr=0.004, weight_decay=0.0)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_muon_refuses_flattened_parameters() -> None:
    with pytest.raises(ValueError, match="Muon needs matrices"):
        MuonAdamW([{"kind": "muon", "lr": 0.02, "params": [torch.nn.Parameter(torch.ones(8))]}])
