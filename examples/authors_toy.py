"""The authors' toy task with a model of theirs and with ours: x1 x2 on a circle arc, full batches, plain SGD.

``DeepNN`` here has the names and the initialisation of the published class, layer by layer in eager PyTorch. Our model
is made of its state dict, takes the same steps of the same size, and goes back to a state dict in the end. Draws both
losses and both functions.
"""

from __future__ import annotations

import argparse
import time

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from narrowdeep import DeepNarrowMLP
from narrowdeep.data import load_task


class DeepNN(nn.Module):
    """head, a body of L - 1 layers and tail, all of width d_in + 1 + d_out (thesis section 3.1)."""

    def __init__(self, d_in: int, d_out: int, L: int, C_L: float) -> None:
        super().__init__()
        width = d_in + 1 + d_out
        self.head = nn.Linear(d_in, width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(L - 1))
        self.tail = nn.Linear(width, d_out)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for layer in (self.head, *self.body):
                for unit in range(d_in):
                    layer.weight[unit, unit] = C_L if layer is self.head else 1.0
                layer.weight[d_in, :d_in] = torch.randn(d_in) / d_in**0.5
                layer.bias[d_in] = torch.randn(()) * C_L
                if layer is not self.head:
                    layer.weight[d_in + 1 :, d_in + 1 :] = torch.eye(d_out)
            self.head.bias[d_in + 1 :] = C_L
            self.tail.weight[:, d_in + 1 :] = torch.eye(d_out)
            self.tail.bias[:] = -C_L

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.head(x))
        for layer in self.body:
            h = torch.relu(layer(h))
        return self.tail(h)


def train(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int) -> tuple[list[float], float]:
    """The losses 1/(2N) sum ||f - y||^2 before each step, and the seconds that the steps took."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        loss = (model(x) - y).square().sum() / (2 * len(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=300, help="the authors' L")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="authors_toy.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    task = load_task("toy")
    x, y = task.x_train.double(), task.y_train.double()
    theirs = DeepNN(2, 1, L=arguments.layers, C_L=float(arguments.layers)).double()
    ours = DeepNarrowMLP.from_authors(theirs.state_dict())
    runs = {
        name: train(model, x, y, 0.3 * ours.ntk_lr, arguments.steps)
        for name, model in (("DeepNN", theirs), ("DeepNarrowMLP", ours))
    }
    trained = ours.to_authors()
    difference = max(float((value - trained[name]).abs().max()) for name, value in theirs.state_dict().items())

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    with torch.no_grad():
        for (name, (losses, seconds)), model, line in zip(runs.items(), (theirs, ours), ("-", "--"), strict=True):
            left.semilogy(losses, line, label=f"{name}, {seconds:.2g} s")
            right.plot(model(x).squeeze(), line, label=name)
    right.plot(y.squeeze(), ":", color="gray", label="$x_1 x_2$")
    left.set(xlabel="step", ylabel=r"$\frac{1}{2N}\sum_n (f(x_n) - y_n)^2$", title=f"L = {arguments.layers}, float64")
    right.set(xlabel="sample along the arc", ylabel="output", title=f"after {arguments.steps} steps")
    left.legend()
    right.legend()
    figure.savefig(arguments.out, dpi=120)
    (_, slow), (_, fast) = runs.values()
    print(
        f"after {arguments.steps} steps no parameter differs by more than {difference:.1e}; {slow / fast:.0f}x as fast"
    )


if __name__ == "__main__":
    main()
