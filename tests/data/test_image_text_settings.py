"""Image-text pairs: settings that contradict each other or the data are refused."""

from pathlib import Path
from typing import Any

import pytest

from snell_scale.data.captioned.image_text import ImageTextConfig
from tests.data.pair_files import png, write_tar

SHARES: dict[str, Any] = {"source": "a", "validation_fraction": 0.2, "test_fraction": 0.2}


def test_a_label_that_no_sample_has_is_refused(tmp_path: Path) -> None:
    pairs = [{f"{number}.png": png(number), f"{number}.txt": b"x"} for number in range(8)]
    path = write_tar(tmp_path / "s.tar", {name: content for pair in pairs for name, content in pair.items()})
    settings = {"format": "webdataset", **SHARES, "source": str(path), "image_size": 8}
    ImageTextConfig.model_validate(settings).build(seed=0)
    with pytest.raises(ValueError, match=r"data\.label_column=kind: no pair has such a label"):
        ImageTextConfig.model_validate({**settings, "label_column": "kind"}).build(seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "a"}, "give train, validation and test, or source"),
        ({"source": "a"}, "source takes validation_fraction and test_fraction"),
        ({"source": "a", "validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"train": "a", "validation": "b", "test": "c", "test_fraction": 0.1}, "are shares of source"),
        (
            {"source": "a", "validation_fraction": 0.1, "test_fraction": 0.1, "crop_scale": [0.9, 0.1]},
            "crop_scale",
        ),
        (
            {**SHARES, "format": "webdataset", "image_id_column": "key"},
            "image_id_column: format=webdataset has no such",
        ),
        ({**SHARES, "format": "hf", "separator": ";"}, "separator: format=hf has no such"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTextConfig.model_validate({"format": "csv", **settings})
