"""Memory of a training step: schedules, a plan before it runs, and what it really takes.

``plan`` and ``profile`` are the functions; their modules are ``planning``, with what a step takes in ``step``, and
``profiling``.
"""

from narrowdeep.memory.planning import BudgetError, MemoryPlan, plan
from narrowdeep.memory.profiling import MemoryProfile, profile

__all__ = ["BudgetError", "MemoryPlan", "MemoryProfile", "plan", "profile"]
