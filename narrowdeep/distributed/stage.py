"""A network cut into stages: modules that stand one behind the other, on one machine or on many.

A stage takes a state and gives the next one (``narrowdeep.ops.reference``), with the batch first, as pipelines divide
what they are given: (B, 3, n, *positions) in offset form, (B, 1, n, *positions) in plain form. The first stage takes x,
the last gives f(x). That is all that goes between two machines.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from narrowdeep.chain.span import in_spans, span
from narrowdeep.checks import check_count
from narrowdeep.functional import cast_up, check_tensors
from narrowdeep.memory.step import auto_segment
from narrowdeep.modules import state
from narrowdeep.modules.base import DTYPES, HALF, PARAMETER_NAMES, DeepNarrowBase
from narrowdeep.ops.params import Affine


class Stage(nn.Module):
    """Consecutive chunks of a network, with its ends where they reach them (``narrowdeep.distributed.stages``).

    Its parameters are those of the model it is cut from, under the same names, so that the state dicts of all stages
    together are the model's. It loads its share from a state dict of the whole model, of any number of chunks.

    Attributes: ``checkpoint``, as of the model; ``is_first`` and ``is_last``.

    Call: x (B, in) or (B, C, H, W), or a state (B, words, n, *positions) -> a state, or f(x) (B, out).

    Raises: TypeError or ValueError naming the argument, the rule and the value.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.distributed import stages
        >>> first, last = stages(DeepNarrowMLP(2, 1, depth=100, chunks=2), 2)
        >>> state = first(torch.rand(5, 2))
        >>> state.shape, last(state).shape  # base, hi and lo of 4 units
        (torch.Size([5, 3, 4]), torch.Size([5, 1]))
    """

    def __init__(self, model: DeepNarrowBase, begin: int, end: int) -> None:
        super().__init__()
        self.is_first, self.is_last = begin == 0, end == model.chunks
        self.scale, self.form, self.checkpoint = model.scale, model.form, model.checkpoint
        self._family, self._outputs, self._chunks = model._family, model._outputs, model.chunks
        self._inputs, self._width, self._tap = model._inputs, model.width, model._tap
        self._shapes = {name: [tuple(p.shape) for p in model.in_chunks(name)] for name in PARAMETER_NAMES}
        lengths = [shape[0] for shape in self._shapes["hidden_weight"]]
        self._start = sum(lengths[:begin])
        self._layers = sum(lengths[begin:end])
        self._own = range(begin, end)
        for name in PARAMETER_NAMES:
            value = getattr(model, name)
            if isinstance(value, nn.ParameterList):
                self.add_module(name, nn.ParameterDict({str(i): value[i] for i in self._own}))
            elif name.startswith("hidden") or (self.is_first if name.startswith("first") else self.is_last):
                self.register_parameter(name, value)
        # The same network of two layers, without numbers: it says what is drawn.
        kernel = {"kernel_size": self._tap[0]} if self._tap else {}
        settings = {name: getattr(model, name) for name in ("scale", "rho", "beta", "init", "form")}
        made: Any = type(model)
        self._ends = (made(self._inputs, self._outputs, 2, **kernel, **settings, device="meta"),)  # no submodule

    def in_chunks(self, name: str) -> list[Tensor]:
        """A parameter of the network as the chunks of it that are here; none where it is another stage's."""
        value = getattr(self, name, None)
        return [] if value is None else list(value.values()) if isinstance(value, nn.ParameterDict) else [value]

    def forward(self, input: Tensor) -> Tensor:
        ends = [self._end(name) for name in ("first", "last")]
        pairs = zip(self.in_chunks("hidden_weight"), self.in_chunks("hidden_bias"), strict=True)
        hidden = [Affine(*pair) for pair in pairs]
        if hidden[0].weight.dtype not in DTYPES:
            raise TypeError(
                f"the stage must be of torch.float32 or torch.float64, got {hidden[0].weight.dtype}: {HALF}"
            )
        input = cast_up(input, hidden[0].weight)
        check_tensors(input, {"hidden_weight": hidden[0].weight})
        words = 3 if self.form == "offset" else 1
        sample = (self._inputs,) if self.is_first else (words, self._width)
        dims = len(sample) + len(self._tap)
        if input.dim() != dims + 1 or tuple(input.shape[1 : len(sample) + 1]) != sample or 0 in input.shape[1:]:
            expected = ", ".join(["B", *map(str, sample), *("H", "W")[: len(self._tap)]])
            raise ValueError(f"x must have shape ({expected}), got {tuple(input.shape)}")
        positions = input.shape[0] * math.prod(input.shape[len(sample) + 1 :])
        segment, snapshots = self._checkpointing(positions)
        if input.requires_grad and not torch.compiler.is_compiling():  # gloo receives gradients as they are laid out
            input = input.view_as(input)
            input.register_hook(torch.Tensor.contiguous)
        value = input if self.is_first else input.movedim(0, -1)
        settings = (self.scale, self.form == "offset", self._outputs, self._start)
        for params, of in in_spans(ends[0], hidden, ends[1], *settings):
            value = span(self._family, value, params, of, segment, snapshots)
        return value if self.is_last else value.movedim(-1, 0).contiguous()

    def _end(self, name: str) -> Affine | None:
        parts = [part for kind in ("weight", "bias") for part in self.in_chunks(f"{name}_{kind}")]
        return Affine(*parts) if parts else None

    def _checkpointing(self, positions: int) -> tuple[int, int | None]:
        chosen = self.checkpoint
        if not torch.is_grad_enabled():
            return 0, None
        if isinstance(chosen, tuple):
            return chosen
        if chosen == "auto":
            sizes = self._inputs, self._outputs, math.prod(self._tap)
            # Many calls of many stages may be in flight: no room for each but that of its parameters.
            return auto_segment(self._layers + 2, *sizes, positions, most=0), None
        return 1 if chosen == "none" else chosen, None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initialisation again: the numbers that ``reset_parameters(generator)`` of the whole model draws.

        Those of the other stages are drawn too, a chunk at a time, and dropped: so the network depends on the seed, and
        not on who holds which part. For a model made with ``device="meta"``, after ``to_empty``.

        Examples:
            >>> import torch
            >>> from narrowdeep import DeepNarrowMLP
            >>> from narrowdeep.distributed import stages
            >>> large = DeepNarrowMLP(2, 1, depth=1000, chunks=4, device="meta")
            >>> stage = stages(large, 4)[1].to_empty(device="cpu")
            >>> stage.reset_parameters(torch.Generator().manual_seed(3))
        """
        (ends,) = self._ends
        own = self.in_chunks("hidden_weight")[0]
        parts = {}
        if ends.form == "plain" and ends.init == "ntk":
            parts = ends.to(own.dtype).to_empty(device=own.device).identity_part()
        for name, shapes in self._shapes.items():
            here = dict(zip(self._own if name.startswith("hidden") else range(1), self.in_chunks(name), strict=False))
            for i, shape in enumerate(shapes):
                param = here[i] if i in here else torch.empty(shape, dtype=own.dtype, device=own.device)
                ends.draw(name, param, parts, generator)

    # ---- its share of the model's state dict ----

    def get_extra_state(self) -> Tensor:
        """Form and scale, as the model's."""
        return state.pack_identity(self.form, self.scale)

    def set_extra_state(self, packed: Any) -> None:
        """Changes nothing. Raises: RuntimeError if the state is of a model of another form or scale."""
        state.check_identity(packed, self.form, self.scale)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if all(f"{prefix}{end}_weight" in state_dict for end in ("first", "last")):  # of the whole model
            for name in ("hidden_weight", "hidden_bias"):
                state.rechunk(state_dict, prefix + name, self._chunks, own=True)
            own = {prefix + name for name, _ in self.named_parameters()} | {f"{prefix}_extra_state"}
            for name in PARAMETER_NAMES:
                for key in [k for k in state_dict if k.startswith(prefix + name) and k not in own]:
                    del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def stages(model: DeepNarrowBase, n: int) -> list[Stage]:
    """The model in ``n`` stages of consecutive layers, about as many in each.

    Together they are the model, bit for bit on the CPU: ``nn.Sequential(*stages(model, n))`` computes what it does.
    Each has the parameters of whole chunks of it, the same tensors. What torch has for modules that stand one behind
    the other then works on depth: ``torch.distributed.pipelining.PipelineStage`` runs one on each rank,
    ``torch.distributed.fsdp.fully_shard`` shards one after another.

    Arguments:
        model: a DeepNarrowMLP or DeepNarrowCNN. One made with ``device="meta"`` takes no memory: each rank then calls
            ``to_empty`` and ``reset_parameters``, or ``load_state_dict``, of its own stage alone.
        n: stages, at least 1 and at most the model's ``chunks``.

    Raises: TypeError or ValueError naming the argument, the rule and the value.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.distributed import stages
        >>> model, x = DeepNarrowMLP(2, 1, depth=100, chunks=6), torch.rand(5, 2)
        >>> torch.equal(nn.Sequential(*stages(model, 3))(x), model(x))
        True
    """
    if not isinstance(model, DeepNarrowBase):
        raise TypeError(f"model must be a DeepNarrowMLP or DeepNarrowCNN, got {type(model).__name__}")
    count = check_count("n", n, 1)
    if count > model.chunks:
        raise ValueError(f"n must be at most the model's chunks, {model.chunks} (make it with chunks={count}), got {n}")
    if model.budget is not None:
        raise ValueError(f"model must have no budget, which is of all its layers at once, got {model.budget} bytes")
    state.refuse_changes(model, PARAMETER_NAMES, model.form, images=bool(model._tap))
    for name, kind in state.changes(model, PARAMETER_NAMES):
        raise ValueError(f"model must have parameters that hold values of their own, got {name} with {kind}")
    return [Stage(model, begin, end) for begin, end in pairwise(state.borders(model.chunks, count))]
