"""Muon for the matrices of the blocks, AdamW for the embedding and the head, in one optimizer; and the schedule.

Muon replaces the momentum of a matrix by the nearest orthogonal one, so that every direction learns at the same speed
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). All matrices of one shape are iterated as one batch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from edu.model.gpt import GPT
from edu.model.linear import product

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024): steep at 0, close to 1 on [0.7, 1.2]."""


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, approximately: (..., R, C) -> (..., R, C), singular values in about [0.7, 1.2].

    fp32 on a CPU, where bf16 products are slow; bf16 on an accelerator, where the iteration tolerates it.
    """
    a, b, c = NEWTON_SCHULZ
    X = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = product(X, X)  # symmetric
        X = a * X + product(b * A + c * product(A, A), X.mT)
    return (X.mT if tall else X).to(matrices.dtype)


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def whole(x: Tensor) -> Tensor:
    """A tensor sharded by FSDP2, gathered: all processes must call this together. Any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def sharded_as(x: Tensor, p: Tensor) -> Tensor:
    """This process's share of a whole tensor that belongs to `p`, where `p` is sharded; else `x` as it is."""
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class MuonAdamW(torch.optim.Optimizer):
    """Groups say their `kind`: "muon" (lr, momentum, weight_decay) or "adamw" (lr, betas, eps, weight_decay).

    Each group keeps its own `base_lr`; `set_lr` scales them all by the schedule's factor. Parameters may be sharded by
    FSDP2: the state is sharded as they are, and whole in `state_dict`, which is one for any number of processes.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group["base_lr"] = group["lr"]
            for p in group["params"]:
                if group["kind"] == "muon" and p.ndim != 2:
                    raise ValueError(
                        f"Muon needs matrices, got {tuple(p.shape)}: a sharding that flattens (ZeRO) needs AdamW"
                    )
        super().__init__(groups, {})

    def set_lr(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its base."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def state_dict(self) -> dict[str, Any]:
        """As torch's, sharded tensors gathered on the CPU: all processes must call this together."""
        found = super().state_dict()
        state = {
            i: {name: whole(x).cpu() if isinstance(x, DTensor) else x for name, x in values.items()}
            for i, values in found["state"].items()
        }
        return found | {"state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; of whole tensors each process takes its shard."""
        params = [p for group in self.param_groups for p in group["params"]]
        state = {
            i: {name: sharded_as(x, params[i]) if x.shape == params[i].shape else x for name, x in values.items()}
            for i, values in state_dict["state"].items()
        }
        super().load_state_dict(state_dict | {"state": state})

    def allocate(self) -> None:
        """Make the state of every parameter that has none, so that memory runs out before the first update, not in it."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if not self.state[p]):
                if group["kind"] == "muon":
                    self.state[p]["momentum"] = torch.zeros_like(p)
                else:
                    device = p.device if p.device.type != "cpu" else None
                    self.state[p] |= {"step": torch.zeros((), device=device)}
                    self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        self.allocate()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["kind"] == "muon" else self._adamw)(group, params)

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        for (rows, columns), same in by_shape.items():
            moments = [self.state[p]["momentum"] for p in same]
            grads = [_grad(p) for p in same]
            for moment, grad in zip(moments, grads, strict=True):
                moment.lerp_(grad, 1 - group["momentum"])
            nesterov = [grad.lerp(moment, group["momentum"]) for grad, moment in zip(grads, moments, strict=True)]
            updates = orthogonalize(torch.stack([whole(x) for x in nesterov]))
            scale = -group["lr"] * math.sqrt(max(1.0, rows / columns))
            for p, update in zip(same, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(sharded_as(update, p), alpha=scale)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        state = [self.state[p] for p in params]
        adamw(  # of each number by itself, so shards need no other process
            [_local(p) for p in params],
            [_local(_grad(p)) for p in params],
            [_local(s["exp_avg"]) for s in state],
            [_local(s["exp_avg_sq"]) for s in state],
            [],
            [s["step"] for s in state],
            fused=params[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def make_optimizer(
    model: GPT,
    *,
    matrix_lr: float,
    embedding_lr: float,
    head_lr: float,
    weight_decay: float,
    momentum: float = 0.95,
) -> MuonAdamW:
    """nanochat's groups: Muon for the blocks' matrices, AdamW for what reads and writes tokens.

    AdamW's rates were tuned at 768 channels and scale by (C / 768)^-0.5, so that one setting fits every depth.
    """
    scale = (model.config.hidden_size / 768) ** -0.5
    adamw_group = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    return MuonAdamW(
        [
            {"kind": "muon", "lr": matrix_lr, "momentum": momentum, "weight_decay": weight_decay}
            | {"params": list(model.model.layers.parameters())},
            adamw_group | {"lr": embedding_lr * scale, "params": [model.model.embed_tokens.weight]},
            adamw_group | {"lr": head_lr * scale, "params": [model.lm_head.weight]},
        ]
    )


def lr_factor(step: int, steps: int, warmup: int, decay: float, final: float = 0.0) -> float:
    """Trapezoid over optimizer steps: linear warm-up, constant, linear decay to `final` over the last `decay` share.

    >>> [round(lr_factor(s, 10, warmup=2, decay=0.5), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1, round(steps * decay))
    return final + (1 - final) * min(1.0, left)
