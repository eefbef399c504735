"""Random calls of the public API. A case is a pair of numbers, (seed, number), and the same on every machine.

Four in ten cases are *bad*: one argument of a good call is replaced by nonsense. Such a call must raise an error of the
library's own. A good one is compared with the same network in eager layers in float64, under the same transform.
"""

from __future__ import annotations

import math
import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import narrowdeep
from narrowdeep import functional, memory, ntk, optim
from narrowdeep.ops.cnn import op as cnn_op
from narrowdeep.ops.gram import op as gram_op
from narrowdeep.ops.mlp import op as mlp_op
from tests.ops.chains import CONV, MLP, eager

OURS = str(Path(narrowdeep.__file__).parent)
ERRORS = (TypeError, ValueError, NotImplementedError, RuntimeError)
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
MARGIN = {torch.float32: 1e-5, torch.float64: 1e-12}
"""A ReLU whose input is nearer to 0, relative to the largest of its layer, may go either way."""


@dataclass
class Call:
    """``function(**arguments)`` gives tensors, which ``expected()``, called afterwards, gives in float64."""

    name: str
    function: Callable[..., Sequence[Tensor]]
    arguments: dict[str, Any]
    expected: Callable[[], Sequence[Tensor]]
    dtype: torch.dtype = torch.float64
    raw: bool = False
    """An op, not a function: torch checks the types of its arguments, and some nonsense has a meaning."""
    keep: tuple[str, ...] = ()
    """Arguments that take almost anything."""


class Report:
    """How many calls of each kind there were."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))


class _Skip(Exception):  # noqa: N818 (no error)
    """No statement can be made of this case."""


class _Relus(TorchFunctionMode):
    """Keeps what is given to ``torch.relu``."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.relu:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))

    def check(self, dtype: torch.dtype) -> None:
        for z in (z for z in self.inputs if z.numel()):
            if not float(z.abs().min()) > MARGIN[dtype] * float(z.abs().max()):
                raise _Skip


# ---- a network and its data ----


@dataclass
class Net:
    """Arguments of a chain, each perhaps with unusual strides, and what is known of them."""

    rng: random.Random
    family: str = field(init=False)

    def __post_init__(self) -> None:
        rng = self.rng
        self.family, self.dtype = rng.choice(["mlp", "mlp", "cnn"]), rng.choice([torch.float32, torch.float64])
        image = self.family == "cnn"
        self.offset = rng.random() < 0.6
        self.inputs, self.outputs = rng.choice([1, 1, 2, 3, 5]), rng.choice([1, 1, 2, 3, 4])
        self.layers = rng.choice([0, 1, 2, 3, 7, 31, 32, 33, 40] if not image else [0, 1, 2, 5, 33])
        self.batch = rng.choice([0, 1, 2, 3, 8, 17, 33] if not image else [0, 1, 2, 9])
        self.width = self.inputs + 1 + self.outputs if self.offset or rng.random() < 0.7 else rng.choice([1, 2, 4, 9, 16])
        self.scale = rng.choice([0.5, 1.0, 7.0, float(self.layers + 2), 300.0])
        self.tap = (rng.choice([1, 3, 3, 5]),) * 2 if image else ()
        self.image = (rng.randint(1, 6), rng.randint(1, 6)) if image else ()
        n, taps = self.width, math.prod(self.tap)
        spread = 0.5 / math.sqrt(n * taps * (self.layers + 1)) if self.offset else math.sqrt(2 / (n * taps))
        weights = (n, self.inputs), (self.layers, n, n), (self.outputs, n)
        parts = []
        for i, shape in enumerate(weights):
            parts += [torch.randn(*shape, *self.tap) * (spread if i == 1 else 0.5), torch.randn(shape[:-1]) * 0.1]
        self.params = tuple(self.disguise(p.to(self.dtype)) for p in parts)
        self.x = self.samples(self.batch)
        self.eager_family = CONV if image else MLP
        self.ops = cnn_op.ops if image else mlp_op.ops

    def samples(self, count: int) -> Tensor:
        x = torch.rand(count, self.inputs, *self.image, dtype=self.dtype) + 0.05
        return self.disguise(torch.where(torch.rand_like(x) < self.rng.choice([0.0, 0.2]), -x, x))

    def disguise(self, tensor: Tensor) -> Tensor:
        """The same numbers with other strides, or where they need not be aligned; or one row for all of them."""
        kind = self.rng.randrange(8)
        if kind == 0 and tensor.dim() > 1:
            return tensor.mT.contiguous().mT
        if kind == 1:
            return torch.stack((tensor, torch.full_like(tensor, math.nan)), -1)[..., 0]
        if kind == 2 and tensor.numel():
            size = tensor.element_size()
            data = bytearray(1) + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert len(data) == 1 + size * tensor.numel()
            return torch.frombuffer(data, dtype=tensor.dtype, offset=1).view(tensor.shape)
        if kind == 3 and tensor.dim() > 1 and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        if kind == 4 and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        return tensor

    def eager(self, x: Tensor, *params: Tensor) -> Tensor:
        return eager(self.eager_family, (x, *params), self.scale, self.offset)

    def double(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _own_memory(*(t.detach().double() for t in tensors))

    def check_margin(self, *xs: Tensor, params: Sequence[Tensor] | None = None) -> list[Tensor]:
        with _Relus() as relus:
            for x in xs:
                self.eager(*self.double(x, *(params or self.params)))
        relus.check(self.dtype)
        return [z.relu() for z in relus.inputs]

    def model(self, **changes: Any) -> Any:
        """A module with the parameters of this net, which is one of the width that modules have."""
        settings = {"scale": self.scale, "form": "offset" if self.offset else "plain", "dtype": self.dtype} | changes
        if self.family == "mlp":
            model: Any = narrowdeep.DeepNarrowMLP(self.inputs, self.outputs, self.layers + 2, **settings)
        else:
            settings["kernel_size"] = self.tap[0]
            model = narrowdeep.DeepNarrowCNN(self.inputs, self.outputs, self.layers + 2, **settings)
        with torch.no_grad():
            for name, value in zip(functional_names(), self.params, strict=True):
                parts = model.in_chunks(name)
                for part, piece in zip(parts, value.split([p.shape[0] for p in parts]), strict=True):
                    part.copy_(piece)
        return model

    def of_module_width(self) -> Net:
        if self.width != self.inputs + 1 + self.outputs:
            raise _Skip
        return self


def _own_memory(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Torch's forward mode takes no tensor whose rows are one in memory."""
    return tuple(t.clone(memory_format=torch.contiguous_format) if 0 in t.stride() else t for t in tensors)


def functional_names() -> tuple[str, ...]:
    return "first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias"


# ---- transforms: the same for the library's function and for eager layers ----

Function = Callable[..., Tensor]


def _backward(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = f(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)


def _twice(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    """A second backward through a graph that is retained."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = f(*leaves)
    torch.autograd.grad(out, leaves, grad, materialize_grads=True, retain_graph=True)
    return torch.autograd.grad(out, leaves, grad, materialize_grads=True)


def _some(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    leaves = [t.detach().requires_grad_(i in (0, 3)) for i, t in enumerate(tensors)]
    return torch.autograd.grad(f(*leaves), [leaves[0], leaves[3]], grad, materialize_grads=True)


def _jvp(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    return torch.func.jvp(f, _own_memory(*tensors), seeds)


def _vjp(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    out, pull = torch.func.vjp(f, *tensors)
    return out, *pull(grad)


def _linearize(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    out, push = torch.func.linearize(f, *_own_memory(*tensors))
    return out, push(*seeds)


def _dual(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    forward_ad = torch.autograd.forward_ad
    tensors = _own_memory(*tensors)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, s) if i % 2 == 0 else t for i, (t, s) in enumerate(zip(tensors, seeds, strict=True))]
        primal, tangent = forward_ad.unpack_dual(f(*duals))
        return primal, torch.zeros_like(primal) if tangent is None else tangent


def _per_sample(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    def loss(x: Tensor, g: Tensor, *params: Tensor) -> Tensor:
        return (f(x[None], *params)[0] * g).sum()

    wanted = (0, 2, 4, 5)
    gradient = torch.func.grad(loss, wanted)
    return torch.func.vmap(gradient, (0, 0, *(None,) * 6))(tensors[0], grad, *tensors[1:])


def _ensemble(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    params = [torch.stack((t, t + 0.01 * s)) for t, s in zip(tensors[1:], seeds[1:], strict=True)]
    return (torch.func.vmap(f, (None, *(0,) * 6))(tensors[0], *params),)


def _nothing(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    return (f(*tensors),)


def _no_grad(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        return (f(*[t.detach().requires_grad_() for t in tensors]),)


def _inference(f: Function, tensors: tuple[Tensor, ...], seeds: tuple[Tensor, ...], grad: Tensor) -> Sequence[Tensor]:
    with torch.inference_mode():
        return (f(*tensors).clone(),)


PLAIN = (_nothing, _no_grad, _inference, _backward, _twice, _some)
TRANSFORMS = (*PLAIN, _backward, _jvp, _vjp, _linearize, _dual, _per_sample, _ensemble)


# ---- kinds of calls ----


def chain(rng: random.Random) -> Call:
    """narrowdeep.functional, in chunks or not, under a transform."""
    net = Net(rng)
    transform = rng.choice(TRANSFORMS)
    layers = net.layers
    cuts = sorted(rng.sample(range(1, layers), rng.randint(1, min(3, layers - 1)))) if layers > 1 and rng.random() < 0.3 else []
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]
    seeds = tuple(torch.randn_like(t) for t in (net.x, *net.params))
    grad = net.disguise(torch.randn(net.batch, net.outputs, dtype=net.dtype))
    mode = torch.autocast("cpu", torch.bfloat16) if rng.random() < 0.2 else nullcontext()
    function = functional.mlp_chain if net.family == "mlp" else functional.conv_chain
    segment = rng.choice([0, 1, 2, 5, 64, 2**62])
    snapshots = rng.choice([None, None, 1, 2, 3]) if segment else None

    def run(*, scale: Any, form: Any, segment: Any, snapshots: Any = None, **tensors: Any) -> Sequence[Tensor]:
        def f(x: Any, *params: Any) -> Tensor:
            w1, b1, wh, bh, wl, bl = params
            if cuts and isinstance(wh, Tensor) and isinstance(bh, Tensor) and min(wh.dim(), bh.dim()) > 0:
                if wh.layout == torch.strided == bh.layout and not wh.is_nested and wh.shape[0] == layers == bh.shape[0]:
                    wh, bh = wh.split(sizes), bh.split(sizes)
            with mode:
                return function(x, w1, b1, wh, bh, wl, bl, scale=scale, form=form, segment=segment, snapshots=snapshots)

        values = tuple(tensors.values())
        good = all(isinstance(v, Tensor) and v.layout == torch.strided and v.dtype == net.dtype for v in values)
        return transform(f, values, seeds, grad) if good and not bad_shapes(values) else (f(*values),)

    def bad_shapes(values: Sequence[Tensor]) -> bool:
        return any(v.is_nested or v.is_meta or v.shape != s.shape for v, s in zip(values, seeds, strict=True))

    def expected() -> Sequence[Tensor]:
        net.check_margin(net.x)
        if transform is _ensemble:
            net.check_margin(net.x, params=[p + 0.01 * s for p, s in zip(net.params, seeds[1:], strict=True)])
        # Torch's own linearize is wrong where tensors are written to, as eager() does with its identity part.
        truth = _jvp if transform is _linearize else transform
        return truth(net.eager, net.double(net.x, *net.params), net.double(*seeds), *net.double(grad))

    arguments = {"x": net.x, **dict(zip(functional_names(), net.params, strict=True))}
    arguments |= {"scale": net.scale, "form": "offset" if net.offset else "plain", "segment": segment}
    if snapshots is not None:
        arguments["snapshots"] = snapshots
    return Call(f"chain/{transform.__name__}", run, arguments, expected, net.dtype)


def module(rng: random.Random) -> Call:
    """A module made, called and differentiated; its hidden states."""
    net = Net(rng).of_module_width()
    dims = rng.choice([(), (), (2,), (1, 2)]) if net.batch else ()
    x = net.x.expand(*dims, *net.x.shape) if dims else net.x
    wanted = [rng.randint(1, net.layers + 1) for _ in range(rng.randint(0, 3))]
    grad = torch.randn(*dims, net.batch, net.outputs, dtype=net.dtype)
    settings: dict[str, Any] = {
        "scale": net.scale,
        "rho": rng.choice([0.0, 0.5, 1.0]),
        "beta": 1.0,
        "checkpoint": rng.choice(["auto", "none", 1, 3, (1, 2), (2, 1), (5, 2)]),
        "chunks": rng.randint(1, max(1, min(4, net.layers))),
        "form": "offset" if net.offset else "plain",
        "dtype": net.dtype,
    }
    settings |= {"budget": rng.choice(["1GiB", 2**40])} if settings["checkpoint"] == "auto" and rng.random() < 0.5 else {}
    ends = {"inputs": net.inputs, "outputs": net.outputs, "depth": net.layers + 2}

    def run(*, x: Any, layers: Any, inputs: Any, outputs: Any, depth: Any, **settings: Any) -> Sequence[Tensor]:
        if net.family == "mlp":
            narrowdeep.DeepNarrowMLP(inputs, outputs, depth, **settings)
        else:
            narrowdeep.DeepNarrowCNN(inputs, outputs, depth, **{"kernel_size": net.tap[0]} | settings)
        settings.pop("kernel_size", None)
        model = net.model(**settings)
        if isinstance(x, Tensor) and x.is_floating_point() and x.layout == torch.strided and not x.is_nested:
            x = x.detach().requires_grad_()
        out = model(x)
        found = torch.autograd.grad(out, [x, model.first_weight], grad, materialize_grads=True)
        states = model.hidden_states(x, layers)
        return out.detach(), *found, states.detach()

    def expected() -> Sequence[Tensor]:
        states = net.check_margin(net.x)
        x, *params = (t.requires_grad_() for t in net.double(net.x, *net.params))
        many = x.expand(*dims, *x.shape).reshape(-1, *x.shape[1:])
        out = net.eager(many, *params).reshape(*dims, net.batch, net.outputs)
        gradient = torch.autograd.grad(out, [params[0]], grad.double(), retain_graph=True, materialize_grads=True)
        if dims:  # of the expanded x itself
            leaf = many.detach().requires_grad_()
            g_x = torch.autograd.grad(net.eager(leaf, *params), leaf, grad.double().flatten(0, -2))[0]
            g_x = g_x.reshape(*dims, *x.shape)
        else:
            g_x = torch.autograd.grad(out, x, grad.double(), materialize_grads=True)[0]
        shape = (len(wanted), *dims, net.batch, net.width, *net.image)
        hidden = [states[i - 1].expand(shape[1:]) for i in wanted]
        return out.detach(), g_x, *gradient, torch.stack(hidden) if hidden else torch.empty(shape)

    return Call("module", run, {"x": x, "layers": wanted, **ends, **settings}, expected, net.dtype, keep=("layers",))


def spans(rng: random.Random) -> Call:
    """The raw ops of a chain that is cut in two: forward, backward and tangent."""
    net = Net(rng)
    cut, seg = rng.randint(0, net.layers), rng.choice([0, 1, 2, 5, 64])
    seeds = tuple(torch.randn_like(t) for t in (net.x, *net.params))
    grad = net.disguise(torch.randn(net.batch, net.outputs, dtype=net.dtype))
    w1, b1, wh, bh, wl, bl = net.params
    arguments: dict[str, Any] = {"x": net.x, "w1": w1, "b1": b1, "wh": wh[:cut], "bh": bh[:cut]}
    arguments |= {"tail_wh": wh[cut:], "tail_bh": bh[cut:], "wl": wl, "bl": bl}
    arguments |= {"scale": net.scale, "offset": net.offset, "outputs": net.outputs, "start": cut, "segment": seg}
    arguments |= {"grad": grad, "origin": 0}

    def run(*, x: Any, scale: Any, offset: Any, outputs: Any, start: Any, segment: Any, grad: Any, **p: Any) -> Sequence[Tensor]:
        first = (p["w1"], p["b1"], p["wh"], p["bh"], None, None)
        last = (None, None, p["tail_wh"], p["tail_bh"], p["wl"], p["bl"])
        settings, origin = (scale, offset, outputs), p["origin"]
        state, saved = net.ops.forward(x, *first, *settings, origin, segment)
        out, kept = net.ops.forward(state, *last, *settings, start, segment)
        g_state, *g_last = net.ops.backward(grad, state, *last, kept, *settings, start, segment, True, True)
        g_x, *g_first = net.ops.backward(g_state, x, *first, saved, *settings, origin, segment, True, True)
        t = (seeds[0], *seeds[1:3], seeds[3][:cut], seeds[4][:cut], None, None)
        state_t = net.ops.jvp(x, *first, *t, *settings, origin)
        t = (state_t, None, None, seeds[3][cut:], seeds[4][cut:], *seeds[5:])
        tangent = net.ops.jvp(state, *last, *t, *settings, start)
        hidden = [torch.cat((a, b)) for a, b in zip(g_first[2:4], g_last[2:4], strict=True)]
        return out, g_x, *g_first[:2], *hidden, *g_last[4:], tangent

    def expected() -> Sequence[Tensor]:
        net.check_margin(net.x)
        args, tangents = net.double(net.x, *net.params), net.double(*seeds)
        return *_backward(net.eager, args, tangents, grad.double()), torch.func.jvp(net.eager, args, tangents)[1]

    return Call("spans", run, arguments, expected, net.dtype, raw=True)


def _kernel(net: Net, x1: Tensor, x2: Tensor, frozen: Sequence[str] = ()) -> Tensor:
    """J J^T of the eager network in float64, (N1, N2, out, out)."""
    params = net.double(*net.params)
    moving = [i for i, name in enumerate(functional_names()) if name not in frozen]
    total = torch.zeros(x1.shape[0], x2.shape[0], net.outputs, net.outputs, dtype=torch.float64)
    if not moving or 0 in total.shape:
        return total

    def jacobians(x: Tensor) -> list[Tensor]:
        def f(*values: Tensor) -> Tensor:
            every = list(params)
            for i, value in zip(moving, values, strict=True):
                every[i] = value
            return net.eager(x, *every)

        found = torch.func.jacrev(f, tuple(range(len(moving))))(*(params[i] for i in moving))
        return [j.flatten(2) for j in found]

    for a, b in zip(jacobians(x1.double()), jacobians(x2.double()), strict=True):
        total += torch.einsum("iap,jbp->ijab", a, b)
    return total


def tangent_kernel(rng: random.Random) -> Call:
    """empirical_ntk and ntk_vector_product of a module; a raw gram op."""
    net = Net(rng).of_module_width()
    x1, x2 = net.x, net.samples(rng.choice([0, 1, 3, 5]))
    frozen = [name for name in functional_names() if rng.random() < 0.15]
    model = net.model(chunks=rng.randint(1, max(1, min(3, net.layers))))
    for name in frozen:
        for part in model.in_chunks(name):
            part.requires_grad_(False)
    v = torch.randn(x2.shape[0], net.outputs, dtype=net.dtype)
    kind = rng.choice(["full", "trace", "diagonal", "product", "raw"])
    factor = model.ntk_lr

    def expected() -> Sequence[Tensor]:
        net.check_margin(x1, x2)
        full = _kernel(net, x1, x2, () if kind == "raw" else frozen) * (1 if kind == "raw" else factor)
        if kind == "product":
            return (torch.einsum("ijab,jb->ia", full, v.double()),)
        diagonal = full.diagonal(dim1=2, dim2=3)
        return ({"trace": diagonal.sum(2), "diagonal": diagonal}.get(kind, full),)

    if kind == "product":
        arguments = {"model": model, "x1": x1, "x2": x2, "v": v, "scaled": True}
        return Call("ntk_vector_product", lambda **a: (ntk.ntk_vector_product(**a),), arguments, expected, net.dtype)
    if kind == "raw":
        op = gram_op.mlp_gram if net.family == "mlp" else gram_op.cnn_gram
        raw = {"x1": x1, "x2": x2, **dict(zip(functional_names(), net.params, strict=True)), "scale": net.scale}
        raw |= {"offset": net.offset, "symmetric": False, "trainable": 63, "reduce": 0}
        return Call("gram", lambda **a: (op(*a.values()),), raw, expected, net.dtype, raw=True)
    arguments = {"model": model, "x1": x1, "x2": x2, "reduce": kind, "scaled": True}
    return Call("empirical_ntk", lambda **a: (ntk.empirical_ntk(**a),), arguments, expected, net.dtype)


def jacobian(rng: random.Random) -> Call:
    net = Net(rng).of_module_width()
    arguments = {"model": net.model(), "x": net.x}

    def run(**a: Any) -> Sequence[Tensor]:
        return tuple(ntk.jacobian(**a).values())

    def expected() -> Sequence[Tensor]:
        net.check_margin(net.x)
        params = net.double(*net.params)
        if not net.batch:
            return tuple(p.new_zeros(0, net.outputs, *p.shape) for p in params)
        x = net.x.double()
        return torch.func.jacrev(lambda *p: net.eager(x, *p), tuple(range(6)))(*params)

    return Call("jacobian", run, arguments, expected, net.dtype)


def limits(rng: random.Random) -> Call:
    """The closed forms, pair by pair and position by position; and what their eigenvalues predict."""
    net = Net(rng)
    x1, x2 = net.x.detach(), net.samples(3)
    rho, beta, out = rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 0.3, 1.0]), rng.randint(1, 4)
    settings: dict[str, Any] = {"rho": rho, "beta": beta}
    size = net.tap[0] if net.tap else 1

    def mean(a: Tensor, b: Tensor, w: float) -> Tensor:
        qa, qb, c = (w * (u * v).sum(-1) + beta**2 for u, v in ((a, a), (b, b), (a, b)))
        sine = (qa * qb - c * c).clamp_min(0).sqrt()
        return (sine + torch.atan2(sine, -c) * c) / (2 * math.pi)

    def expected() -> Sequence[Tensor]:
        a, b = x1.double().relu(), x2.double().relu()
        if net.family == "mlp":
            return (a @ b.t() + out + mean(a[:, None], b[None], rho**2 / net.inputs),)
        height, width = net.image
        inside = torch.nn.functional.unfold(torch.ones(1, 1, height, width), size, padding=size // 2)[0].double()
        pairs = inside.t() @ inside
        p1, p2 = (torch.nn.functional.unfold(x, size, padding=size // 2).mT for x in (a, b))
        inner = mean(p1[:, None, :, None], p2[None, :, None, :], rho**2)
        inner = inner + out + torch.einsum("icp,jcq->ijpq", a.flatten(2), b.flatten(2))
        return ((inner * pairs).sum((2, 3)) / (height * width) ** 2,)

    if net.family == "mlp":
        arguments = {"x1": x1, "x2": x2, **settings, "out_features": out}
        return Call("limit_ntk_mlp", lambda **a: (ntk.limit_ntk_mlp(**a),), arguments, expected, net.dtype)
    arguments = {"x1": x1, "x2": x2, **settings, "kernel_size": size, "out_channels": out}
    return Call("limit_ntk_cnn", lambda **a: (ntk.limit_ntk_cnn(**a),), arguments, expected, net.dtype)


def prediction(rng: random.Random) -> Call:
    """loss_curve beside descent itself, max_learning_rate beside the eigenvalues."""
    n, steps = rng.randint(1, 6), rng.randint(0, 9)
    root = torch.randn(n, n + 2, dtype=torch.float64)
    kernel, y, momentum = root @ root.t(), torch.randn(n, 1, dtype=torch.float64), rng.choice([0.0, 0.5, 0.9])
    tau = 0.5 * n / float(torch.linalg.eigvalsh(kernel)[-1])

    def run(*, kernel: Any, y: Any, n_steps: Any, tau: Any, momentum: Any) -> Sequence[Tensor]:
        fastest = ntk.max_learning_rate(kernel, momentum=momentum)
        curve = ntk.loss_curve(kernel, y, n_steps, tau=tau, momentum=momentum)
        return torch.tensor([fastest], dtype=torch.float64), torch.as_tensor(curve)

    def expected() -> Sequence[Tensor]:
        f, velocity, losses = torch.zeros_like(y), torch.zeros_like(y), []
        for _ in range(steps + 1):
            losses.append((f - y).square().sum() / (2 * n))
            velocity = momentum * velocity + (f - y)
            f = f - tau / n * kernel @ velocity
        largest = float(torch.linalg.eigvalsh(kernel)[-1])
        return torch.tensor([2 * (1 + momentum) * n / largest], dtype=torch.float64), torch.stack(losses)

    arguments = {"kernel": kernel, "y": y, "n_steps": steps, "tau": tau, "momentum": momentum}
    return Call("loss_curve", run, arguments, expected, keep=("kernel", "y"))


def descent(rng: random.Random) -> Call:
    """A few steps of FusedSGD beside torch.optim.SGD on eager layers."""
    net = Net(rng).of_module_width()
    momentum, lr, target = rng.choice([0.0, 0.9]), 1e-3 / net.scale**2, torch.randn(net.batch, net.outputs)
    chunks = rng.randint(1, max(1, min(3, net.layers)))

    def steps(f: Function, optimizer: torch.optim.Optimizer, y: Tensor) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            (f() - y).square().sum().backward()
            optimizer.step()

    def run(*, lr: Any, momentum: Any, x: Any) -> Sequence[Tensor]:
        model = net.model(chunks=chunks)
        optimizer = optim.FusedSGD(model, lr, momentum)
        steps(lambda: model(x), optimizer, target.to(net.dtype))
        optimizer.remove()
        return tuple(p.detach() for p in model.stacked())

    def expected() -> Sequence[Tensor]:
        x, *params = net.double(net.x, *net.params)
        leaves = [p.clone().requires_grad_() for p in params]
        optimizer = torch.optim.SGD(leaves, lr, momentum)
        with _Relus() as relus:
            steps(lambda: net.eager(x, *leaves), optimizer, target.double())
        relus.check(net.dtype)
        return tuple(leaf.detach() for leaf in leaves)

    return Call("FusedSGD", run, {"lr": lr, "momentum": momentum, "x": net.x}, expected, net.dtype)


def planning(rng: random.Random) -> Call:
    """A plan keeps its budget, and the smallest budget that a refusal names is one that it takes."""
    net = Net(rng).of_module_width()
    model, shape = net.model(chunks=rng.randint(1, max(1, min(3, net.layers)))), (net.inputs, *net.image)
    arguments = {"model": model, "batch_size": rng.choice([1, 7, 10**6]), "input_shape": shape}
    arguments |= {"budget": rng.choice([1, 5000, "1GiB", "2 MB", 2**50])}
    arguments |= {"optimizer": rng.choice(["sgd", "momentum", "adam", "fused-sgd", "fused-momentum"])}

    def run(**a: Any) -> Sequence[Tensor]:
        try:
            plan = memory.plan(**a)
        except memory.BudgetError as error:
            plan = memory.plan(**a | {"budget": error.smallest})
        assert plan.budget is not None
        assert plan.total <= plan.budget
        return ()

    return Call("memory.plan", run, arguments, lambda: ())


KINDS = (chain, chain, chain, module, module, spans, spans, tangent_kernel, tangent_kernel, jacobian, limits, prediction)
KINDS += (descent, planning)


# ---- bad calls ----

HUGE = 10**400
NUMBERS = (-1.5, math.nan, math.inf, -math.inf, "one", True, HUGE, [1.0], 1j, object(), torch.ones(2))
COUNTS = (-1, -(2**63), 2**63, HUGE, 2.5, math.nan, "three", True, [3], 1j, object(), torch.ones(2, dtype=torch.int64))
TEXTS = ("twelve", "", 3.5, b"offset", ["plain"], 1j, object(), torch.ones(2))
RAW_COUNTS = (-1, -(2**63), 2**63 - 1, 2**62, 2**31, 10**6, *COUNTS)


def nonsense(rng: random.Random, call: Call, name: str) -> Any:
    """What ``name`` cannot be, whatever the other arguments are; of a raw op, what it may not be."""
    value = call.arguments[name]
    if isinstance(value, Tensor):
        return _bad_tensor(rng, value, name)
    if isinstance(value, bool):
        return rng.choice(("yes", 2.5, [True], object(), torch.ones(2)))
    if isinstance(value, int):
        return rng.choice(RAW_COUNTS if call.raw else COUNTS)
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice(TEXTS)
    if isinstance(value, tuple):
        return rng.choice(((), (0, 0), (2, "3"), (HUGE, 1), (math.nan, 1, 1), (1, 2, 3, 4, 5), object(), {"a": 1}))
    if isinstance(value, torch.dtype):
        return rng.choice((torch.int64, torch.float16, torch.complex64, "float32", 32, object()))
    return rng.choice((None, "model", torch.nn.Linear, object(), 3))  # for a module


def _bad_tensor(rng: random.Random, t: Tensor, name: str) -> Any:
    def nested() -> Tensor:
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])

    makers: list[Callable[[], Any]] = [
        *(lambda d=d: t.to(d) for d in (torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex128)),
        *(lambda v=v: v for v in (3, "x", [[1.0]], {"x": 1}, object())),
        lambda: t.contiguous().to_sparse(),
        nested,
        lambda: t.new_zeros(()),
        lambda: t.to("meta"),
        lambda: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    ]
    if name != "x2":
        makers.append(lambda: None)
    if not name.startswith("x"):
        makers += [lambda: t[None], lambda: torch.cat((t, t, t[:1] + 1, t.new_ones(1, *t.shape[1:])))]
    return rng.choice(makers)()


def _own_words(error: BaseException, raw: bool) -> bool:
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ERRORS) and bool(str(error)) and (last.startswith(OURS) or (raw and last.endswith("_ops.py")))


# ---- a case ----


def run(seed: int, number: int, report: Report, verbose: bool = False) -> str | None:
    """Run one case. Returns what is wrong with it, or None."""
    rng = random.Random(f"{seed}/{number}")
    torch.manual_seed(rng.getrandbits(60))
    torch.set_num_threads(rng.choice([1, 2, 3]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call = rng.choice(KINDS)(rng)
        except _Skip:
            report.counts["skipped"] += 1
            return None
        changed = None
        if rng.random() < 0.4:
            changed = rng.choice([name for name in call.arguments if name not in call.keep])
            call.arguments[changed] = nonsense(rng, call, changed)
        if verbose:
            print(call.name, "bad:" if changed else "", changed or "", {n: _shown(v) for n, v in call.arguments.items()})
        return _bad(call, changed, report) if changed else _good(call, report)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.layout} {'nested' if value.is_nested else tuple(value.shape)} on {value.device}"
    text = type(value).__name__ if isinstance(value, torch.nn.Module) else repr(value) if value != HUGE else "10**400"
    return text[:200]


def _bad(call: Call, changed: str, report: Report) -> str | None:
    report.counts["bad"] += 1
    title = f"{call.name} with {changed} = {_shown(call.arguments[changed])}"
    try:
        call.function(**call.arguments)
    except Exception as error:
        return None if _own_words(error, call.raw) else f"{title} raised:\n{traceback.format_exc()}"
    return None if call.raw else f"{title} raised nothing"


def _good(call: Call, report: Report) -> str | None:
    try:
        found, expected = call.function(**call.arguments), call.expected()
    except _Skip:
        report.counts["skipped"] += 1
        return None
    except Exception:
        return f"{call.name} raised:\n{traceback.format_exc()}"
    report.counts["good"] += 1
    if len(found) != len(expected):
        return f"{call.name} gave {len(found)} results instead of {len(expected)}"
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape:
            return f"{call.name}: result {i} has shape {tuple(a.shape)} instead of {tuple(b.shape)}"
        size = max(float(b.abs().max()), 1e-30) if b.numel() else 1.0
        error = float((a.double() - b.double()).abs().max()) / size if b.numel() else 0.0
        if not error <= TOLERANCE[call.dtype]:
            return f"{call.name}: result {i} of {len(found)} is {error:.2g} off, shape {tuple(a.shape)}, {call.dtype}"
    return None
