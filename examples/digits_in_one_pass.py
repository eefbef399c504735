"""The ten digits in one pass: a fresh network of 4,000 layers, one step, no learning rate.

One step of Gauss-Newton in function space goes to where the network's tangent kernel says that training ends. The
picture has the outputs on test images beside what the kernel predicted for them, and the images that it gets wrong.
"""

from __future__ import annotations

import argparse
import time

import torch
from matplotlib.figure import Figure

from narrowdeep import DeepNarrowMLP
from narrowdeep.data import load_task
from narrowdeep.optim import GramGaussNewton


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4000)
    parser.add_argument("--out", default="digits_in_one_pass.png")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    task = load_task("digits")
    # A kernel that turns much with the angle between images: one that is nearly linear in them learns a linear map.
    model = DeepNarrowMLP(task.in_features, task.out_features, depth=arguments.depth, rho=2 * task.in_features**0.5)
    start = time.perf_counter()
    step = GramGaussNewton(model, kernel="features", damping=1e-4).step(task.x_train, task.y_train, at=task.x_test)
    seconds = time.perf_counter() - start
    assert step.outputs is not None
    with torch.no_grad():
        outputs = model(task.x_test)
    guesses, labels = outputs.argmax(1), task.y_test.argmax(1)
    wrong = (guesses != labels).nonzero().flatten().tolist()

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(step.outputs.flatten().numpy(), outputs.flatten().numpy(), ".", markersize=2)
    left.axline((0, 0), slope=1, color="gray", linewidth=0.8)
    left.set(xlabel="predicted by the kernel", ylabel="the network's, after the step", title="outputs on test images")
    right.set_axis_off()
    right.set_title(f"{len(wrong)} of {len(labels)} test images are wrong")
    for place, sample in enumerate(wrong[:6]):
        axes = right.inset_axes((0.34 * (place % 3), 0.45 - 0.5 * (place // 3), 0.3, 0.4))
        axes.imshow(task.x_test[sample].reshape(8, 8).numpy(), cmap="gray_r")
        axes.set(xticks=[], yticks=[], title=f"{labels[sample]}, taken for {guesses[sample]}")
    figure.savefig(arguments.out, dpi=120)
    print(
        f"{1 - len(wrong) / len(labels):.2%} of the test images after one step of {seconds:.1f} s; training loss "
        f"{step.loss:.3g} before it, {step.measured:.3g} after, {step.predicted:.3g} predicted: {arguments.out}"
    )


if __name__ == "__main__":
    main()
