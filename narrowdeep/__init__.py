"""narrowdeep: networks that are extremely deep and extremely narrow, fused."""

from narrowdeep.modules import DeepNarrowMLP

__all__ = ["DeepNarrowMLP"]
