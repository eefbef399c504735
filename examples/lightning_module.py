"""A LightningModule around a network of 1,000 layers: Lightning's loop, clipping and callbacks, nothing special.

Needs ``pip install lightning``. It learns the product of two coordinates on a quarter of the circle.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from narrowdeep import DeepNarrowMLP
from narrowdeep.data import load_task

try:
    import lightning
except ModuleNotFoundError:
    sys.exit("this example needs lightning, which is not installed: pip install lightning")


class Regression(lightning.LightningModule):
    def __init__(self, depth: int, tau: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = DeepNarrowMLP(2, 1, depth=depth)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        x, y = batch
        loss = 0.5 * (self.model(x) - y).square().sum(1).mean()
        self.losses.append(loss.item())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["tau"] * self.model.ntk_lr, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", default="lightning_module.png")
    arguments = parser.parse_args()
    lightning.seed_everything(0)
    task = load_task("toy")
    loader = DataLoader(TensorDataset(task.x_train, task.y_train), batch_size=50, shuffle=True)
    module = Regression(arguments.depth, tau=0.05)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        gradient_clip_val=10 * module.model.scale * arguments.depth**0.5,  # gradients have this size
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    trainer.fit(module, loader)

    angle = torch.atan2(task.x_test[:, 1], task.x_test[:, 0])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.semilogy(module.losses, linewidth=0.7)
    left.set(xlabel="step", ylabel="training loss of a batch", title=f"{arguments.depth:,} layers under Lightning")
    with torch.no_grad():
        right.plot(angle, module.model(task.x_test)[:, 0], label="learned")
    right.plot(angle, task.y_test[:, 0], "k:", label="$x_1 x_2$")
    right.set(xlabel="angle")
    right.legend()
    figure.savefig(arguments.out, dpi=120)
    print(f"loss {module.losses[0]:.3g} before, {module.losses[-1]:.3g} after: {arguments.out}")


if __name__ == "__main__":
    main()
