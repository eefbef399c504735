"""An optimizer that steps inside ``backward``, so that the gradients of all parameters never exist at once."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_STEPPED: set[int] = set()
"""The ids of parameters that a FusedSGD steps. Its hooks hold those parameters, so no id is taken by another tensor.

Not an attribute of the parameter: a model that is being trained can be pickled and copied.
"""


def _release(hooks: list[tuple[Tensor, Any]]) -> None:
    for param, handle in hooks:
        handle.remove()
        _STEPPED.discard(id(param))
    hooks.clear()


class FusedSGD(torch.optim.Optimizer):
    """SGD whose update of a parameter happens as soon as its gradient is complete; the gradient is then freed.

    The same arithmetic as ``torch.optim.SGD``: ``buffer = momentum * buffer + gradient`` (the first buffer is the
    gradient), ``parameter -= lr * buffer``; without momentum ``parameter -= lr * gradient``. Every ``loss.backward()``
    is a step, so ``step`` and ``zero_grad`` have nothing left to do: a training loop needs no change and learning-rate
    schedulers work. What needs all gradients at once does not: accumulation over several backwards, clipping by the
    norm of all gradients, closures that call backward more than once. ``torch.autograd.grad`` and ``torch.func`` leave
    parameters alone. As with any optimizer, nothing steps once it is gone.

    The gradients that exist at one time are those of the parameters the backward is working on: the saving is as fine
    as the parameters are.

    Arguments:
        params: a module (all its parameters that require gradients now), or what any ``torch.optim`` optimizer takes.
        lr: learning rate, finite and not negative.
        momentum: finite and not negative; 0 keeps no buffer.

    Raises: TypeError or ValueError naming the argument, the rule and the value; ValueError when a parameter
        does not require gradients, or already steps inside backward under another FusedSGD (``remove`` that one first).
    """

    def __init__(
        self, params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, momentum: float = 0.0
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if isinstance(params, nn.Module):
            params = [p for p in params.parameters() if p.requires_grad]
        self._hooks: list[tuple[Tensor, Any]] = []
        weakref.finalize(self, _release, self._hooks).atexit = False
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``; the group's parameters step inside backward from now on."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1  # not the group: load_state_dict replaces it
        params = self.param_groups[index]["params"]
        for param in params:
            if not param.requires_grad:
                self.param_groups.pop()
                raise ValueError(
                    f"params must require gradients, got a parameter of shape {tuple(param.shape)} that does not"
                )
            if id(param) in _STEPPED:
                self.param_groups.pop()
                raise ValueError(
                    f"params must not belong to another FusedSGD, got a parameter of shape {tuple(param.shape)} that "
                    "does: call remove() on that one first"
                )
        # A parameter must not own its optimizer: that cycle runs through the C++ tensor, where the garbage collector
        # cannot see it, and would keep the parameters for ever.
        owner = weakref.ref(self)

        def update(param: Tensor) -> None:
            optimizer = owner()
            if optimizer is not None:
                optimizer._update(param, index)

        for param in params:
            self._hooks.append((param, param.register_post_accumulate_grad_hook(update)))
            _STEPPED.add(id(param))

    @torch.no_grad()
    def _update(self, param: Tensor, index: int) -> None:
        gradient, group = param.grad, self.param_groups[index]
        if gradient is None:
            return
        if group["momentum"]:
            state = self.state[param]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                state["momentum_buffer"] = buffer = gradient.clone()
            else:
                buffer.mul_(group["momentum"]).add_(gradient)
            gradient = buffer
        param.add_(gradient, alpha=-group["lr"])
        param.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing: ``backward`` has updated the parameters. A closure is called once and its value returned."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def remove(self) -> None:
        """Stop stepping inside backward: gradients are kept in ``.grad`` again. The momentum buffers stay."""
        _release(self._hooks)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("FusedSGD cannot be copied or pickled, its hooks belong to the parameters: use state_dict()")
