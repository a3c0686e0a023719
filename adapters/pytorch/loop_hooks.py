"""Gates, decay and limits of gradients inside the steps of a training loop that belongs to the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapters.pytorch.gating import Gating
from prunus.adapters.pytorch.optimizer_state import nested
from prunus.adapters.pytorch.unit_decay import UnitDecay
from prunus.core.errors import ConfigError


class LoopHooks:
    """Puts the gates on before the first forward pass of a step and takes them off before the update.

    The passes of one step (gradient accumulation) share one opening and closing. Gates go on only in training
    mode with gradients enabled, so that the user's validation sees the weights as they are. An optimizer
    that calls a closure (Lightning) is served, too: the gates come off when the closure returns.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gating: Gating | None = None,
        decay: UnitDecay | None = None,
        clip: float | None = None,
    ) -> None:
        """`clip`: largest norm of the model's gradients at an update."""
        self.images = 0
        """Images that the model was trained on, forward passes counted."""
        self._model, self._optimizer, self._gating, self._decay = model, optimizer, gating, decay
        self._clip = clip
        self._on = False
        self._version = 0
        # plain functions: a copy of the model that the user takes meanwhile does not copy the run
        self._handles = [
            model.register_forward_pre_hook(_entering(self), with_kwargs=True),
            # of a wrapper (Lookahead) the one inside calls the hooks, and the wrapper may have none
            *(
                one.register_step_pre_hook(_stepping(self))
                for one in nested(optimizer)
                if hasattr(one, "_optimizer_step_pre_hooks")
            ),
        ]

    def close(self) -> None:
        """After the last step: nothing of this is left in the model or the optimizer."""
        self.settle()
        for handle in self._handles:
            handle.remove()

    def settle(self) -> None:
        """At the end of a step: takes the gates off where the optimizer was not called (a scaler's overflow).

        Raises ConfigError if the weights were updated with the gates on: the update would be lost.
        """
        if not self._on:
            return
        if self._state_version() != self._version:
            raise ConfigError(
                f"{type(self._optimizer).__name__} changed the weights without calling its step hooks, so the "
                "method's gates cannot be taken off before the update; give begin() the optimizer whose step() "
                "your loop calls, a torch.optim.Optimizer"
            )
        self._take_off()

    def entered(self, module: nn.Module, images: int) -> None:
        """A forward pass of `module` begins."""
        if module is not self._model or not module.training or not torch.is_grad_enabled():
            return
        self.images += images
        if not self._on:
            if self._gating is not None:
                self._gating.before_forward()
            self._on = True
            self._version = self._state_version()

    def before_update(self) -> None:
        """Gradients are there, the optimizer is about to use them. A wrapper and what it wraps may both say so."""
        if not self._on:
            return
        self._take_off()
        if self._clip is not None:
            # a scaler leaves its division to fused optimizers
            scale = getattr(self._optimizer, "grad_scale", None)
            limit = self._clip * (1.0 if scale is None else float(scale))
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit)
        if self._decay is not None:
            self._decay(max(float(group["lr"]) for group in self._optimizer.param_groups))

    def _take_off(self) -> None:
        if self._gating is not None:
            self._gating.after_backward()
        self._on = False

    def _state_version(self) -> int:
        """Grows with every change of a weight."""
        if self._gating is None:
            return 0
        return sum(parameter._version for parameter in self._model.parameters())


def _entering(hooks: LoopHooks) -> Callable[[nn.Module, Any, Any], None]:
    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 0), None)
        hooks.entered(module, 1 if first is None else len(first))

    return enter


def _stepping(hooks: LoopHooks) -> Callable[[Any, Any, Any], Any]:
    def step(optimizer: Any, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            hooks.before_update()
            return None

        def closed() -> Any:
            loss = closure()
            hooks.before_update()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closed}
        return (args[0], closed, *args[2:]), kwargs

    return step


__all__ = ["LoopHooks"]
