"""The workloads count their work rightly, their peers agree at small depth, and a wrong answer is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import PEERS, Compiled, Eager, JaxScan, Narrowdeep
from benchmarks.workloads import PERTURBATION, WORKLOADS, Measure, Workload, check, make_problem, truth
from narrowdeep import DeepNarrowMLP

EVERY: dict[Measure, dict[str, float]] = {"forward": {}, "forward + backward": {}, "step with SGD": {}}
SMALL = [
    Workload(2, 1, 129, 5, EVERY),
    Workload(2, 1, 30, 1, EVERY, form="plain"),
    Workload(11, 4, 3, 7, EVERY),
    Workload(3, 2, 5, 4, EVERY),
    Workload(1, 1, 40, 6, EVERY, image=(7, 7)),
    Workload(2, 2, 9, 3, EVERY, image=(4, 6), kernel_size=5),
]
KERNELS = [Workload(2, 1, 50, 5, {"NTK": {}}), Workload(2, 2, 8, 4, {"NTK": {}}, image=(3, 5))]
CASES = [
    pytest.param(workload, measure, peer, id=f"{workload.name}: {measure}, {peer.name}")
    for workload in SMALL + KERNELS
    for measure in workload.floors
    for peer in PEERS
    if peer.takes(workload, measure)
]


@pytest.mark.filterwarnings("default")  # peers may warn
@pytest.mark.parametrize(("workload", "measure", "peer"), CASES)
def test_peers_find_the_truth(workload, measure, peer):
    if peer is JaxScan:
        pytest.importorskip("jax")
    contender = peer(make_problem(workload))
    contender.run(measure)
    error = check(contender.answer(measure), truth(make_problem(workload), measure), contender.tolerance)
    assert error < 1e-3


def test_every_floor_has_its_peer():
    for workload in WORKLOADS:
        for measure, floors in workload.floors.items():
            names = {peer.name for peer in PEERS if peer.takes(workload, measure)}
            assert "narrowdeep" in names
            assert floors.keys() - {"peak"} <= names


def test_only_shallow_networks_are_compiled():
    shallow = [workload for workload in WORKLOADS if Compiled.takes(workload, "forward")]
    assert [workload.depth for workload in shallow] == [100]


def test_a_wrong_answer_is_refused():
    problem = make_problem(SMALL[0])
    right = truth(problem, "forward + backward")
    for wrong in ("output", "first_bias", "hidden_weight"):
        answer = dict(right)
        answer[wrong] = answer[wrong] * 1.02
        with pytest.raises(AssertionError, match=f"{wrong} is off by 2.0e-02 relative"):
            check(answer, right, 1e-2)
    with pytest.raises(AssertionError, match="the answer must have"):
        check({"output": right["output"]}, right, 1e-2)
    with pytest.raises(AssertionError, match="output must have shape"):
        check({**right, "output": right["output"][:1]}, right, 1e-2)
    with pytest.raises(AssertionError, match="output is off by nan"):
        check({**right, "output": right["output"] * float("nan")}, right, 1e-2)


@pytest.mark.parametrize("workload", [w for w in SMALL if w.form == "offset"], ids=lambda w: w.name)
def test_outputs_are_of_the_size_that_plain_float32_resolves(workload):
    problem = make_problem(workload)
    output = truth(problem, "forward")["output"]
    assert 1e-3 < output.abs().mean() / problem.model.scale < 10 * PERTURBATION
    assert all((param != 0).all() for param in problem.model.parameters())


@pytest.mark.parametrize("workload", SMALL[:4], ids=lambda w: w.name)
def test_operations_of_an_mlp_are_those_torch_counts(workload):
    network = make_problem(workload).sequential()
    x = torch.randn(workload.batch, workload.inputs)
    with FlopCounterMode(display=False) as forward:
        output = network(x)
    assert workload.flops("forward") == forward.get_total_flops()
    with FlopCounterMode(display=False) as both:
        network(x).backward(torch.ones_like(output))
    assert workload.flops("forward + backward") == both.get_total_flops()


def test_operations_of_a_tangent_are_those_torch_counts_of_eager_layers():
    model = DeepNarrowMLP(3, 2, 6)
    eager = model.to_sequential()
    x = torch.randn(4, 3)
    counts = []
    for network in (model, eager):
        params = {name: param.detach() for name, param in network.named_parameters()}
        with FlopCounterMode(display=False) as counter:
            torch.func.jvp(lambda p, net=network: torch.func.functional_call(net, p, (x,)), (params,), (params,))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_operations_of_a_cnn_leave_out_the_padding():
    # A 3x3 filter on 7x7: 7 + 6 + 6 taps in a row of pixels, squared; 3 layers with 1*3, 3*3 and 3*1 channel pairs.
    workload = Workload(1, 1, 3, 2, EVERY, image=(7, 7))
    assert workload.flops("forward") == 2 * 2 * 19**2 * (3 + 9 + 3)
    # 5x5 on 4x1: rows 4 + 3 + 3 + 2 + 2, columns 1.
    workload = Workload(1, 1, 3, 2, EVERY, image=(4, 1), kernel_size=5)
    assert workload.flops("forward") == 2 * 2 * 14 * (3 + 9 + 3)
    assert workload.flops("forward + backward") == 2 * 2 * 14 * (3 * (3 + 9 + 3) - 3)


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
def test_traffic_is_that_of_the_parameters_and_the_samples(workload):
    problem = make_problem(workload)
    assert workload.parameters == sum(p.numel() for p in problem.sequential().parameters())
    samples = problem.x.numel() + problem.cotangent.numel()
    assert workload.traffic("forward") == 4 * (workload.parameters + samples)
    assert workload.traffic("forward + backward") == 4 * (3 * workload.parameters + samples)
    assert workload.traffic("NTK") is None


def test_operations_that_wait_for_one_another():
    # Width 4: a product, two additions of a tree over four, and three more, in each of 7 layers.
    assert Workload(2, 1, 7, 5, EVERY).dependent("forward") == 7 * 6
    assert Workload(2, 1, 7, 5, EVERY).dependent("forward + backward") == 2 * 7 * 6
    # 3 channels and filters of 3x3: 27 products.
    assert Workload(1, 1, 7, 5, EVERY, image=(4, 4)).dependent("forward") == 7 * 9


@pytest.mark.parametrize("peer", [Eager, Narrowdeep], ids=lambda p: p.name)
def test_a_step_moves_the_weights_against_their_gradients(peer):
    contender = peer(make_problem(Workload(2, 1, 4, 3, EVERY)))
    contender.optimizer.param_groups[0]["lr"] = 0.5
    before = [param.detach().clone() for param in contender.parameters]
    contender.run("step with SGD")
    for old, param in zip(before, contender.parameters, strict=True):
        torch.testing.assert_close(param, old - 0.5 * param.grad)
