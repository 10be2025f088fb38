"""SNELLA: SNELL with the mixed kernel and a budget of non-zeros for which all adapted matrices compete."""

from snell_scale.tuners.snella.allocator import BudgetSchedule, FactorStep, SparsityAllocator
from snell_scale.tuners.snella.competition import SparsityCompetition
from snell_scale.tuners.snella.config import SnellaConfig
from snell_scale.tuners.snella.model import SnellaModel

__all__ = [
    "BudgetSchedule",
    "FactorStep",
    "SnellaConfig",
    "SnellaModel",
    "SparsityAllocator",
    "SparsityCompetition",
]
