"""Memory of a training step: schedules, a plan before it runs, and what it really takes."""

from narrowdeep.memory.plan import BudgetError, MemoryPlan, plan
from narrowdeep.memory.profile import MemoryProfile, profile

__all__ = ["BudgetError", "MemoryPlan", "MemoryProfile", "plan", "profile"]
