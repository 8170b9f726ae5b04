"""Apple's GPUs have no float64: nothing asks for it on the device. No such machine is at hand, so a stand-in refuses it."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import worker
from torch.overrides import TorchFunctionMode

from edu.data.packing import TrainingExample, collate
from edu.model.config import GPTConfig
from edu.model.gpt import GPT
from edu.stages.rollouts import token_logprobs
from edu.training.accelerator import compute_init
from edu.training.optimizer import make_optimizer
from edu.training.step import Term, fits, train_step


class RefuseFloat64(TorchFunctionMode):
    """Refuse float64 results of tensors that no call of `.cpu()` has brought to the host."""

    def __init__(self) -> None:
        self.on_host: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        host = bool(given) and all(id(x) in self.on_host for x in given)
        if func is torch.Tensor.cpu:
            out = out.view_as(out)  # of a CPU's tensor it is the tensor itself
            host = True
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and host:
                self.on_host[id(x)] = x
            elif isinstance(x, torch.Tensor) and given and x.dtype == torch.float64:
                raise TypeError(f"{func}: MPS has no float64")
        return out


def test_the_stand_in_refuses_float64_before_the_host_and_not_on_it() -> None:
    with RefuseFloat64():
        assert torch.ones(3).cpu().double().sum().dtype == torch.float64
        with pytest.raises(TypeError, match="MPS has no float64"):
            torch.ones(3).double().cpu()


def test_a_step_its_trial_and_the_log_probabilities_of_rollouts_ask_for_no_float64() -> None:
    accelerator = compute_init(seed=0)
    model = GPT(GPTConfig.tiny())
    settings = {"matrix_lr": 0.02, "embedding_lr": 0.2, "head_lr": 0.004, "weight_decay": 0.1}
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model, **settings))
    terms = [Term([collate(worker.rows_of(0), worker.T)])]
    pieces = [TrainingExample(np.arange(1, 9), np.array([0, 0, 0, 1, 1, 1, 1, 1]))] * 2
    with RefuseFloat64():
        assert fits(accelerator, prepared, terms)
        assert not train_step(accelerator, prepared, optimizer, terms).skipped
        assert token_logprobs(model, pieces, 32, 2)[0].dtype == np.float64
