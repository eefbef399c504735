"""Optimizers for networks that are deep, narrow and nearly linear in their parameters."""

from narrowdeep.optim.fused_sgd import FusedSGD
from narrowdeep.optim.gauss_newton import GaussNewtonStep, GramGaussNewton

__all__ = ["FusedSGD", "GaussNewtonStep", "GramGaussNewton"]
