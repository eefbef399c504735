"""The networks as ``nn.Module``s."""

from narrowdeep.modules.cnn import DeepNarrowCNN
from narrowdeep.modules.mlp import DeepNarrowMLP

__all__ = ["DeepNarrowCNN", "DeepNarrowMLP"]
