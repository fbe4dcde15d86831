"""AdamW whose state is stored under the parameters' names, so that it loads on any layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from titan_train.config.training import OptimizerSection


class Optimizer:
    """AdamW over named parameters.

    Args:
        named_parameters: Pairs of name and parameter; names as in the model before it was laid out.
        settings: The hyper-parameters.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSection) -> None:
        self._named = dict(named_parameters)
        self._settings = settings
        matrices = [p for p in self._named.values() if p.ndim >= 2]
        others = [p for p in self._named.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )

    def step(self, factor: float) -> float:
        """Update the parameters from their gradients, then clear the gradients.

        Args:
            factor: Learning rate of this step as a fraction of the peak.

        Returns:
            The learning rate used.
        """
        lr = self._settings.lr * factor
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad()
        return lr

    def state_dict(self) -> dict[str, Any]:
        """Return {name: {moment: tensor}}. Before the first step the moments are zeros, as AdamW would create them."""
        return {name: dict(self._state_of(parameter)) for name, parameter in self._named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy in what `state_dict` returned; tensors that were loaded in place are left alone."""
        for name, parameter in self._named.items():
            own = self._state_of(parameter)
            for key, value in state[name].items():
                if own[key] is not value:
                    own[key].copy_(value)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._adamw.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
