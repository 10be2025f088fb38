"""Makes SNELL and SNELLA known to peft.

peft's `register_peft_method` takes only the names in its own enum, so the tables that it fills are filled here
directly. They are internal to peft: pyproject.toml pins the range of versions this was tested with. The fourth
table, of methods that PeftMixedModel may mix, stays without them: it has a fixed list of its own.
"""

from typing import cast

from peft.config import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner

from snell_scale.tuners.snell import SnellConfig, SnellModel
from snell_scale.tuners.snella import SnellaConfig, SnellaModel


def register() -> None:
    """Enter both methods; calling it again changes nothing. ValueError where another package took the names."""
    _enter("SNELL", SnellConfig, SnellModel)
    _enter("SNELLA", SnellaConfig, SnellaModel)


def _enter(name: str, config_class: type[PeftConfig], tuner_class: type[BaseTuner]) -> None:
    configs = cast(dict[str, type[PeftConfig]], PEFT_TYPE_TO_CONFIG_MAPPING)
    tuners = cast(dict[str, type[BaseTuner]], PEFT_TYPE_TO_TUNER_MAPPING)
    present = configs.setdefault(name, config_class), tuners.setdefault(name, tuner_class)
    if present != (config_class, tuner_class):
        raise ValueError(
            f"peft already has a method called {name}, {present[0].__module__}.{present[0].__name__}: "
            "import only one of the two packages"
        )
    cast(dict[str, str], PEFT_TYPE_TO_PREFIX_MAPPING)[name] = tuner_class.prefix
