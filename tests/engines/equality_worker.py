"""One rank of the runs that test_equality.py compares, under torchrun: one config file after the other."""

import sys
from pathlib import Path

from snell_scale import registry
from snell_scale.config import load_config
from snell_scale.run import run


def main(files: list[str]) -> None:
    for file in files:
        config = load_config(Path(file), config_class=registry.config_class)
        run(config, quiet=True)


if __name__ == "__main__":
    main(sys.argv[1:])
