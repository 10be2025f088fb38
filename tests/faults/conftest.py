"""What the tests of faults share."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a module's runs, with their config in it."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "output_dir": str(folder)}))
    return folder
