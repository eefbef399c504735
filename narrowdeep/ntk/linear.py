"""A model's first-order expansion in its parameters, to be trained in its place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from narrowdeep.ntk.empirical import checked_samples
from narrowdeep.ntk.network import check_module, find, function_of, reading, trained


class LinearizedModel(nn.Module):
    """``f(x; start) + J(x; start) (theta - start)``, linear in its parameters theta; see ``linearize``.

    Attributes: ``model``, a copy whose parameters are theta, by their own names.

    Examples:
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import LinearizedModel
        >>> [name for name, _ in LinearizedModel(DeepNarrowMLP(2, 1, depth=10)).named_parameters()][:2]
        ['model.first_weight', 'model.first_bias']
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        ours = find(self.model)
        with reading(self.model):
            if not function_of(self.model, ours).transformable:
                raise ValueError(
                    "model must have narrow models with one chunk alone where it is more than one at its end: forward "
                    f"mode goes through nothing else, got {type(model).__name__}"
                )
        self._names = list(trained(self.model))
        for i, value in enumerate(trained(self.model).values()):
            self.register_buffer(f"start_{i}", value.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of samples (N, ...). Raises: as ``empirical_ntk``; ValueError where a gradient for x is asked for."""
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x must not require gradients: a linearized model has them for its parameters alone")
        ours, graph = find(self.model), torch.is_grad_enabled()
        params = {name: self.model.get_parameter(name) for name in self._names}
        starts = {name: self.get_buffer(f"start_{i}") for i, name in enumerate(self._names)}
        with reading(self.model):
            samples = checked_samples(self.model, ours, "x", x)
            function = function_of(self.model, ours)
            function.outputs(samples)  # which checks them
            with torch.set_grad_enabled(graph):
                change = {name: param - starts[name] for name, param in params.items()}
                found: Any = torch.func.jvp(lambda values: function.call(values, samples), (starts,), (change,))
                return found[0] + found[1]


def linearize(model: nn.Module) -> LinearizedModel:
    """The first-order expansion of a model about its parameters as they are now, as a module that can be trained.

    Gradient flow on it is exactly that of the tangent kernel (``NTKRegressor`` with the model and ``initial=model``):
    what the trained model does otherwise is feature learning (Lee et al., "Wide neural networks of any depth evolve as
    linear models", NeurIPS 2019). A call costs a forward and a jvp of the model, a backward another of each.

    Arguments:
        model: as in ``empirical_ntk``; it is copied. Parameters with ``requires_grad=False`` now stay as they are.

    Returns: a module with the parameters of the copy, under ``model.``; it maps (N, ...) as the model does.
    Differentiable in its parameters.

    Raises: TypeError or ValueError naming the argument, the rule and the value.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import linearize
        >>> model, x = DeepNarrowMLP(2, 1, depth=100), torch.rand(5, 2)
        >>> linear = linearize(model)
        >>> torch.allclose(linear(x), model(x))  # where it starts
        True
        >>> linear(x).sum().backward()
        >>> linear.model.last_bias.grad
        tensor([5.])
    """
    check_module("model", model)
    return LinearizedModel(model)
