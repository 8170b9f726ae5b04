"""The laws of chapter 4, and the mistakes that they must name."""

from typing import Any

import torch
from torch import Tensor

from course.grading import Mutant

TITLE = "the transformer block"
PROVIDES = ("Config", "rms_norm", "rotary_angles", "apply_rotary_emb", "CausalSelfAttention", "MLP", "Block")


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _block(m: Any, **sizes: int) -> Any:
    """A block whose weights are all drawn here, so that no way of initializing them matters."""
    block = m.Block(m.Config(**sizes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, weight in sorted(block.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    return block


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def law_shape(m: Any) -> None:
    """(B, T, C) in, the same shape out, without further arguments."""
    x = _random(2, 9, 64)
    y = _block(m)(x)
    assert y.shape == x.shape, f"{tuple(x.shape)} went in, {tuple(y.shape)} came out"


def law_names(m: Any) -> None:
    """The weights have the names and shapes of transformers' nanochat, so that a checkpoint opens there."""
    found = {name: tuple(weight.shape) for name, weight in _block(m).named_parameters()}
    expected = {f"self_attn.{name}.weight": (64, 64) for name in ("q_proj", "o_proj")}
    expected |= {f"self_attn.{name}.weight": (32, 64) for name in ("k_proj", "v_proj")}
    expected |= {"mlp.fc1.weight": (256, 64), "mlp.fc2.weight": (64, 256)}
    missing, more = expected.items() - found.items(), found.items() - expected.items()
    assert not missing, f"expected but not found: {sorted(missing)}; found instead: {sorted(more)}"
    assert not more, f"weights that nobody expects: {sorted(more)} (norms have none, linear layers have no bias)"


def law_causal(m: Any) -> None:
    """No position sees a later one, and every position sees itself."""
    block, x = _block(m), _random(2, 9, 64)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = block(x), block(changed)
    seen = _difference(before[:, :5], after[:, :5])
    assert seen < 1e-5, f"a change at positions 5 to 8 moved the outputs at 0 to 4 by {seen:.3f}: who may see whom?"
    # Position 0 alone: were its own key hidden, no key would be left and the weights would not be numbers.
    assert torch.isfinite(before).all(), "some outputs are not finite: does every query see at least one key, its own?"
    own = x.clone()
    own[:, 0] += 1
    last = _block(m)
    with torch.no_grad():
        last.mlp.fc2.weight.zero_()
    inside = last(own)[:, 0] - own[:, 0] - (last(x)[:, 0] - x[:, 0])
    assert inside.abs().max() > 1e-3, (
        "the attention at position 0 does not react to its own input: is the diagonal hidden?"
    )


def law_norm(m: Any) -> None:
    """The norm gives unit mean square in the last dimension, and divides by the root, not by the square."""
    for scale in (0.1, 1.0, 30.0):
        y = m.rms_norm(_random(3, 5, 16) * scale)
        mean = float(y.square().mean(-1).sub(1).abs().max())
        assert mean < 1e-3, f"inputs of size {scale}: the mean square is {mean:.3f} away from 1"
    x = _random(1, 4) + 5
    assert _difference(m.rms_norm(x) / x, (m.rms_norm(x) / x)[:, :1]) < 1e-4, (
        "the mean is subtracted: RMS norm only scales"
    )


def law_frequencies(m: Any) -> None:
    """The angles run from 1 radian a position down to theta^(-(D-2)/D)."""
    cos, sin = m.rotary_angles(torch.tensor([1]), 16, 10_000.0)
    angles = torch.atan2(sin, cos).flatten()
    assert angles.numel() == 8, f"D = 16 means 8 pairs, and 8 angles; there are {angles.numel()}"
    expected = 10_000.0 ** -(torch.arange(8) / 8)
    worst = int((angles / expected).log().abs().argmax())
    assert torch.allclose(angles, expected, rtol=1e-3), (
        f"pair {worst} turns by {float(angles[worst]):.6f} a position, expected {float(expected[worst]):.6f}"
    )


def law_rotation(m: Any) -> None:
    """A rotation keeps lengths, and pairs channel i with i + D/2, by minus the angle."""
    x = _random(1, 1, 5, 16)
    y = m.apply_rotary_emb(x, *m.rotary_angles(torch.arange(5), 16, 10_000.0))
    assert torch.allclose(x.norm(dim=-1), y.norm(dim=-1), atol=1e-4), (
        "the length of a vector changed: a rotation adds one product of a sine and subtracts the other"
    )
    unit = torch.zeros(1, 1, 2, 16)
    unit[..., 0] = 1
    turned = m.apply_rotary_emb(unit, *m.rotary_angles(torch.arange(2), 16, 10_000.0))[0, 0, 1]
    where = [i for i in range(16) if abs(float(turned[i])) > 1e-4]
    assert where == [0, 8], f"channel 0 was turned into channels {where}, expected 0 and 8: the pairs are (i, i + D/2)"
    assert float(turned[8]) < 0, (
        "channel 0 turned into +8 instead of -8: stock transformers would read your checkpoint backward"
    )


def law_distance(m: Any) -> None:
    """A score depends on the distance of query and key alone."""
    q, k = _random(2, 1, 1, 1, 16, seed=2)

    def score(i: int, j: int) -> float:
        at = [m.rotary_angles(torch.tensor([position]), 16, 10_000.0) for position in (i, j)]
        return float((m.apply_rotary_emb(q, *at[0]) * m.apply_rotary_emb(k, *at[1])).sum())

    near, far = score(10, 3), score(107, 100)
    assert abs(near - far) < 1e-2, f"q.k at positions (10, 3) is {near:.4f}, at (107, 100) {far:.4f}: only 7 may matter"
    assert abs(near - score(10, 4)) > 1e-3, "q.k does not change with the distance: is anything rotated?"


def law_distance_in_the_block(m: Any) -> None:
    """The whole block gives the same outputs for the same tokens 100 positions later."""
    block, x = _block(m), _random(2, 9, 64)
    here, later = block(x), block(x, positions=torch.arange(100, 109))
    apart = _difference(here, later)
    assert apart < 1e-3, (
        f"outputs {apart:.3f} apart: queries and keys must turn in the same direction, by the positions that were given"
    )
    mixed = block(x, positions=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 4, 6, 8, 10, 12, 14, 16]]))
    assert _difference(here[:1], mixed[:1]) < 1e-3, (
        "row 0 changed with the positions of row 1: positions are by row, (B, T)"
    )
    assert _difference(here[1], mixed[1]) > 1e-3, (
        "row 1 with other distances gives the same outputs: are positions used?"
    )


def law_mask(m: Any) -> None:
    """A mask that is given replaces the causal one: two packed documents do not see each other."""
    block, x = _block(m), _random(1, 8, 64)
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    mask = (document[:, None] == document[None]).tril()[None, None]  # (1, 1, T, T)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed = block(x, positions=positions, mask=mask)
    alone = torch.cat((block(x[:, :3]), block(x[:, 3:])), dim=1)
    apart = _difference(packed, alone)
    assert apart < 1e-4, (
        f"two documents in one row and each alone differ by {apart:.3f}: the mask is True where one may look"
    )


def law_qk_norm(m: Any) -> None:
    """Queries and keys have unit mean square, so the scale of their matrices does not matter."""
    block, scaled, x = _block(m), _block(m), _random(2, 9, 64)
    for name in ("q_proj", "k_proj"):
        with torch.no_grad():
            getattr(scaled.self_attn, name).weight.mul_(10)
        apart = _difference(block(x), scaled(x))
        assert apart < 1e-2, f"{name}.weight times 10 changed the output by {apart:.3f}: with QK norm it does not"


def law_scale(m: Any) -> None:
    """Scores are divided by the root of D."""
    attention = m.CausalSelfAttention(m.Config(hidden_size=16, num_attention_heads=1, num_key_value_heads=1)).eval()
    with torch.no_grad():
        for weight in attention.parameters():
            weight.copy_(torch.eye(16))
    x = torch.zeros(1, 2, 16)
    x[0, :, :8] = torch.tensor(
        [[1.0] * 8, [-1.0] * 8]
    )  # after the norms, q.k = 16 with itself and near -16 with the other
    y = attention(x, positions=torch.zeros(1, 2, dtype=torch.long))
    share = float((y[0, 1, 0].detach() + 1) / 2)  # weight of position 0 in the mean of +1 and -1
    expected = float(torch.tensor([-4.0, 4.0]).softmax(0)[0])
    assert abs(share - expected) < 1e-4, f"a weight of {share:.6f} instead of {expected:.6f}: scores are q.k / sqrt(D)"


def law_grouped_heads(m: Any) -> None:
    """Two shared key heads equal the same two written out as four."""
    shared, full, x = _block(m), _block(m, num_key_value_heads=4), _random(2, 9, 64)
    state = shared.state_dict()
    for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        state[name] = state[name].view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64)
    full.load_state_dict(state)
    apart = _difference(shared(x), full(x))
    assert apart < 1e-4, f"{apart:.3f} apart: query heads 0 and 1 share key head 0, heads 2 and 3 share key head 1"


def law_relu_squared(m: Any) -> None:
    """The MLP squares its relu."""
    mlp, x = _block(m).mlp, _random(2, 9, 64)
    assert _difference(mlp(2 * x), 4 * mlp(x)) < 1e-2, (
        "a doubled input must quadruple the output of fc2(relu(fc1(x))^2)"
    )
    with torch.no_grad():
        mlp.fc1.weight.copy_(-mlp.fc1.weight.abs())
    assert _difference(mlp(x.abs()), torch.zeros_like(x)) < 1e-6, "where fc1(x) is negative, relu gives 0"


def law_residual(m: Any) -> None:
    """With output matrices of zero a block changes nothing."""
    block, x = _block(m), _random(2, 9, 64)
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.fc2.weight.zero_()
    assert torch.equal(block(x), x), "the input itself must be added to what attention and MLP give"


def law_prenorm(m: Any) -> None:
    """Attention and MLP each read a normed input, so a larger input changes them little."""
    block, x = _block(m), _random(2, 9, 64)
    for first, second in (("mlp.fc2", "attention"), ("self_attn.o_proj", "MLP")):
        part = _block(m)
        with torch.no_grad():
            part.get_submodule(first).weight.zero_()
        grown = part(1000 * x) - 1000 * x, part(x) - x
        apart = _difference(*grown) / float(grown[1].detach().abs().max())
        assert apart < 0.05, f"the {second} of 1000 x differs from that of x by {apart:.0%}: is its input normed?"
    assert torch.isfinite(block(x)).all()


MUTANTS = [
    Mutant("no causal mask", ".tril()", "", "causal"),
    Mutant("sees one position ahead", ".tril()", ".tril(1)", "causal"),
    Mutant("keys turned the other way", "k = rms_norm(apply_rotary_emb(k, cos, sin)", "k = rms_norm(apply_rotary_emb(k, cos, -sin)", "distance_in_the_block"),
    Mutant("positions ignored", "positions = torch.arange(T, device=x.device) if positions is None else positions", "positions = torch.arange(T, device=x.device)", "distance_in_the_block"),
    Mutant("one sine of the wrong sign", "second * cos - first * sin", "second * cos + first * sin", "rotation"),
    Mutant("both sines of the wrong sign", "first * cos + second * sin, second * cos - first * sin", "first * cos - second * sin, second * cos + first * sin", "rotation"),
    Mutant("frequencies squared", "/ head_dim)  # (D/2,)", "/ head_dim * 2)  # (D/2,)", "frequencies"),
    Mutant("no QK norm on keys", "k = rms_norm(apply_rotary_emb(k, cos, sin), config.rms_norm_eps)", "k = apply_rotary_emb(k, cos, sin)", "qk_norm"),
    Mutant("scores not scaled", " * D**-0.5", "", "scale"),
    Mutant("heads repeated in turns", "k = k.repeat_interleave(groups, dim=1)", "k = k.repeat(1, groups, 1, 1)", "grouped_heads"),
    Mutant("plain relu", ".relu().square()", ".relu()", "relu_squared"),
    Mutant("square without relu", ".relu().square()", ".square()", "relu_squared"),
    Mutant("residual forgotten", "return x + self.mlp(rms_norm(x, self.eps))", "return self.mlp(rms_norm(x, self.eps))", "residual"),
    Mutant("MLP without its norm", "self.mlp(rms_norm(x, self.eps))", "self.mlp(x)", "prenorm"),
    Mutant("mask ignored", "if mask is None:", "if True:", "mask"),
    Mutant("layer norm", "return x * torch.rsqrt", "x = x - x.mean(-1, keepdim=True)\n    return x * torch.rsqrt", "norm"),
]  # fmt: skip
