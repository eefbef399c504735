"""A trained network beside what its kernel says that training does.

Descent on the product of two coordinates on the arc, in steps of half the largest stable size: the training loss beside
its prediction from the kernel at initialisation, and the outputs after some steps beside kernel regression stopped
there.
"""

from __future__ import annotations

import argparse
import copy

import torch
from matplotlib.figure import Figure

from narrowdeep import DeepNarrowMLP
from narrowdeep.data import load_task
from narrowdeep.ntk import NTKRegressor, empirical_ntk, kernel_drift, loss_curve, max_learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", default="compare_with_kernel.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    task = load_task("toy")
    x, y = task.x_train, task.y_train
    model = DeepNarrowMLP(2, 1, depth=arguments.depth)
    initial = copy.deepcopy(model)
    kernel = empirical_ntk(initial, x, reduce="trace")
    tau = 0.5 * max_learning_rate(kernel)
    predicted = loss_curve(kernel, y, arguments.steps, tau=tau)

    shown = sorted({1, max(1, arguments.steps // 10), arguments.steps})
    learned = {}
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=tau * model.ntk_lr)
    for step in range(1, arguments.steps + 1):
        loss = 0.5 * (model(x) - y).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in shown:
            with torch.no_grad():
                learned[step] = model(task.x_test)[:, 0].clone()

    regressor = NTKRegressor("precomputed").fit(kernel.numpy(), y[:, 0].numpy())
    cross = empirical_ntk(initial, task.x_test, x, reduce="trace").numpy()
    angle = torch.atan2(task.x_test[:, 1], task.x_test[:, 0])
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(losses, label="network")
    left.semilogy(predicted[:-1], "k:", label="predicted from its kernel")
    left.set(xlabel="step", ylabel="training loss")
    left.legend()
    for step, output in learned.items():
        right.plot(angle, output, label=f"step {step}")
        right.plot(angle, regressor.predict(cross, n_steps=step, tau=tau), "k:")
    right.plot(angle, task.y_test[:, 0], color="gray", linewidth=0.8, label="target")
    right.set(xlabel="angle", title="network, and kernel regression (dotted)")
    right.legend()
    figure.savefig(arguments.out, dpi=120)
    print(
        f"last loss {losses[-1]:.3g}, predicted {predicted[-2]:.3g}; training has moved the kernel by "
        f"{kernel_drift(initial, model, x):.2g} of its size: {arguments.out}"
    )


if __name__ == "__main__":
    main()
