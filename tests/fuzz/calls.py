"""Kinds of calls of the public API, with random arguments that are good, and what they must give."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name torch's own documentation uses)

from narrowdeep import functional, memory, ntk, optim
from narrowdeep.ops.gram import op as gram_op
from tests.fuzz import network
from tests.fuzz.network import NAMES, Net, Relus, double

OPTIMIZERS = ("sgd", "momentum", "adam", "fused-sgd", "fused-momentum")


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


def chain(rng: random.Random) -> Call:
    """narrowdeep.functional, in chunks or not, under a transform."""
    net, transform = Net(rng), rng.choice(network.TRANSFORMS)
    sizes = net.cuts(rng.choice([1, 1, 2, 4]))
    mode = torch.autocast("cpu", torch.bfloat16) if rng.random() < 0.2 else nullcontext()
    function = functional.conv_chain if net.image else functional.mlp_chain
    settings = {**net.settings(), "segment": rng.choice([0, 1, 2, 5, 64, 2**62])}
    if settings["segment"] and rng.random() < 0.5:
        settings["snapshots"] = rng.choice([1, 2, 3])

    def run(*, scale: Any, form: Any, segment: Any, snapshots: Any = None, **tensors: Any) -> Sequence[Tensor]:
        def f(x: Any, w1: Any, b1: Any, wh: Any, bh: Any, wl: Any, bl: Any) -> Tensor:
            if good and len(sizes) > 1:
                wh, bh = wh.split(sizes), bh.split(sizes)
            with mode if good else nullcontext():
                return function(x, w1, b1, wh, bh, wl, bl, scale=scale, form=form, segment=segment, snapshots=snapshots)

        values = tuple(tensors.values())
        good = all(a is b for a, b in zip(values, net.tensors, strict=True))
        return transform(f, values, net.tangents, net.grad) if good else (f(*values),)

    def expected() -> Sequence[Tensor]:
        net.check_margin(net.x)
        if transform is network.ensemble:
            moved = [p + 0.01 * t for p, t in zip(net.params, net.tangents[1:], strict=True)]
            net.check_margin(net.x, params=moved)
        # Torch's own linearize is wrong where tensors are written to, as eager() does with its identity part.
        truth = network.jvp if transform is network.linearize else transform
        return truth(net.eager, double(*net.tensors), double(*net.tangents), *double(net.grad))

    return Call(f"chain {transform.__name__}", run, net.named() | settings, expected, net.dtype)


def module(rng: random.Random) -> Call:
    """A module made, called and differentiated; its hidden states."""
    net = Net(rng, of_module=True)
    dims = rng.choice([(), (), (2,), (1, 2)]) if net.batch else ()
    wanted = [rng.randint(1, net.layers + 1) for _ in range(rng.randint(0, 3))]
    grad = torch.randn(*dims, net.batch, net.outputs, dtype=net.dtype)
    settings: dict[str, Any] = {
        **net.settings(),
        "rho": rng.choice([0.0, 0.5, 1.0]),
        "beta": 1.0,
        "checkpoint": rng.choice(["auto", "auto", "none", 1, 3, (1, 2), (2, 1), (5, 2)]),
        "chunks": rng.randint(1, max(1, min(4, net.layers))),
        "dtype": net.dtype,
    }
    if settings["checkpoint"] == "auto" and rng.random() < 0.5:
        settings["budget"] = rng.choice(["1GiB", 2**40])
        settings["optimizer"] = rng.choice(OPTIMIZERS)
    samples = net.x.expand(*dims, *net.x.shape)
    sizes = {"inputs": net.inputs, "outputs": net.outputs, "depth": net.layers + 2}

    def run(*, x: Any, layers: Any, inputs: Any, outputs: Any, depth: Any, **settings: Any) -> Sequence[Tensor]:
        net.model((inputs, outputs, depth), **settings)
        model = net.model(**settings)
        leaf = x.detach().requires_grad_() if x is samples else x
        out = model(leaf)
        gradients = torch.autograd.grad(out, [leaf, model.first_weight], grad, materialize_grads=True)
        return out.detach(), *gradients, model.hidden_states(leaf, layers).detach()

    def expected() -> Sequence[Tensor]:
        states = net.check_margin(net.x)
        x, *params = double(net.x.expand(*dims, *net.x.shape), *net.params)
        leaves = [x.requires_grad_(), params[0].requires_grad_()]
        out = net.eager(x.reshape(-1, *net.x.shape[1:]) if dims else x, *params).reshape(grad.shape)
        gradients = torch.autograd.grad(out, leaves, grad.double(), materialize_grads=True)
        shape = (*dims, net.batch, net.width, *net.image)
        hidden = [states[i - 1].expand(shape) for i in wanted]
        return out.detach(), *gradients, torch.stack(hidden) if hidden else torch.empty(0, *shape)

    arguments = {"x": samples, "layers": wanted, **sizes, **settings}
    return Call("module", run, arguments, expected, net.dtype, keep=("layers",))


def spans(rng: random.Random) -> Call:
    """The raw ops of a chain that is cut in two: forward, backward, tangent, and the tangent of the backward."""
    net = Net(rng)
    cut = rng.randint(0, net.layers)
    w1, b1, wh, bh, wl, bl = net.params
    arguments: dict[str, Any] = {"x": net.x, "w1": w1, "b1": b1, "wh": wh[:cut], "bh": bh[:cut]}
    arguments |= {"tail_wh": wh[cut:], "tail_bh": bh[cut:], "wl": wl, "bl": bl, "grad": net.grad}
    arguments |= {"scale": net.scale, "offset": net.offset}
    arguments |= {"outputs": net.outputs, "origin": 0, "start": cut, "segment": rng.choice([0, 1, 2, 5, 64])}

    def run(*, x: Any, grad: Any, scale: Any, offset: Any, outputs: Any, segment: Any, **a: Any) -> Sequence[Tensor]:
        first = (a["w1"], a["b1"], a["wh"], a["bh"], None, None)
        last = (None, None, a["tail_wh"], a["tail_bh"], a["wl"], a["bl"])
        origin, start = (scale, offset, outputs, a["origin"]), (scale, offset, outputs, a["start"])
        state, saved = net.ops.forward(x, *first, *origin, segment)
        out, kept = net.ops.forward(state, *last, *start, segment)
        g_state, *g_last = net.ops.backward(grad, state, *last, kept, *start, segment, True, True)
        g_x, *g_first = net.ops.backward(g_state, x, *first, saved, *origin, segment, True, True)
        t = net.tangents
        state_t = net.ops.jvp(x, *first, *t[:3], t[3][:cut], t[4][:cut], None, None, *origin)
        out_t = net.ops.jvp(state, *last, state_t, None, None, t[3][cut:], t[4][cut:], *t[5:], *start)
        last_t, first_t = (state_t, None, None, t[3][cut:], t[4][cut:], *t[5:]), (*t[:3], t[3][:cut], t[4][:cut])
        s_state, *s_last = net.ops.backward_jvp(grad, None, state, *last, *last_t, *start, True, True)
        s_first = net.ops.backward_jvp(g_state, s_state, x, *first, *first_t, None, None, *origin, True, True)

        def joined(head: Sequence[Tensor], tail: Sequence[Tensor]) -> list[Tensor]:
            hidden = [torch.cat(pair) for pair in zip(head[3:5], tail[2:4], strict=True)]
            return [*head[:3], *hidden, *tail[4:]]

        return out, *joined((g_x, *g_first), g_last), out_t, *joined(s_first, s_last)

    def expected() -> Sequence[Tensor]:
        net.check_margin(net.x)
        tensors, tangents = double(*net.tensors), double(*net.tangents)
        gradients = network.backward(net.eager, tensors, tangents, *double(net.grad))
        second = network.forward_over_reverse(net.eager, tensors, tangents, *double(net.grad))
        return *gradients, torch.func.jvp(net.eager, tensors, tangents)[1], *second

    return Call("spans", run, arguments, expected, net.dtype, raw=True)


def tangent_kernel(rng: random.Random) -> Call:
    """jacobian, empirical_ntk and ntk_vector_product of a module with frozen parameters; the raw gram op."""
    net = Net(rng, of_module=True)
    kind = rng.choice(["full", "trace", "diagonal", "product", "raw", "jacobian"])
    x1, x2 = net.x, net.samples(rng.choice([0, 1, 3, 5]))
    model = net.model(chunks=rng.randint(1, max(1, min(3, net.layers))) if kind != "jacobian" else 1)
    trained = [i for i, name in enumerate(NAMES) if kind in ("raw", "jacobian") or rng.random() < 0.85]
    for i, name in enumerate(NAMES):
        for part in model.in_chunks(name):
            part.requires_grad_(i in trained)
    v = torch.randn(x2.shape[0], net.outputs, dtype=net.dtype)

    def jacobians(x: Tensor) -> Sequence[Tensor]:
        params = double(*net.params)
        if not len(x) or not trained:
            return [params[i].new_zeros(len(x), net.outputs, *params[i].shape) for i in trained]

        def f(*values: Tensor) -> Tensor:
            given = dict(zip(trained, values, strict=True))
            return net.eager(*double(x), *(given.get(i, p) for i, p in enumerate(params)))

        return torch.func.jacrev(f, tuple(range(len(trained))))(*(params[i] for i in trained))

    def expected() -> Sequence[Tensor]:
        net.check_margin(x1, x2)
        if kind == "jacobian":
            return jacobians(x1)
        full = torch.zeros(len(x1), len(x2), net.outputs, net.outputs, dtype=torch.float64)
        for a, b in zip(jacobians(x1), jacobians(x2), strict=True):
            full += torch.einsum("iap,jbp->ijab", a.flatten(2), b.flatten(2)) * (1 if kind == "raw" else model.ntk_lr)
        if kind == "product":
            return (torch.einsum("ijab,jb->ia", full, v.double()),)
        diagonal = full.diagonal(dim1=2, dim2=3)
        return ({"trace": diagonal.sum(2), "diagonal": diagonal}.get(kind, full),)

    pair = {"model": model, "x1": x1, "x2": x2}
    if kind == "jacobian":
        given = {"model": model, "x": x1}
        return Call(kind, lambda **a: tuple(ntk.jacobian(**a).values()), given, expected, net.dtype)
    if kind == "product":
        given = {**pair, "v": v, "scaled": True}
        return Call("ntk_vector_product", lambda **a: (ntk.ntk_vector_product(**a),), given, expected, net.dtype)
    if kind == "raw":
        op = gram_op.cnn_gram if net.image else gram_op.mlp_gram
        given = {"x1": x1, "x2": x2, **dict(zip(NAMES, net.params, strict=True)), "scale": net.scale}
        given |= {"offset": net.offset, "symmetric": False, "trainable": 63, "reduce": 0}
        return Call("gram", lambda **a: (op(*a.values()),), given, expected, net.dtype, raw=True)
    given = {**pair, "reduce": kind, "scaled": True}
    return Call("empirical_ntk", lambda **a: (ntk.empirical_ntk(**a),), given, expected, net.dtype)


def limit(rng: random.Random) -> Call:
    """The closed forms, pair by pair and position by position."""
    net = Net(rng)
    x1, x2, size = net.x.detach(), net.samples(3), net.tap[0] if net.tap else 1
    rho, beta, out = rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 0.3, 1.0]), rng.randint(1, 4)

    def mean(a: Tensor, b: Tensor, w: float) -> Tensor:
        q_a, q_b, c = (w * (u * v).sum(-1) + beta**2 for u, v in ((a, a), (b, b), (a, b)))
        s = (q_a * q_b - c * c).clamp_min(0).sqrt()
        return (s + torch.atan2(s, -c) * c) / (2 * math.pi)

    def expected() -> Sequence[Tensor]:
        a, b = x1.double().relu(), x2.double().relu()
        if not net.image:
            return (a @ b.t() + out + mean(a[:, None], b[None], rho**2 / net.inputs),)
        inside = F.unfold(torch.ones(1, 1, *net.image, dtype=torch.float64), size, padding=size // 2)[0]
        p, q = (F.unfold(x, size, padding=size // 2).mT for x in (a, b))
        inner = torch.einsum("icp,jcq->ijpq", a.flatten(2), b.flatten(2))
        inner = inner + out + mean(p[:, None, :, None], q[None, :, None, :], rho**2)
        return ((inner * (inside.t() @ inside)).sum((2, 3)) / math.prod(net.image) ** 2,)

    given: dict[str, Any] = {"x1": x1, "x2": x2, "rho": rho, "beta": beta}
    if net.image:
        given |= {"kernel_size": size, "out_channels": out}
        return Call("limit_ntk_cnn", lambda **a: (ntk.limit_ntk_cnn(**a),), given, expected, net.dtype)
    given |= {"out_features": out}
    return Call("limit_ntk_mlp", lambda **a: (ntk.limit_ntk_mlp(**a),), given, expected, net.dtype)


def prediction(rng: random.Random) -> Call:
    """loss_curve beside descent itself, max_learning_rate beside the eigenvalues."""
    # Not 1 or 2 steps: the lists among the nonsense have so many numbers, and a tau for each step is none.
    n, steps, momentum = rng.randint(1, 6), rng.choice([0, 3, 9]), rng.choice([0.0, 0.5, 0.9])
    root, y = torch.randn(n, n + 2, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)
    kernel = root @ root.t()
    largest = float(torch.linalg.eigvalsh(kernel)[-1])
    tau = 0.5 * n / largest

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
        return torch.tensor([2 * (1 + momentum) * n / largest], dtype=torch.float64), torch.stack(losses)

    given = {"kernel": kernel, "y": y, "n_steps": steps, "tau": tau, "momentum": momentum}
    return Call("loss_curve", run, given, expected, keep=("kernel", "y"))


def descent(rng: random.Random) -> Call:
    """Two steps of FusedSGD beside torch.optim.SGD on eager layers."""
    net = Net(rng, of_module=True)
    lr, target = 1e-3 / net.scale**2, torch.randn(net.batch, net.outputs)
    momentum, chunks = rng.choice([0.0, 0.9]), rng.randint(1, max(1, min(3, net.layers)))

    def steps(f: Callable[[], Tensor], optimizer: torch.optim.Optimizer, y: Tensor) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            (f() - y).square().sum().backward()
            optimizer.step()

    def run(*, x: Any, lr: Any, momentum: Any) -> Sequence[Tensor]:
        model = net.model(chunks=chunks)
        optimizer = optim.FusedSGD(model, lr, momentum)
        steps(lambda: model(x), optimizer, target.to(net.dtype))
        return tuple(p.detach() for p in model.stacked())

    def expected() -> Sequence[Tensor]:
        x, *params = double(*net.tensors)
        leaves = [p.clone().requires_grad_() for p in params]
        with Relus() as relus:
            steps(lambda: net.eager(x, *leaves), torch.optim.SGD(leaves, lr, momentum), target.double())
        relus.check(net.dtype)
        # It diverges: past this the base of a state, of the size of the scale, is rounded off beside the rest.
        most = net.scale / torch.finfo(net.dtype).eps ** 0.75
        if not all((value.detach().abs() < most).all() for value in (*leaves, *relus.inputs)):
            raise network.Skip
        return tuple(leaf.detach() for leaf in leaves)

    return Call("FusedSGD", run, {"x": net.x, "lr": lr, "momentum": momentum}, expected, net.dtype)


def plan(rng: random.Random) -> Call:
    """A plan keeps its budget, and the smallest budget that a refusal names is one that it takes."""
    net = Net(rng, of_module=True)
    model = net.model(chunks=rng.randint(1, max(1, min(3, net.layers))))
    given = {"model": model, "batch_size": rng.choice([1, 7, 10**6]), "input_shape": (net.inputs, *net.image)}
    given |= {"budget": rng.choice([1, 5000, "1GiB", "2 MB", 2**50])}
    given |= {"optimizer": rng.choice(OPTIMIZERS), "schedules": rng.random() < 0.5}

    def run(**a: Any) -> Sequence[Tensor]:
        try:
            found = memory.plan(**a)
        except memory.BudgetError as error:
            found = memory.plan(**a | {"budget": error.smallest})
        assert found.total <= (found.budget or 0), f"{found.total} bytes are planned for a budget of {found.budget}"
        return ()

    return Call("memory.plan", run, given, lambda: (), keep=("schedules",))


KINDS = (*[chain] * 4, *[module] * 2, *[spans] * 3, *[tangent_kernel] * 3, limit, prediction, descent, plan)
