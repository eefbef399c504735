"""What DeepNarrowMLP and DeepNarrowCNN share: settings, stacked parameters, initialisation, checkpointing."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowdeep.functional import Form, check_settings
from narrowdeep.memory.plan import AUTO_SEGMENT, parse_bytes, plan

Init = Literal["ntk", "kaiming"]
Checkpoint = int | Literal["auto", "none"] | tuple[int, int]

WIDE = 128
"""Width from which ``checkpoint="auto"`` may save every state. A state costs about 12 bytes of memory traffic a unit,
to run it again `width` multiply-adds: on two cores with AVX-512 the two were equal at width 75 (L = 4000, B = 128:
190 ms and 173 ms forward and backward), and the work grows with the width."""

PARAMETER_NAMES = ("first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")


def _check_count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


class DeepNarrowBase(nn.Module):
    """Stacked parameters of L affine layers; a subclass says what one affine layer is.

    ``_tap`` is the shape that follows (rows, columns) in a weight: () for a linear layer, (f, f) for a convolution.
    """

    first_weight: nn.Parameter
    first_bias: nn.Parameter
    hidden_weight: Any  # nn.Parameter, or an nn.ParameterList of the chunks
    hidden_bias: Any
    last_weight: nn.Parameter
    last_bias: nn.Parameter
    budget: int | None = None
    """Bytes that a training step may take under ``checkpoint="auto"``; None: no limit."""
    _checkpoint: Checkpoint
    _plan: tuple[Any, Any] | None = None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        depth: int,
        *,
        tap: tuple[int, ...],
        scale: float | None,
        rho: float,
        beta: float,
        init: Init,
        form: Form,
        checkpoint: Checkpoint,
        chunks: int,
        budget: int | str | None,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.depth = _check_count("depth", depth, 2)
        self._inputs, self._outputs, self._tap = inputs, outputs, tap
        self.width = inputs + 1 + outputs
        self.scale = float(depth) if scale is None else scale
        check_settings(scale=self.scale, form=form, segment=0)
        self.scale = float(self.scale)
        for name, value in (("rho", rho), ("beta", beta)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if init not in ("ntk", "kaiming"):
            raise ValueError(f"init must be 'ntk' or 'kaiming', got {init!r}")
        if init == "kaiming" and form == "offset":
            raise ValueError("init='kaiming' needs form='plain': the offset form stores W - E, got form='offset'")
        if dtype not in (None, torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        limits = torch.finfo(dtype or torch.get_default_dtype())
        if not limits.tiny <= self.scale * self.scale * depth <= limits.max:
            raise ValueError(f"scale must have scale**2 * depth within the range of {limits.dtype}, got {self.scale}")
        self.rho, self.beta, self.init, self.form = float(rho), float(beta), init, form
        self.checkpoint = checkpoint
        self.budget = None if budget is None else parse_bytes(budget)
        if budget is not None and checkpoint != "auto":
            raise ValueError(f"budget needs checkpoint='auto', got checkpoint={checkpoint!r}")
        self.chunks = _check_count("chunks", chunks, 1)
        if chunks > max(1, depth - 2):
            raise ValueError(f"chunks must be at most the number of hidden layers, {depth - 2}, got {chunks}")
        n = self.width
        shapes = {
            "first_weight": (n, inputs, *tap),
            "first_bias": (n,),
            "hidden_weight": (depth - 2, n, n, *tap),
            "hidden_bias": (depth - 2, n),
            "last_weight": (outputs, n, *tap),
            "last_bias": (outputs,),
        }
        for name, (layers, *shape) in shapes.items():
            if chunks == 1 or "hidden" not in name:
                self.register_parameter(name, nn.Parameter(torch.empty(layers, *shape, device=device, dtype=dtype)))
                continue
            borders = [layers * i // chunks for i in range(chunks + 1)]
            self.add_module(
                name,
                nn.ParameterList(
                    torch.empty(end - begin, *shape, device=device, dtype=dtype) for begin, end in pairwise(borders)
                ),
            )
        self.reset_parameters()

    @property
    def checkpoint(self) -> Checkpoint:
        """What the backward keeps: "none" every hidden state, an int one state every so many layers, a pair (segment,
        snapshots) at most so many states, one every ``segment`` layers or fewer; "auto" chooses, within ``budget``."""
        return self._checkpoint

    @checkpoint.setter
    def checkpoint(self, value: Checkpoint) -> None:
        if isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise ValueError(f"checkpoint must be a pair (segment, snapshots), got {value!r}")
            value = (_check_count("checkpoint[0]", value[0], 1), _check_count("checkpoint[1]", value[1], 1))
            self._checkpoint = value
            return
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise TypeError(f"checkpoint must be 'auto', 'none' or an int, got {value!r}")
        if isinstance(value, str) and value not in ("auto", "none"):
            raise ValueError(f"checkpoint must be 'auto', 'none' or an int, got {value!r}")
        if isinstance(value, int) and value < 1:
            raise ValueError(f"checkpoint must be at least 1 layer a segment, got {value}")
        self._checkpoint = value

    @property
    def ntk_lr(self) -> float:
        """1 / (L C_L^2), the rate of the thesis's gradient flow (section 3.2)."""
        return 1.0 / self.depth / self.scale / self.scale

    def segment(self, positions: int) -> int:
        """Layers between saved states for a call on ``positions`` (batch size, times H W for images); 0 saves none.

        Under ``torch.no_grad()`` nothing is saved. ``checkpoint="auto"`` saves one state in ``AUTO_SEGMENT``, or
        every state of a network so wide that running its layers again costs more than keeping their states, while all
        of them take no more memory than the parameters and their gradients.
        """
        if not torch.is_grad_enabled():
            return 0
        if self._checkpoint == "none":
            return 1
        if isinstance(self._checkpoint, tuple):
            return min(self._checkpoint[0], self.depth)
        return self._auto_segment(positions) if self._checkpoint == "auto" else min(self._checkpoint, self.depth)

    def _checkpointing(self, x: Any, sample_dims: int) -> tuple[int, int | None]:
        """(segment, snapshots) for a call on ``x``, whose last ``sample_dims`` dimensions are one sample.

        Raises: BudgetError, before anything runs, where ``budget`` cannot be met.
        """
        if not isinstance(x, Tensor) or x.dim() < sample_dims or x.numel() == 0:
            return self.segment(0), None  # the chain says what is wrong, or has nothing to do
        positions = x.numel() // self._inputs
        if not torch.is_grad_enabled():
            return self.segment(positions), None
        chosen = self._checkpoint
        if self.budget is not None and chosen == "auto" and not torch.compiler.is_compiling():
            chosen = self._planned(x, sample_dims)
        if isinstance(chosen, tuple):
            return min(chosen[0], self.depth), chosen[1]
        return (1 if chosen == "none" else self.segment(positions) if chosen == "auto" else chosen), None

    def _planned(self, x: Tensor, sample_dims: int) -> Any:
        shape = tuple(x.shape[x.dim() - sample_dims :])
        batch = x.numel() // math.prod(shape)
        frozen = not any(p.requires_grad for p in self.parameters())
        weight = self.first_weight
        key = (batch, shape, self.budget, frozen, weight.dtype, weight.device, torch.get_num_threads())
        if self._plan is None or self._plan[0] != key:  # one shape after another is rare, and a plan takes milliseconds
            self._plan = key, plan(self, batch_size=batch, input_shape=shape, budget=self.budget).checkpoint
        return self._plan[1]

    def _auto_segment(self, positions: int) -> int:
        # No rule on the batch size while compiling: it would be a guard, and forbid a dynamic batch.
        if self.width < WIDE or torch.compiler.is_compiling():
            return AUTO_SEGMENT
        states = (self.depth - 1) * self.width * positions
        return 1 if states <= 2 * sum(p.numel() for p in self.parameters()) else AUTO_SEGMENT

    def in_chunks(self, name: str) -> list[Tensor]:
        """A parameter of ``PARAMETER_NAMES`` as the chunks that it is stored in; most are one."""
        value = getattr(self, name)
        return list(value) if isinstance(value, nn.ParameterList) else [value]

    def arguments(self) -> tuple[Any, ...]:
        """The six parameters as narrowdeep.functional takes them: tensors, or lists of chunks."""
        parts = [getattr(self, name) for name in PARAMETER_NAMES]
        return tuple(list(part) if isinstance(part, nn.ParameterList) else part for part in parts)

    def stacked(self) -> tuple[Tensor, ...]:
        """The six parameters in the order of the ops; copies of those that are stored in several chunks."""
        with torch.enable_grad():  # a copy requires gradients where a chunk does
            parts = [self.in_chunks(name) for name in PARAMETER_NAMES]
            return tuple(torch.cat(part) if len(part) > 1 else part[0] for part in parts)

    def identity_part(self) -> dict[str, Tensor]:
        """E and the base biases: what the offset form leaves out of each parameter (thesis sections 3.1 and 4.0.1).

        Shapes broadcast against the parameters: ``hidden_weight`` is (n, n, *tap), ``hidden_bias`` (n,).
        """
        parts = {name: torch.zeros_like(getattr(self, name)) for name in PARAMETER_NAMES if "hidden" not in name}
        parts["hidden_weight"] = torch.zeros_like(self.first_weight[:, :1]).repeat(
            1, self.width, *(1 for _ in self._tap)
        )
        parts["hidden_bias"] = torch.zeros_like(self.first_bias)
        centre = tuple(size // 2 for size in self._tap)
        right = self._inputs + 1
        for i in range(self._inputs):
            diagonal = (i, i, *centre)
            parts["first_weight"][diagonal] = self.scale
            parts["hidden_weight"][diagonal] = 1.0
        for i in range(self._outputs):
            diagonal, last = (right + i, right + i, *centre), (i, right + i, *centre)
            parts["hidden_weight"][diagonal] = 1.0
            parts["last_weight"][last] = 1.0
        parts["first_bias"][right:] = self.scale
        parts["last_bias"][:] = -self.scale
        return parts

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initialisation again.

        init="ntk": thesis section 3.1 (MLP) or 4.0.1 (CNN): u ~ N(0, rho^2 / d_in) per entry of the middle unit's
        weights (N(0, rho^2) for filters), v ~ N(0, (C_L beta)^2) for its bias, everything else the identity part.
        init="kaiming": He et al. 2015, uniform in +-sqrt(6 / fan_in), biases 0.
        """
        if self.init == "kaiming":
            for name in PARAMETER_NAMES:
                for param in self.in_chunks(name):
                    if name.endswith("bias"):
                        param.zero_()
                    else:
                        fan_in = (self._inputs if name == "first_weight" else self.width) * math.prod(self._tap)
                        bound = math.sqrt(6.0 / fan_in)
                        param.uniform_(-bound, bound, generator=generator)
            return
        for param in self.parameters():
            param.zero_()
        middle = self._inputs
        std_u = self.rho if self._tap else self.rho / math.sqrt(self._inputs)
        std_v = self.scale * self.beta
        self.first_weight[middle].normal_(0.0, std_u, generator=generator)
        self.first_bias[middle].normal_(0.0, std_v, generator=generator)
        for weight in self.in_chunks("hidden_weight"):
            weight[:, middle, : self._inputs].normal_(0.0, std_u, generator=generator)
        for bias in self.in_chunks("hidden_bias"):
            bias[:, middle].normal_(0.0, std_v, generator=generator)
        if self.form == "plain":
            for name, part in self.identity_part().items():
                for param in self.in_chunks(name):
                    param.add_(part)

    @torch.no_grad()
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """(W, b) of each of the L affine layers, with the identity part added back in offset form."""
        values = {name: value.detach() for name, value in zip(PARAMETER_NAMES, self.stacked(), strict=True)}
        if self.form == "offset":
            values = {name: values[name] + part for name, part in self.identity_part().items()}
        hidden = zip(values["hidden_weight"], values["hidden_bias"], strict=True)
        return [
            (values["first_weight"], values["first_bias"]),
            *hidden,
            (values["last_weight"], values["last_bias"]),
        ]

    @torch.no_grad()
    def load_layers(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """The way back from ``layers()``: subtracts the identity part in offset form."""
        (first_w, first_b), *hidden, (last_w, last_b) = layers
        values = {"first_weight": first_w, "first_bias": first_b, "last_weight": last_w, "last_bias": last_b}
        rows = [[row for chunk in self.in_chunks(f"hidden_{kind}") for row in chunk] for kind in ("weight", "bias")]
        for to_weight, to_bias, (weight, bias) in zip(*rows, hidden, strict=True):
            to_weight.copy_(weight)
            to_bias.copy_(bias)
        for name, value in values.items():
            getattr(self, name).copy_(value)
        if self.form == "offset":
            for name, part in self.identity_part().items():
                for param in self.in_chunks(name):
                    param.sub_(part)

    def extra_repr(self) -> str:
        return (
            f"{self._inputs}, {self._outputs}, depth={self.depth}, width={self.width}, scale={self.scale:g}, "
            f"rho={self.rho:g}, beta={self.beta:g}, init={self.init!r}, form={self.form!r}, "
            f"checkpoint={self.checkpoint!r}"
            + (f", chunks={self.chunks}" if self.chunks > 1 else "")
            + (f", budget={self.budget}" if self.budget is not None else "")
        )
