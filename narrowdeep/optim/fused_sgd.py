"""An optimizer that steps inside ``backward``, so that the gradients of all parameters never exist at once."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from narrowdeep.checks import check_number
from narrowdeep.distributed.ranks import Ranks

STEPPED: set[int] = set()
"""The ids of parameters that a FusedSGD steps. Its hooks hold those parameters, so no id is taken by another tensor.

Not an attribute of the parameter: a model that is being trained can be pickled and copied.
"""


_NO_SCALING = (
    "GradScaler cannot be used with FusedSGD, which steps inside backward, with the scaled gradients: take "
    "torch.optim.SGD, or no GradScaler (float32 and float64 networks need none)"
)


def _refuse_clipping(name: str) -> None:
    """Let one of torch's functions that clip gradients refuse parameters of a FusedSGD, which have none to clip.

    There is nothing else to see it by: such a function finds ``grad`` None, as after ``zero_grad``, and does nothing.
    """
    clip = getattr(nn.utils.clip_grad, name)

    @functools.wraps(clip)
    def refusing(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if any(id(p) in STEPPED for p in parameters):
            raise RuntimeError(
                f"{name.removeprefix('_')} cannot clip parameters that FusedSGD steps inside backward: their gradients "
                "are gone before all of them are known (take torch.optim.SGD to clip)"
            )
        return clip(parameters, *args, **kwargs)

    for module in (nn.utils.clip_grad, nn.utils):
        if hasattr(module, name):
            setattr(module, name, refusing)


def _refuse_scaling() -> None:
    """Let GradScaler refuse a loss whose backward would step with the scaled gradients, before it does."""
    scale = torch.amp.GradScaler.scale

    @functools.wraps(scale)
    def refusing(scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        if STEPPED and scaler.is_enabled() and _reaches_stepped(outputs):
            raise RuntimeError(_NO_SCALING)
        return scale(scaler, outputs)

    torch.amp.GradScaler.scale = refusing  # type: ignore[method-assign, assignment]


def _reaches_stepped(outputs: Any) -> bool:
    """Whether a backward from the tensors in ``outputs`` reaches a parameter of a FusedSGD."""
    tensors = [t for t in (outputs if isinstance(outputs, (list, tuple)) else [outputs]) if isinstance(t, Tensor)]
    nodes, seen = [t.grad_fn for t in tensors], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in STEPPED:  # of AccumulateGrad
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return any(id(t) in STEPPED for t in tensors)


@functools.cache
def _refuse_what_comes_after() -> None:
    """Once a process, when it makes its first FusedSGD."""
    # clip_grad_norm_ itself looks up the last one, whoever has imported it before by its name.
    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "_clip_grads_with_norm_"):
        if hasattr(nn.utils.clip_grad, name):
            _refuse_clipping(name)
    _refuse_scaling()


def _release(hooks: list[tuple[Tensor, Any]]) -> None:
    for param, handle in hooks:
        handle.remove()
        STEPPED.discard(id(param))
    hooks.clear()


class FusedSGD(torch.optim.Optimizer):
    """SGD whose update of a parameter happens as soon as its gradient is complete; the gradient is then freed.

    The same arithmetic as ``torch.optim.SGD``: ``buffer = momentum * buffer + gradient`` (the first buffer is the
    gradient), ``parameter -= lr * buffer``; without momentum ``parameter -= lr * gradient``. Every ``loss.backward()``
    is a step, so ``step`` and ``zero_grad`` have nothing left to do: a training loop needs no change and learning-rate
    schedulers work. What needs all gradients at once, or changes them after the backward, does not: accumulation over
    several backwards, closures that call backward more than once; and these raise a RuntimeError when they are used:
    clipping (``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_``, which Lightning and Accelerate call),
    a GradScaler. ``torch.autograd.grad`` and ``torch.func`` leave parameters alone. As with any optimizer, nothing
    steps once it is gone.

    The gradients that exist at one time are those of the parameters the backward is working on: the saving is as fine
    as the parameters are.

    In several processes of torch.distributed a gradient is averaged over them before its step, as
    DistributedDataParallel does after the backward, while the backward goes on with the next parameters: give the model
    as it is to each process, with the same parameters and a batch of its own. (Inside DistributedDataParallel steps are
    the same, but it sends every gradient once more, as zeros.) Parameters of ``fully_shard`` have averaged gradients.

    Arguments:
        params: a module (all its parameters that require gradients now), or what any ``torch.optim`` optimizer takes.
        lr: learning rate, finite and not negative.
        momentum: finite and not negative; 0 keeps no buffer.
        local: True steps on this process's own gradients also where torch.distributed has several processes. For
            parameters that no other process has, such as those of a pipeline stage.
        process_group: whose gradients are averaged; None: the default group.

    Raises: TypeError or ValueError naming the argument, the rule and the value; ValueError when a parameter
        does not require gradients, or already steps inside backward under another FusedSGD (``remove`` that one first);
        RuntimeError, at the first backward, where a parameter is not the same in all processes.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.optim import FusedSGD
        >>> model = DeepNarrowMLP(2, 1, depth=1000, chunks=10)
        >>> optimizer = FusedSGD(model, lr=0.1 * model.ntk_lr, momentum=0.9)
        >>> (model(torch.rand(8, 2)) - 1).square().mean().backward()  # which is a step
        >>> model.first_weight.grad is None
        True
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.0,
        *,
        local: bool = False,
        process_group: Any = None,
    ) -> None:
        lr, momentum = check_number("lr", lr), check_number("momentum", momentum)
        _refuse_what_comes_after()
        self.local, self.process_group = local, process_group
        self._compared: set[int] = set()
        self._pending: deque[tuple[Any, Tensor, int, Tensor]] = deque()
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
            if id(param) in STEPPED:
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
            STEPPED.add(id(param))

    @torch.no_grad()
    def _update(self, param: Tensor, index: int) -> None:
        gradient, param.grad = param.grad, None
        if gradient is None:
            return
        ranks = Ranks.of(self.process_group)
        if self.local or ranks.size == 1 or hasattr(param, "full_tensor"):  # of FSDP2, which has averaged it
            self._step(param, index, gradient)
            return
        if id(param) not in self._compared:
            self._compare(param, ranks.size)
        # Two parameters, a weight and a bias, are on their way while the backward goes on.
        work = dist.all_reduce(gradient.div_(ranks.size), group=self.process_group, async_op=True)
        self._pending.append((work, param, index, gradient))
        self._finish(2)
        Variable._execution_engine.queue_callback(lambda: self._finish(0))

    @torch.no_grad()
    def _finish(self, left: int) -> None:
        """Take the steps whose gradients have come, until ``left`` are on their way."""
        while len(self._pending) > left:
            work, param, index, gradient = self._pending.popleft()
            work.wait()
            self._step(param, index, gradient)

    def _compare(self, param: Tensor, size: int) -> None:
        bits = param.detach().flatten().view(torch.int32 if param.element_size() == 4 else torch.int64).sum()
        ends = torch.stack((bits, -bits))
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.process_group)
        if int(ends.sum()) != 0:
            raise RuntimeError(
                f"FusedSGD needs the same parameters in all {size} processes, got a parameter of shape "
                f"{tuple(param.shape)} that differs: draw them from one seed, or broadcast them (local=True is for "
                "parameters that no other process has)"
            )
        self._compared.add(id(param))

    def _step(self, param: Tensor, index: int, gradient: Tensor) -> None:
        group = self.param_groups[index]
        if group["momentum"]:
            state = self.state[param]
            buffer = state.get("momentum_buffer")
            if buffer is None:
                state["momentum_buffer"] = buffer = gradient.clone()
            else:
                buffer.mul_(group["momentum"]).add_(gradient)
            gradient = buffer
        param.add_(gradient, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in ``torch.optim.Optimizer``.

        Raises: ValueError, before anything is changed, for a buffer of another shape than its parameter.
        """
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(ids, params, strict=False):  # how many there must be, torch says
            buffer = state_dict["state"].get(key, {}).get("momentum_buffer")
            if buffer is not None and buffer.shape != param.shape:
                raise ValueError(
                    f"momentum_buffer {key} must have the shape {tuple(param.shape)} of its parameter, got "
                    f"{tuple(buffer.shape)}"
                )
        super().load_state_dict(state_dict)

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        """What GradScaler asks an optimizer before a step, where it has not seen it in the loss (another subclass)."""
        raise RuntimeError(_NO_SCALING)

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
