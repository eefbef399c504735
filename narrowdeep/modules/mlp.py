"""The deep narrow MLP."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from narrowdeep.checks import check_count
from narrowdeep.functional import Form, mlp_chain
from narrowdeep.modules import convert
from narrowdeep.modules.base import Checkpoint, DeepNarrowBase, Init


class DeepNarrowMLP(DeepNarrowBase):
    """ReLU MLP of ``depth`` affine layers and width ``in_features + 1 + out_features`` (thesis section 3.1).

    The same network as ``nn.Sequential`` of ``nn.Linear`` and ``nn.ReLU``, run as one fused op, and in offset form
    accurate in float32 where the eager network is not (docs/theory.md).

    Arguments:
        in_features, out_features: at least 1.
        depth: L, affine layers, at least 2.
        scale: C_L; default ``float(depth)``. Outputs stay right while targets are above -C_L.
        rho, beta: standard deviations of the initialisation, not negative.
        init: "ntk" (thesis section 3.1; the output is exactly 0 at initialisation) or "kaiming" (He et al. 2015,
            plain form only: the baseline that does not train at depth).
        form: "offset" stores Delta = W - E and c, "plain" stores W and b.
        checkpoint: "auto", "none", layers between two saved states, or a pair (segment, snapshots): at most so many
            states kept, under a binomial schedule over segments of so many layers. Changes memory and time, never
            results.
        chunks: parameters that the hidden layers are divided into, and graph nodes: more than 1, and the gradients of
            all layers never exist at once where each is used as soon as it is complete (``narrowdeep.optim.FusedSGD``,
            or hooks). ``hidden_weight`` and ``hidden_bias`` are then lists. Results are the same to the bit on the CPU;
            the same seed draws other numbers.
        budget: bytes that a training step may take, parameters, gradients and the optimizer's state included, without
            the interpreter: an int, or text such as "2GiB". With checkpoint="auto" each call is planned to fit
            (``narrowdeep.memory.plan``), or raises BudgetError before anything runs. None: no limit.
        optimizer: what updates the parameters, which a budget counts: "sgd", "momentum", "adam", "fused-sgd" or
            "fused-momentum" (``narrowdeep.memory.plan``).
        device, dtype: of the parameters; float32 or float64.

    Parameters (stacked): ``first_weight`` (n, in), ``first_bias`` (n,), ``hidden_weight`` (L-2, n, n),
    ``hidden_bias`` (L-2, n), ``last_weight`` (out, n), ``last_bias`` (out,).

    Attributes: ``width`` n, ``depth`` L, ``scale`` C_L, ``ntk_lr`` = 1 / (L C_L^2).

    Call: x (*, in) -> (*, out).

    A ``state_dict`` belongs to one form and one scale, carries both (``_extra_state``) and is refused by a model with
    others. It loads into any number of chunks. torch.nn.utils.prune and the parametrizations weight_norm, spectral_norm
    and orthogonal act on what is stored: refused, at the first call, where that is not a layer's weight.

    Raises: TypeError or ValueError naming the argument, the rule and the value.
    """

    _family = "mlp"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        depth: int,
        *,
        scale: float | None = None,
        rho: float = 1.0,
        beta: float = 1.0,
        init: Init = "ntk",
        form: Form = "offset",
        checkpoint: Checkpoint = "auto",
        chunks: int = 1,
        budget: int | str | None = None,
        optimizer: str = "sgd",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.in_features = check_count("in_features", in_features, 1)
        self.out_features = check_count("out_features", out_features, 1)
        super().__init__(
            self.in_features,
            self.out_features,
            depth,
            tap=(),
            scale=scale,
            rho=rho,
            beta=beta,
            init=init,
            form=form,
            checkpoint=checkpoint,
            chunks=chunks,
            budget=budget,
            optimizer=optimizer,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        segment, snapshots = self._checkpointing(x, 1)
        return mlp_chain(x, *self.arguments(), scale=self.scale, form=self.form, segment=segment, snapshots=snapshots)

    def to_sequential(self, *, dtype: torch.dtype | None = None) -> nn.Sequential:
        """The same network as eager layers: nn.Linear, nn.ReLU, ..., nn.Linear, with W = E + Delta.

        Arguments:
            dtype: of the layers, default the model's. The weights are copies. In float32 they have lost whatever of
                Delta is below half an ulp of 1: take torch.float64 to compare outputs.
        """
        modules: list[nn.Module] = []
        for weight, bias in self.layers(dtype=dtype):
            rows, columns = weight.shape
            linear = nn.utils.skip_init(nn.Linear, columns, rows, device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
            modules += [linear, nn.ReLU()]
        return nn.Sequential(*modules[:-1])

    @classmethod
    def from_sequential(
        cls,
        seq: nn.Sequential,
        *,
        form: Form = "offset",
        scale: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeepNarrowMLP:
        """A model with the layers of ``seq``: nn.Linear and nn.ReLU in turn, all hidden widths in + 1 + out.

        Arguments:
            seq: at least two nn.Linear with bias, an nn.ReLU between every two; these classes themselves, without
                hooks, parametrizations or parameters in common.
            form: of the new model.
            scale: C_L of the new model, default its depth; in offset form the base that is subtracted.
            dtype: of the new model, default that of ``seq``. What the offset form stores is subtracted in float64, so
                that a float64 ``seq`` keeps its digits in a float32 model.

        Raises: ValueError when ``seq`` has another structure, or is not what its parameters say.
        """
        convert.require_exactly(seq, nn.Sequential, "seq")
        modules, relus = list(seq)[0::2], list(seq)[1::2]
        linears: list[Any] = []
        if len(modules) < 2 or len(relus) != len(modules) - 1:
            raise ValueError(
                f"seq must be nn.Linear, nn.ReLU, ..., nn.Linear with at least 2 nn.Linear, got {len(seq)} modules"
            )
        for i, module in enumerate(modules):
            if not isinstance(module, nn.Linear) or module.bias is None:
                raise ValueError(f"seq[{2 * i}] must be nn.Linear with a bias, got {module}")
            convert.require_exactly(module, nn.Linear, f"seq[{2 * i}]")
            linears.append(module)
        for i, module in enumerate(relus):
            convert.require_exactly(module, nn.ReLU, f"seq[{2 * i + 1}]")
        convert.require_untied(modules)
        in_features, out_features = linears[0].in_features, linears[-1].out_features
        width = in_features + 1 + out_features
        for i, (linear, following) in enumerate(pairwise(linears)):
            if linear.out_features != width or following.in_features != width:
                raise ValueError(f"seq[{2 * i}] must have in + 1 + out = {width} hidden units, got {linear}")
        layers = [
            convert.require_shape(linear, (linear.out_features, linear.in_features), f"seq[{2 * i}]")
            for i, linear in enumerate(linears)
        ]
        return cls._from_layers(layers, in_features, out_features, len(layers), scale=scale, form=form, dtype=dtype)

    @classmethod
    def from_authors(
        cls,
        state_dict: Mapping[str, Any],
        *,
        form: Form = "offset",
        scale: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeepNarrowMLP:
        """The network of a state dict of the thesis's published code (``DeepNN``): head, body.0, ..., tail.

        Its ``L`` counts the layers of the body, and one more: a ``DeepNN`` of L has L + 1 affine layers, which is
        ``depth`` here.

        Arguments:
            state_dict: keys "head.weight", "head.bias", "body.0.weight", ..., "tail.bias", all with any one prefix; or
                what ``train_mnist.py`` saves, which has it under "model_state_dict".
            form: of the new model.
            scale: C_L; default: minus tail.bias, rounded to a whole number, which it is at initialisation.
            dtype: of the new model, default that of the tensors; the identity part is subtracted in float64.

        Raises: TypeError or ValueError naming the key that is missing, does not belong or has another shape.
        """
        layers = convert.read_authors(state_dict)
        inputs, outputs = convert.check_authors_shapes(layers, (), "DeepNarrowCNN.from_authors")
        scale = convert.authors_scale(layers, scale)
        return cls._from_layers(layers, inputs, outputs, len(layers), scale=scale, form=form, dtype=dtype)

    def to_authors(self, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The way back: a state dict for ``DeepNN(in_features, out_features, L=depth - 1, C_L=scale)``, copies.

        Their code needs an L of at least 2, and float64 (``dtype=torch.float64``) where W = E + Delta needs it.
        """
        return convert.write_authors(self.layers(dtype=dtype))
