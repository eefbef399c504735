"""What DeepNarrowMLP and DeepNarrowCNN share: settings, stacked parameters, initialisation, layers.

More than 400 lines with the examples of its docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from narrowdeep.chain.params import LayerSpan
from narrowdeep.checks import LARGEST, check_count, check_number
from narrowdeep.functional import Form, cast_up, check_tensors
from narrowdeep.modules import convert, hidden, state
from narrowdeep.modules.checkpointing import NO_TORCHSCRIPT, Checkpoint, Checkpointing

Init = Literal["ntk", "kaiming"]

PARAMETER_NAMES = ("first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")

DTYPES = (torch.float32, torch.float64)

HALF = (
    "in half precision the increments of these layers are lost (FSDP2: leave param_dtype out of MixedPrecisionPolicy; "
    "reduce_dtype may be lower)"
)


def _drop_gradient(param: Tensor) -> None:
    param.grad = None


def _attributes(module: nn.Module, names: Iterable[str]) -> list[Any]:
    """Attributes of ``module``, of which parameters are taken where torch keeps them: its own way takes 0.5 us each."""
    own, before = module._parameters, module.__dict__  # where Python looks first
    return [own[name] if name in own and name not in before else getattr(module, name) for name in names]


class DeepNarrowBase(Checkpointing):
    """Stacked parameters of L affine layers; a subclass says what one affine layer is."""

    _family: str
    """Of the ops."""
    first_bias: nn.Parameter
    hidden_weight: Any  # nn.Parameter, or an nn.ParameterList of the chunks
    hidden_bias: Any
    last_weight: nn.Parameter
    last_bias: nn.Parameter

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
        optimizer: str,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.depth = check_count("depth", depth, 2)
        self._inputs, self._outputs, self._tap = inputs, outputs, tap
        self.width = inputs + 1 + outputs
        self.scale = check_number("scale", self.depth if scale is None else scale, positive=True)
        self.rho, self.beta = check_number("rho", rho), check_number("beta", beta)
        if form not in ("offset", "plain"):
            raise ValueError(f"form must be 'offset' or 'plain', got {form!r}")
        if init not in ("ntk", "kaiming"):
            raise ValueError(f"init must be 'ntk' or 'kaiming', got {init!r}")
        if init == "kaiming" and form == "offset":
            raise ValueError("init='kaiming' needs form='plain': the offset form stores W - E, got form='offset'")
        self.init, self.form = init, form
        if (dtype or torch.get_default_dtype()) not in DTYPES:
            default = "" if dtype else " (torch.get_default_dtype())"
            got = dtype or torch.get_default_dtype()
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {got}{default}")
        limits = torch.finfo(dtype or torch.get_default_dtype())
        if not limits.tiny <= self.scale * self.scale * self.depth <= limits.max:
            raise ValueError(f"scale must have scale**2 * depth within the range of {limits.dtype}, got {self.scale}")
        for name, value, deviation in (("rho", self.rho, self.rho), ("beta", self.beta, self.scale * self.beta)):
            if deviation > limits.max / 100:  # no draw is 100 standard deviations away
                raise ValueError(f"{name} must give random weights within the range of {limits.dtype}, got {value}")
        self.checkpoint = checkpoint
        if budget is not None and checkpoint != "auto":
            raise ValueError(f"budget needs checkpoint='auto', got checkpoint={checkpoint!r}")
        self.budget, self.optimizer = budget, optimizer
        self.chunks = check_count("chunks", chunks, 1)
        if self.chunks > max(1, self.depth - 2):
            raise ValueError(f"chunks must be at most the number of hidden layers, {self.depth - 2}, got {chunks}")
        n = self.width
        layers = self.depth - 2
        shapes = {
            "first_weight": (n, inputs, *tap),
            "first_bias": (n,),
            "hidden_weight": (layers, n, n, *tap),
            "hidden_bias": (layers, n),
            "last_weight": (outputs, n, *tap),
            "last_bias": (outputs,),
        }
        if layers * n * n * math.prod(tap) * limits.bits // 8 > LARGEST:
            raise ValueError(f"depth must leave the weights addressable, got {depth} layers of width {n}")
        for name, shape in shapes.items():
            if self.chunks == 1 or "hidden" not in name:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
                continue
            self.add_module(
                name,
                nn.ParameterList(
                    torch.empty(end - begin, *shape[1:], device=device, dtype=dtype)
                    for begin, end in pairwise(state.borders(layers, self.chunks))
                ),
            )
        self.reset_parameters()
        self._leave_empty_gradients_out()

    @property
    def ntk_lr(self) -> float:
        """1 / (L C_L^2), the rate of the thesis's gradient flow (section 3.2)."""
        return 1.0 / self.depth / self.scale / self.scale

    def in_chunks(self, name: str) -> list[Tensor]:
        """A parameter of ``PARAMETER_NAMES`` as the chunks that it is stored in; most are one."""
        value = getattr(self, name)
        return list(value) if isinstance(value, nn.ParameterList) else [value]

    def spans(self) -> list[LayerSpan]:
        """Which layers are stored in which parameters: the first layer, the chunks of hidden ones, the last."""
        hidden = zip(self.in_chunks("hidden_weight"), self.in_chunks("hidden_bias"), strict=True)
        found = [LayerSpan(range(1), self.first_weight, self.first_bias)]
        for weight, bias in hidden:
            begin = found[-1].layers.stop
            found.append(LayerSpan(range(begin, begin + weight.shape[0]), weight, bias))
        return [*found, LayerSpan(range(self.depth - 1, self.depth), self.last_weight, self.last_bias)]

    def _own(self) -> list[Tensor]:
        """The six parameters, chunk by chunk, without what a subclass adds."""
        return [param for span in self.spans() for param in (span.weight, span.bias)]

    def arguments(self) -> tuple[Any, ...]:
        """The six parameters as narrowdeep.functional takes them: tensors, or lists of chunks.

        Raises: NotImplementedError where torch.nn.utils norms or prunes one that is not the weight it is taken for;
            TypeError where a cast has left another dtype than float32 or float64.
        """
        state.refuse_changes(self, PARAMETER_NAMES, self.form, images=bool(self._tap))
        parts = _attributes(self, PARAMETER_NAMES)
        if parts[0].dtype not in DTYPES:
            raise TypeError(
                f"the model must be of torch.float32 or torch.float64, got {parts[0].dtype}: cast it back by float(); "
                f"{HALF}"
            )
        return tuple(
            _attributes(part, map(str, range(len(part)))) if isinstance(part, nn.ParameterList) else part
            for part in parts
        )

    def stacked(self) -> tuple[Tensor, ...]:
        """The six parameters in the order of the ops; copies of those that are stored in several chunks.

        Raises: NotImplementedError as ``arguments``.
        """
        state.refuse_changes(self, PARAMETER_NAMES, self.form, images=bool(self._tap))
        with torch.enable_grad():  # a copy requires gradients where a chunk does
            parts = [self.in_chunks(name) for name in PARAMETER_NAMES]
            return tuple(torch.cat(part) if len(part) > 1 else part[0] for part in parts)

    def param_groups(self, *, weight_decay: float = 0.0, **options: Any) -> list[dict[str, Any]]:
        """Groups for an optimizer of torch that decay the weights and not the biases.

        The usual rule, to decay what has two dimensions or more, decays ``hidden_bias`` here, which is stacked
        (L-2, n). In offset form the parameters hold W - E, so decay draws W to the identity part E of its
        initialisation, and not to 0.

        Arguments:
            weight_decay: of the weights, finite and not negative.
            options: for both groups, such as ``lr``.

        Returns: two groups, of the parameters that require gradients now; one where the others are all frozen.

        Raises: TypeError or ValueError naming the argument, the rule and the value.

        Examples:
            >>> import torch
            >>> from narrowdeep import DeepNarrowMLP
            >>> model = DeepNarrowMLP(2, 1, depth=100)
            >>> [group["weight_decay"] for group in model.param_groups(weight_decay=0.01)]
            [0.01, 0.0]
        """
        decay = {"weight": check_number("weight_decay", weight_decay), "bias": 0.0}
        groups = []
        for kind, value in decay.items():
            params = [p for name in PARAMETER_NAMES if name.endswith(kind) for p in self.in_chunks(name)]
            params = [p for p in params if p.requires_grad]
            if params:
                groups.append({**options, "params": params, "weight_decay": value})
        return groups

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

        Raises: RuntimeError where a parameter is parametrized or pruned.

        Examples:
            >>> import torch
            >>> from narrowdeep import DeepNarrowMLP
            >>> model = DeepNarrowMLP(2, 1, depth=10)
            >>> model.reset_parameters(torch.Generator().manual_seed(3))
        """
        self._require_parameters("reset_parameters")
        if self.first_weight.is_meta:  # no numbers to draw, and torch would load its compiler to draw none
            return
        parts = self.identity_part() if self.form == "plain" and self.init == "ntk" else {}
        for name in PARAMETER_NAMES:
            for param in self.in_chunks(name):
                self.draw(name, param, parts, generator)

    def draw(
        self, name: str, param: Tensor, parts: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> None:
        """Draw the parameter ``name``, or one chunk of it; ``parts`` are what is added, the identity part or nothing.

        It reads no parameter of the model's own: a stage on another machine draws what the whole network would.
        """
        kind, middle = name.rpartition("_")[2], self._inputs
        if self.init == "kaiming":
            if kind == "bias":
                param.zero_()
            else:
                fan_in = (self._inputs if name == "first_weight" else self.width) * math.prod(self._tap)
                bound = math.sqrt(6.0 / fan_in)
                param.uniform_(-bound, bound, generator=generator)
            return
        param.zero_()
        std = self.scale * self.beta
        if kind == "weight":
            std = self.rho if self._tap else self.rho / math.sqrt(self._inputs)
        if name.startswith("first"):
            param[middle].normal_(0.0, std, generator=generator)
        elif name == "hidden_weight":
            param[:, middle, : self._inputs].normal_(0.0, std, generator=generator)
        elif name == "hidden_bias":
            param[:, middle].normal_(0.0, std, generator=generator)
        if parts:
            param.add_(parts[name])

    def _require_parameters(self, what: str) -> None:
        """Raise RuntimeError where writing to a parameter would write to a value computed from others."""
        for name, kind in state.changes(self, PARAMETER_NAMES):
            raise RuntimeError(f"{what} needs parameters that hold values of their own, got {name} with {kind}")

    @torch.no_grad()
    def layers(self, *, dtype: torch.dtype | None = None) -> list[tuple[Tensor, Tensor]]:
        """(W, b) of each of the L affine layers, copies, with the identity part added back in offset form.

        Arguments:
            dtype: of what is returned, default the model's. In float32, W = E + Delta has lost whatever of Delta is
                below half an ulp of E; torch.float64 keeps all of a float32 model.

        Examples:
            >>> import torch
            >>> from narrowdeep import DeepNarrowMLP
            >>> weight, bias = DeepNarrowMLP(2, 1, depth=100).layers()[1]
            >>> weight[0], weight[3]  # a left and a right unit: the identity
            (tensor([1., 0., 0., 0.]), tensor([0., 0., 0., 1.]))
        """
        wanted = self.first_weight.dtype if dtype is None else dtype
        values = {}
        parts = self.identity_part() if self.form == "offset" else {}
        for name, value in zip(PARAMETER_NAMES, self.stacked(), strict=True):
            values[name] = value.detach().to(wanted, copy=True)
            if parts:
                values[name] += parts[name].to(wanted)
        hidden = zip(values["hidden_weight"], values["hidden_bias"], strict=True)
        return [
            (values["first_weight"], values["first_bias"]),
            *hidden,
            (values["last_weight"], values["last_bias"]),
        ]

    @classmethod
    def _from_layers(cls, layers: Sequence[tuple[Tensor, Tensor]], *sizes: int, **settings: Any) -> Any:
        """A model of these layers, on their device, that draws no random numbers for what is overwritten."""
        settings["dtype"] = layers[0][0].dtype if settings["dtype"] is None else settings["dtype"]
        made: Any = cls(*sizes, **settings, device="meta")
        model = made.to_empty(device=layers[0][0].device)
        model.load_layers(layers)
        return model

    @torch.no_grad()
    def load_layers(self, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
        """The way back from ``layers()``. In offset form the identity part is subtracted in float64, then rounded.

        Arguments:
            layers: (W, b) of each of the L affine layers, of any floating dtype and on any device.

        Raises: TypeError or ValueError, before anything is written, naming the layer, its shape and the rule;
            RuntimeError where a parameter is parametrized or pruned.

        Examples:
            >>> import torch
            >>> from narrowdeep import DeepNarrowMLP
            >>> model, other = DeepNarrowMLP(2, 1, depth=10), DeepNarrowMLP(2, 1, depth=10)
            >>> other.load_layers(model.layers(dtype=torch.float64))
            >>> torch.equal(other.hidden_weight, model.hidden_weight)
            True
        """
        self._require_parameters("load_layers")
        given = list(layers)
        if len(given) != self.depth:
            raise ValueError(f"layers must be {self.depth} pairs of a weight and a bias, got {len(given)}")
        hidden = [[row for chunk in self.in_chunks(f"hidden_{kind}") for row in chunk] for kind in ("weight", "bias")]
        targets = [
            ("first", self.first_weight, self.first_bias),
            *(("hidden", *pair) for pair in zip(*hidden, strict=True)),
            ("last", self.last_weight, self.last_bias),
        ]
        for i, (_, *wanted) in enumerate(targets):
            convert.check_layer(f"layers[{i}]", given[i], wanted)
        parts = self.identity_part() if self.form == "offset" else None
        for (place, *wanted), values in zip(targets, given, strict=True):
            for kind, value, target in zip(("weight", "bias"), values, wanted, strict=True):
                if parts is not None:
                    value = value.double() - parts[f"{place}_{kind}"].to(value.device, torch.float64)
                target.copy_(value)

    def hidden_states(self, x: Tensor, layers: Iterable[int]) -> Tensor:
        """h_l = relu(z_l) after each of the given affine layers l, the whole state with its identity part.

        One pass up to the last of them; no other states are kept, but those that ``checkpoint`` keeps for a backward.
        Differentiable once, by ``backward`` and ``torch.autograd.grad``.

        Arguments:
            x: as for a call, ``(*, in)`` or ``(*, C, H, W)``.
            layers: a list or range of layer numbers from 1 (after the first affine layer) to depth - 1 (before the
                last), in any order.

        Returns: (len(layers), *, n) for an MLP, (len(layers), *, n, H, W) for a CNN; units are ordered
            [in left, 1 middle, out right].

        Raises: TypeError or ValueError naming the argument, the rule and the value.

        Examples:
            >>> import torch
            >>> from narrowdeep import DeepNarrowMLP
            >>> model = DeepNarrowMLP(2, 1, depth=1000)
            >>> model.hidden_states(torch.rand(5, 2), layers=[1, 500, 999]).shape
            torch.Size([3, 5, 4])
        """
        wanted = hidden.check_layers(layers, self.depth)
        params = self.arguments()
        x = cast_up(x, self.first_weight)
        check_tensors(x, {name: getattr(self, name) for name in ("first_weight", "last_weight")})
        dims = 1 + len(self._tap)
        if x.dim() < dims or x.shape[-dims] != self._inputs or 0 in x.shape[x.dim() - dims :]:
            sample = f"{self._inputs}, H, W" if self._tap else f"{self._inputs}"
            raise ValueError(f"x must have shape (*, {sample}), got {tuple(x.shape)}")
        batch, sample_shape = x.shape[:-dims], x.shape[-dims:]
        if not wanted:
            return x.new_empty(0, *batch, self.width, *sample_shape[1:])
        segment = self.segment(x.numel() // self._inputs)
        settings = (wanted, self.scale, self.form == "offset", segment)
        states = hidden.hidden_states(self._family, x.reshape(-1, *sample_shape), params, *settings)
        return torch.stack(states).reshape(len(wanted), *batch, self.width, *sample_shape[1:])

    # ---- what nn.Module does to its parameters ----

    def get_extra_state(self) -> Tensor:
        """Form and scale, which a state dict carries beside the parameters: without them it is another network."""
        return state.pack_identity(self.form, self.scale)

    def set_extra_state(self, packed: Any) -> None:
        """Changes nothing. Raises: RuntimeError if the state is of a model of another form or scale."""
        state.check_identity(packed, self.form, self.scale)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        own = bool(local_metadata.get("assign_to_params_buffers"))
        for name in ("hidden_weight", "hidden_bias"):
            state.rechunk(state_dict, prefix + name, self.chunks, own=own)
        key = f"{prefix}_extra_state"
        params = {name: p for name, p in self.named_parameters() if name.split(".")[0] in PARAMETER_NAMES}
        if key in state_dict and not state.sizes_differ(state_dict, prefix, params):
            self.set_extra_state(state_dict[key])  # raises before anything is copied
        else:
            state_dict.pop(key, None)  # torch names the sizes, or it is from before a state dict carried this
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        missing_keys: list[str] = args[1]
        if key in missing_keys:
            missing_keys.remove(key)
        self._leave_empty_gradients_out()

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first. Raises: NotImplementedError."""
        raise NotImplementedError(NO_TORCHSCRIPT)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(state.keeping_layout(fn), recurse)
        self._leave_empty_gradients_out()
        return self

    def __setstate__(self, settings: dict[str, Any]) -> None:
        super().__setstate__(settings)
        self._leave_empty_gradients_out()

    def _leave_empty_gradients_out(self) -> None:
        """No ``.grad`` for the hidden parameters of 2 layers, which are empty: an infinity norm of nothing raises."""
        for param in (self.hidden_weight, self.hidden_bias) if self.depth == 2 else ():
            if param.is_leaf and not param._post_accumulate_grad_hooks:
                trained = param.requires_grad  # a frozen one takes no hook, and may be trained later
                param.requires_grad_().register_post_accumulate_grad_hook(_drop_gradient)
                param.requires_grad_(trained)

    def extra_repr(self) -> str:
        return (
            f"{self._inputs}, {self._outputs}, depth={self.depth}, width={self.width}, scale={self.scale:g}, "
            f"rho={self.rho:g}, beta={self.beta:g}, init={self.init!r}, form={self.form!r}, "
            f"checkpoint={self.checkpoint!r}"
            + (f", chunks={self.chunks}" if self.chunks > 1 else "")
            + (f", budget={self.budget}" if self.budget is not None else "")
            + (f", optimizer={self.optimizer!r}" if self.optimizer != "sgd" else "")
        )
