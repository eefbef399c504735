"""A convolutional network of 20,000 layers and 3 channels learns to tell the digits 0 and 1.

The step size and the momentum come from the kernel of the network before training. About a minute on two cores.
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from narrowdeep import DeepNarrowCNN
from narrowdeep.data import load_task
from narrowdeep.step_size import predict_step_size
from narrowdeep.training import inputs_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--out", default="deep_cnn.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    task = inputs_for("cnn", load_task("digits01"))  # images (N, 1, 8, 8)
    batches = -(-len(task.x_train) // 32)
    model = DeepNarrowCNN(task.in_features, task.out_features, depth=arguments.depth, rho=2.0)
    step = predict_step_size(model, task, steps=arguments.epochs * batches, batch_size=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=step.lr, momentum=step.momentum)

    losses, accuracies = [], []
    for epoch in range(1, arguments.epochs + 1):
        for chosen in torch.randperm(len(task.x_train)).split(32):
            loss = 0.5 * (model(task.x_train[chosen]) - task.y_train[chosen]).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            accuracies.append(task.correct(model(task.x_test), task.y_test).item() / len(task.x_test))
        print(f"epoch {epoch}: loss {losses[-1]:.3g}, test accuracy {accuracies[-1]:.1%}")

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(losses)
    left.axhline(step.loss, color="gray", linestyle=":", label="predicted for the end")
    left.set(xlabel="step", ylabel="training loss of a batch")
    left.legend()
    right.plot(range(1, len(accuracies) + 1), accuracies, "o-")
    right.set(xlabel="epoch", ylabel="test accuracy", title=f"{arguments.depth:,} layers")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
