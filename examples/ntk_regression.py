"""Regression with the kernel of infinite depth, and how sure it is.

A noisy function on a quarter of the circle is seen on two stretches; the deviation that ``predict`` returns grows in
the gap between them. The noise is the ridge; how strongly the kernel turns with the angle is ``rho``.
"""

from __future__ import annotations

import argparse

import numpy as np
from matplotlib.figure import Figure

from narrowdeep.ntk import NTKRegressor, limit_ntk_mlp

NOISE = 0.05


def on_arc(angles: np.ndarray) -> np.ndarray:
    return np.stack((np.cos(angles), np.sin(angles)), 1)


def target(angles: np.ndarray) -> np.ndarray:
    return np.sin(4 * angles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--out", default="ntk_regression.png")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    angles = random.uniform(0, np.pi / 2, arguments.samples)
    angles = np.where(angles < np.pi / 4, 0.6 * angles, np.pi / 2 - 0.6 * (np.pi / 2 - angles))
    seen = target(angles) + NOISE * random.standard_normal(len(angles))

    regressor = NTKRegressor(limit_ntk_mlp, ridge=NOISE**2, rho=2.0).fit(on_arc(angles), seen)
    fine = np.linspace(0, np.pi / 2, 200)
    mean, deviation = regressor.predict(on_arc(fine), return_std=True)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(fine, mean - 2 * deviation, mean + 2 * deviation, alpha=0.25, label="two deviations")
    axes.plot(fine, mean, label="prediction")
    axes.plot(fine, target(fine), "k:", label="truth")
    axes.plot(angles, seen, "k.", label="seen")
    axes.set(xlabel="angle", title=f"NTKRegressor of {len(angles)} samples")
    axes.legend()
    figure.savefig(arguments.out, dpi=120)
    inside = np.abs(mean - target(fine)) < 2 * deviation
    print(f"the truth lies within two deviations at {inside.mean():.0%} of the angles: {arguments.out}")


if __name__ == "__main__":
    main()
