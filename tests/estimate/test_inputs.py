"""What an estimate takes for the data without reading them is what the data are."""

import pytest

from snell_scale import registry
from snell_scale.config import load_config
from snell_scale.estimate.inputs import inputs_of
from tests.estimate.measured import CONFIGS

EMBEDDED = ["demo/transfer", "segmentation/transfer", "contrastive/transfer", "generation/transfer"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_sizes_are_those_of_the_data(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", config_class=registry.config_class)
    read = inputs_of(config, None)
    stated = inputs_of(config, read.num_classes)
    assert (stated.image.channels, stated.image.height, stated.image.width) == (
        read.image.channels,
        read.image.height,
        read.image.width,
    )
    assert stated.images_per_sample == read.images_per_sample


@pytest.mark.parametrize(("size", "side"), [("null", 224), ("384", 384)])
def test_the_datas_size_goes_before_the_models(size: str, side: int) -> None:
    """As in a run: the model's own size is what is taken where the data state none."""
    overrides = ["model.weights=null", f"data.image_size={size}"]
    config = load_config(CONFIGS / "fgvc" / "cub.yaml", overrides, config_class=registry.config_class)
    image = inputs_of(config, 200).image
    assert (image.channels, image.height, image.width) == (3, side, side)


def test_a_model_without_a_size_needs_the_datas() -> None:
    overrides = ["model.weights=null", "model.architecture=vision_transformer", "data.image_size=null"]
    config = load_config(CONFIGS / "fgvc" / "cub.yaml", overrides, config_class=registry.config_class)
    with pytest.raises(ValueError, match=r"set data\.image_size"):
        inputs_of(config, 200)
