"""The deep narrow CNN."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from narrowdeep.checks import check_count
from narrowdeep.functional import Form, conv_chain
from narrowdeep.modules import convert
from narrowdeep.modules.base import Checkpoint, DeepNarrowBase, Init


class DeepNarrowCNN(DeepNarrowBase):
    """ReLU CNN of ``depth`` convolutions and ``in_channels + 1 + out_channels`` channels (thesis section 4).

    The same network as ``nn.Sequential`` of ``nn.Conv2d(padding=kernel_size // 2)`` and ``nn.ReLU`` with a global
    average pool at the end, run as one fused op, and in offset form accurate in float32 where the eager network is not
    (docs/theory.md).

    Arguments:
        in_channels, out_channels: at least 1.
        depth: L, convolutions, at least 2.
        kernel_size: f, odd: filters are f x f, padded with zeros to keep H and W.
        scale: C_L; default ``float(depth)``. Outputs stay right while targets are above -C_L.
        rho, beta: standard deviations of the initialisation, not negative.
        init: "ntk" (thesis section 4.0.1; the output is exactly 0 at initialisation) or "kaiming" (He et al. 2015,
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

    Parameters (stacked): ``first_weight`` (n, c, f, f), ``first_bias`` (n,), ``hidden_weight`` (L-2, n, n, f, f),
    ``hidden_bias`` (L-2, n), ``last_weight`` (k, n, f, f), ``last_bias`` (k,).

    Attributes: ``width`` n (channels), ``depth`` L, ``scale`` C_L, ``ntk_lr`` = 1 / (L C_L^2).

    Call: x (*, c, H, W), any H and W from 1 -> (*, k).

    A ``state_dict`` belongs to one form and one scale, carries both (``_extra_state``) and is refused by a model with
    others. It loads into any number of chunks. torch.nn.utils.prune and the parametrizations weight_norm, spectral_norm
    and orthogonal act on what is stored: refused, at the first call, where that is not a layer's weight.

    Raises: TypeError or ValueError naming the argument, the rule and the value.
    """

    _family = "cnn"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int,
        *,
        kernel_size: int = 3,
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
        self.in_channels = check_count("in_channels", in_channels, 1)
        self.out_channels = check_count("out_channels", out_channels, 1)
        self.kernel_size = check_count("kernel_size", kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        super().__init__(
            self.in_channels,
            self.out_channels,
            depth,
            tap=(self.kernel_size, self.kernel_size),
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
        segment, snapshots = self._checkpointing(x, 3)
        return conv_chain(x, *self.arguments(), scale=self.scale, form=self.form, segment=segment, snapshots=snapshots)

    def to_sequential(self, *, dtype: torch.dtype | None = None) -> nn.Sequential:
        """The same network as eager layers: nn.Conv2d, nn.ReLU, ..., nn.Conv2d, nn.AdaptiveAvgPool2d, nn.Flatten.

        Arguments:
            dtype: of the layers, default the model's. The weights are copies, with W = E + Delta. In float32 they have
                lost whatever of Delta is below half an ulp of 1: take torch.float64 to compare outputs.

        Returns: a network that takes (B, c, H, W).
        """
        modules: list[nn.Module] = []
        for weight, bias in self.layers(dtype=dtype):
            rows, columns, size, _ = weight.shape
            conv = nn.utils.skip_init(
                nn.Conv2d, columns, rows, size, padding=size // 2, device=weight.device, dtype=weight.dtype
            )
            with torch.no_grad():
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
            modules += [conv, nn.ReLU()]
        return nn.Sequential(*modules[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())

    @classmethod
    def from_sequential(
        cls,
        seq: nn.Sequential,
        *,
        form: Form = "offset",
        scale: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeepNarrowCNN:
        """A model with the layers of ``seq``, which has the structure that ``to_sequential`` gives.

        Arguments:
            seq: at least two nn.Conv2d with bias, an nn.ReLU between every two, nn.AdaptiveAvgPool2d(1) and nn.Flatten
                at the end; these classes themselves, without hooks, parametrizations or parameters in common. All
                filters have one odd size, stride 1 and padding of half that size with zeros; all hidden channels are
                in + 1 + out.
            form: of the new model.
            scale: C_L of the new model, default its depth; in offset form the base that is subtracted.
            dtype: of the new model, default that of ``seq``. What the offset form stores is subtracted in float64, so
                that a float64 ``seq`` keeps its digits in a float32 model.

        Raises: ValueError when ``seq`` has another structure, or is not what its parameters say.
        """
        convert.require_exactly(seq, nn.Sequential, "seq")
        modules = list(seq)
        convs: list[Any] = []
        relus, head = modules[1:-2:2], list[Any](modules[-2:])
        if len(relus) < 1 or len(modules) != 2 * len(relus) + 3:
            raise ValueError(
                "seq must be nn.Conv2d, nn.ReLU, ..., nn.Conv2d, nn.AdaptiveAvgPool2d, nn.Flatten with at least 2 "
                f"nn.Conv2d, got {len(seq)} modules"
            )
        for i, module in enumerate(relus):
            convert.require_exactly(module, nn.ReLU, f"seq[{2 * i + 1}]")
        if not isinstance(head[0], nn.AdaptiveAvgPool2d) or head[0].output_size not in (1, (1, 1)):
            raise ValueError(f"seq[{len(seq) - 2}] must be nn.AdaptiveAvgPool2d(1), got {head[0]}")
        convert.require_exactly(head[0], nn.AdaptiveAvgPool2d, f"seq[{len(seq) - 2}]")
        convert.require_exactly(head[1], nn.Flatten, f"seq[{len(seq) - 1}]")
        if (head[1].start_dim, head[1].end_dim) != (1, -1):
            raise ValueError(f"seq[{len(seq) - 1}] must be nn.Flatten(1, -1), got {head[1]}")
        for i, module in enumerate(modules[:-2:2]):
            if not isinstance(module, nn.Conv2d) or module.bias is None:
                raise ValueError(f"seq[{2 * i}] must be nn.Conv2d with a bias, got {module}")
            convert.require_exactly(module, nn.Conv2d, f"seq[{2 * i}]")
            convs.append(module)
        convert.require_untied(convs)
        size = convs[0].kernel_size[0]
        if size % 2 == 0:
            raise ValueError(f"seq[0] must have filters of odd size, got {convs[0]}")
        wanted = {
            "kernel_size": (size, size),
            "stride": (1, 1),
            "padding": (size // 2, size // 2),
            "dilation": (1, 1),
            "groups": 1,
            "padding_mode": "zeros",
        }
        for i, conv in enumerate(convs):
            for name, value in wanted.items():
                # padding="same" is the same padding for an odd filter and stride 1
                if getattr(conv, name) not in (value, "same" if name == "padding" else value):
                    raise ValueError(f"seq[{2 * i}] must have {name}={value}, got {conv}")
        in_channels, out_channels = convs[0].in_channels, convs[-1].out_channels
        width = in_channels + 1 + out_channels
        for i, (conv, following) in enumerate(pairwise(convs)):
            if conv.out_channels != width or following.in_channels != width:
                raise ValueError(f"seq[{2 * i}] must have in + 1 + out = {width} hidden channels, got {conv}")
        layers = [
            convert.require_shape(conv, (conv.out_channels, conv.in_channels, size, size), f"seq[{2 * i}]")
            for i, conv in enumerate(convs)
        ]
        sizes = in_channels, out_channels, len(layers)
        return cls._from_layers(layers, *sizes, kernel_size=size, scale=scale, form=form, dtype=dtype)

    @classmethod
    def from_authors(
        cls,
        state_dict: Mapping[str, Any],
        *,
        form: Form = "offset",
        scale: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> DeepNarrowCNN:
        """The network of a state dict of the thesis's published code (``DeepCNN``): head, body.0, ..., tail.

        A ``DeepCNN`` of L has L + 1 convolutions, which is ``depth`` here, of 3x3 filters drawn with a standard
        deviation of 1/3 (``rho``). It pools its images by 4 before them, and its outputs are (B, k, 1, 1):
        ``nn.Sequential(nn.AvgPool2d(4), model)`` is the same network with outputs (B, k).

        Arguments:
            state_dict: keys "head.weight", "head.bias", "body.0.weight", ..., "tail.bias", all with any one prefix; or
                what ``train_mnist.py`` saves, which has it under "model_state_dict". One input channel: theirs have
                another width for more.
            form: of the new model.
            scale: C_L; default: minus tail.bias, rounded to a whole number, which it is at initialisation.
            dtype: of the new model, default that of the tensors; the identity part is subtracted in float64.

        Raises: TypeError or ValueError naming the key that is missing, does not belong or has another shape.
        """
        layers = convert.read_authors(state_dict)
        inputs, outputs = convert.check_authors_shapes(layers, (3, 3), "DeepNarrowMLP.from_authors")
        settings: dict[str, Any] = {"scale": convert.authors_scale(layers, scale), "rho": 1 / 3}
        return cls._from_layers(layers, inputs, outputs, len(layers), **settings, form=form, dtype=dtype)

    def to_authors(self, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The way back: a state dict for ``DeepCNN(28, 1, out_channels, L=depth - 1, C_L=scale)``, copies.

        Their code needs an L of at least 2, and float64 (``dtype=torch.float64``) where W = E + Delta needs it.

        Raises: ValueError where it has no such network: filters of another size, more than one input channel.
        """
        if self.kernel_size != 3:
            raise ValueError(f"kernel_size must be 3 for the published code, which pads by 1, got {self.kernel_size}")
        if self.in_channels != 1:
            raise ValueError(f"in_channels must be 1 for the published code, got {self.in_channels}")
        return convert.write_authors(self.layers(dtype=dtype))
