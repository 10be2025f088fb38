"""One estimate of a large model, alone in its process so that its peak memory is its own; prints JSON.

python -m tests.estimate.large_estimate CONFIG WORLD_SIZE [KEY=VALUE …]
"""

import json
import sys
import time
from pathlib import Path

from snell_scale import registry
from snell_scale.config import load_config
from snell_scale.estimate.prediction import Estimator
from tests.models.large_model_step import peak_gib

NUM_CLASSES = 10


def main(path: str, world_size: str, *overrides: str) -> None:
    config = load_config(Path(path), overrides, config_class=registry.config_class)
    with Estimator(config, int(world_size), NUM_CLASSES) as estimator:
        predicted = estimator.predict()
    told = {
        "wall_s": predicted.seconds,
        "cpu_s": time.process_time(),
        "resident_gib": peak_gib(),
        "num_total_params": predicted.num_total_params,
        "peak": predicted.memory["peak"],
        "load": predicted.memory["phases"]["load"],
        "world_size": predicted.world_size,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
