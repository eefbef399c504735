"""narrowdeep: networks that are extremely deep and extremely narrow, fused."""

from narrowdeep.modules import DeepNarrowCNN, DeepNarrowMLP

__all__ = ["DeepNarrowCNN", "DeepNarrowMLP"]
