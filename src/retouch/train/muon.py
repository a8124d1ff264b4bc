"""Muon: momentum whose update is orthogonalized, for the matrices and kernels inside blocks. AdamW stays for all else.

On two CPU cores the orthogonalization costs about a seventh of a step, and a loss takes far fewer steps to reach.

Source: https://kellerjordan.github.io/posts/muon (the quintic Newton-Schulz iteration and its coefficients), with the
update scaled to AdamW's usual size as in https://arxiv.org/abs/2502.16982.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions or more; all but the first count as one. `lr` is on AdamW's scale.

    float32 throughout: bfloat16 is slow on many CPUs.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """About the nearest semi-orthogonal matrix: singular values of (m, n) pushed to near 1 by Newton-Schulz."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(rounds):
        gram = x @ x.T
        x = A * x + torch.addmm(B * gram, gram, gram, alpha=C) @ x
    return x.T if tall else x
