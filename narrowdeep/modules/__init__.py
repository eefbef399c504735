"""The networks as ``nn.Module``s."""

from narrowdeep.modules.mlp import DeepNarrowMLP

__all__ = ["DeepNarrowMLP"]
