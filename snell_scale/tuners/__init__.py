"""Fine-tuning methods. Importing this package makes peft know SNELL and SNELLA; peft has the other adapters."""

from snell_scale.tuners import peft_registration
from snell_scale.tuners.snell import SnellConfig, SnellModel
from snell_scale.tuners.snella import SnellaConfig, SnellaModel, SparsityCompetition

peft_registration.register()

__all__ = ["SnellConfig", "SnellModel", "SnellaConfig", "SnellaModel", "SparsityCompetition"]
