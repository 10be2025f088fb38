"""configs/fgvc and configs/vtab hold the published settings, and run on small trees in the published layout."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from PIL import Image

from analysis.benchmarks import VTAB
from analysis.load import load_runs
from analysis.transfer import transfer_table
from snell_scale import registry
from snell_scale.assembly import assemble
from snell_scale.compare import plan_study
from snell_scale.config import Config, load_config
from snell_scale.data.labelled.vtab import TASKS
from snell_scale.run import run
from snell_scale.tuners import SnellConfig

CONFIGS = Path(__file__).parents[1] / "configs"
TINY_MODEL = [
    "model={name: timm, architecture: vision_transformer, arguments: {patch_size: 8, embed_dim: 16, depth: 1, "
    "num_heads: 2}, weights: null}",
    "data.image_size=16",
    "method.r=2",
    "training.batch_size=4",
]

# Set → SNELL's (lr, weight decay, batch, sparsity) at r=32, its (weight decay, sparsity) at r=8 and 16, SNELLA's
# (lr, weight decay, batch, sparsity; None: dense); the tables of the papers, and the authors' scripts.
FGVC: dict[str, tuple[Any, ...]] = {
    "cub": ((1e-3, 0.01, 32, 0.3), (0.01, 0.3), (1e-3, 0.05, 16, 0.3)),
    "nabirds": ((5e-4, 0.01, 32, 0.1), (0.01, 0.1), (1e-3, 5e-4, 32, 0.16)),
    "flowers": ((1e-3, 0.01, 32, 0.8), (0.01, 0.6), (1e-3, 1e-3, 16, 0.61)),
    "dogs": ((3e-4, 0.005, 32, 0.1), (0.001, 0.1), (1e-4, 0.005, 32, 0.24)),
    "cars": ((1e-3, 0.01, 32, None), (0.01, None), (1e-3, 0.05, 16, None)),
}
# Task → SNELL's (sparsity, batch, weight decay, epochs) at r=32.
VTAB_SNELL: dict[str, tuple[Any, ...]] = {
    "cifar": (0.9, 16, 0.01, 200),
    "caltech101": (0.4, 16, 0.01, 200),
    "dtd": (0.995, 64, 0.01, 200),
    "oxford_flowers102": (0.9, 32, 0.01, 200),
    "oxford_iiit_pet": (0.5, 32, 0.01, 200),
    "svhn": (None, 32, 0.01, 200),
    "sun397": (0.99, 32, 0.001, 200),
    "patch_camelyon": (0.15, 16, 0.05, 100),
    "eurosat": (0.5, 16, 0.0004, 100),
    "resisc45": (None, 32, 0.01, 100),
    "diabetic_retinopathy": (0.5, 32, 0.05, 100),
    "clevr_count": (0.1, 16, 0.01, 100),
    "clevr_dist": (0.74, 16, 0.001, 100),
    "dmlab": (None, 8, 0.0001, 100),
    "kitti": (0.37, 8, 0.01, 100),
    "dsprites_loc": (None, 16, 0.01, 100),
    "dsprites_ori": (0.88, 8, 0.01, 100),
    "smallnorb_azi": (None, 16, 0.01, 100),
    "smallnorb_ele": (0.08, 16, 0.001, 200),
}
# Where published: SNELLA's (sparsity, batch, weight decay), 100 epochs each; None: dense.
VTAB_SNELLA: dict[str, tuple[Any, ...]] = {
    "cifar": (0.8, 8, 0.05),
    "caltech101": (None, 16, 0.0001),
    "dtd": (0.93, 8, 0.005),
    "oxford_flowers102": (0.4, 8, 0.001),
    "oxford_iiit_pet": (0.55, 16, 0.05),
    "svhn": (None, 16, 0.0001),
    "patch_camelyon": (0.76, 8, 0.0005),
    "diabetic_retinopathy": (0.2, 32, 0.05),
    "smallnorb_ele": (0.63, 32, 0.001),
}


def load(path: str, *overrides: str) -> Config:
    return load_config(CONFIGS / path, overrides, config_class=registry.config_class)


def check_recipe(config: Config) -> None:
    """What all published runs share: ViT-B/16, rank, warm-up, least rate, dropouts of the delta, cls_token."""
    method, training = config.method, config.training
    assert (config.model.architecture, Path(config.model.weights).name) == (
        "vit_base_patch16_224",
        "ViT-B_16.npz",
    )
    assert (method.r, method.targets, method.train_extra) == (32, "all", True)
    assert (method.dropout, method.drop_path, method.dropout_exclude_modules) == (0.1, 0.1, ("proj",))
    assert (training.min_lr, training.warmup_fraction) == (1e-5, 0.1)
    assert config.evaluation.protocol == "validation"


@pytest.mark.parametrize("name", FGVC)
def test_fgvc_settings_are_the_published_ones(name: str) -> None:
    (lr, decay, batch, sparsity), (low_decay, low_sparsity), snella = FGVC[name]
    config = load(f"fgvc/{name}.yaml")
    check_recipe(config)
    training = config.training
    assert (training.lr, training.weight_decay, training.batch_size) == (lr, decay, batch)
    assert (training.epochs, training.ema_decay) == (100, None)
    assert (config.method.name, config.method.sparsity) == ("snell", sparsity)
    assert (config.data.describe(), config.data.augmentation) == (f"fgvc/{name}", "crop-flip")
    assert config.evaluation.every_epochs == 10

    is_special = (low_decay, low_sparsity) != (decay, sparsity)
    low = load(f"fgvc/{name}_low_rank.yaml" if is_special else f"fgvc/{name}.yaml", "method.r=8")
    assert (low.method.r, low.training.weight_decay, low.method.sparsity) == (8, low_decay, low_sparsity)
    if is_special:
        assert load(f"fgvc/{name}_low_rank.yaml").method.r == 16

    lr, decay, batch, sparsity = snella
    config = load(f"fgvc/{name}.yaml", "method.name=snella")
    check_recipe(config)
    training = config.training
    assert (training.lr, training.weight_decay, training.batch_size) == (lr, decay, batch)
    assert (training.epochs, training.ema_decay) == (100, 0.9999)
    assert config.evaluation.every_epochs == 10
    assert (config.method.kernel, config.method.init_sparsity) == ("mixk", 0.0)
    assert config.method.target_sparsity == sparsity
    assert (config.method.beta1, config.method.beta2, config.method.tick) == (0.85, 0.85, "epoch")


@pytest.mark.parametrize("task", TASKS)
def test_vtab_settings_are_the_published_ones(task: str) -> None:
    sparsity, batch, decay, epochs = VTAB_SNELL[task]
    config = load(f"vtab/{task}.yaml")
    check_recipe(config)
    training = config.training
    assert (training.epochs, training.batch_size, training.weight_decay) == (epochs, batch, decay)
    assert (training.lr, training.ema_decay) == (7e-4 if task == "patch_camelyon" else 1e-3, None)
    assert (config.method.name, config.method.sparsity) == ("snell", sparsity)
    assert config.evaluation.every_epochs == 10
    data = config.data
    assert (data.describe(), data.train_on) == (f"vtab/{task}", "train800")
    assert (data.resize, data.interpolation, data.augmentation) == ("squash", "bicubic", "none")
    published = load(f"vtab/{task}.yaml", "data.train_on=train800val200", "evaluation.protocol=best-test")
    published.data.check_run(published)


@pytest.mark.parametrize("task", VTAB_SNELLA)
def test_vtab_settings_of_snella_are_the_published_ones(task: str) -> None:
    sparsity, batch, decay = VTAB_SNELLA[task]
    config = load(f"vtab/{task}.yaml", "method.name=snella")
    check_recipe(config)
    training = config.training
    assert (training.epochs, training.batch_size, training.weight_decay) == (100, batch, decay)
    assert (training.lr, training.ema_decay, config.method.kernel) == (1e-3, None, "mixk")
    assert config.evaluation.every_epochs == 10
    assert config.method.target_sparsity == sparsity
    assert config.method.init_sparsity == (0.01 if sparsity is not None else 0.0)
    assert (config.method.beta1, config.method.beta2) == (0.85, 0.85)


@pytest.mark.parametrize(("study", "num_tasks"), [("vtab", 19), ("fgvc", 5)])
def test_a_study_is_every_method_on_every_task_with_three_seeds(study: str, num_tasks: int) -> None:
    planned = plan_study(
        [CONFIGS / f"studies/{study}.yaml"], grid={}, overrides=[], name=None, config_class=registry.config_class
    )
    methods = {one.config.method.name for one in planned}
    assert methods == {"probe", "bias", "lora", "shira", "gps", "snell", "snella", "full"}
    assert len(planned) == num_tasks * len(methods) * 3
    assert len({(one.config.data.describe(), one.config.method.name, one.config.seed) for one in planned}) == len(
        planned
    )
    assert {one.config.name.split("/")[0] for one in planned} == {study}
    few = plan_study(
        [CONFIGS / f"studies/{study}.yaml"],
        grid={"methods": ["snell"], "seeds": [7]},
        overrides=["evaluation.protocol=best-test"],
        name="mine",
        config_class=registry.config_class,
    )
    assert len(few) == num_tasks
    assert few[0].config.name.startswith("mine/")


def test_a_list_of_configs_that_is_more_or_less_than_one_is_refused(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    for content, named in (("configs: [a.yaml]\nseed: 3\n", "has seed"), ("configs: []\n", "none in the list")):
        study.write_text(content)
        with pytest.raises(ValueError, match=named):
            plan_study([study], grid={}, overrides=[], name=None, config_class=registry.config_class)
    with pytest.raises(ValueError, match="is a study"):
        load_config(CONFIGS / "studies/vtab.yaml", config_class=registry.config_class)


def small_images(folder: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 18), (10 * index, 0, 0)).save(folder / name)


def vtab_tree(root: Path) -> None:
    for name, count in (("train800", 8), ("val200", 4), ("test", 6)):
        names = [f"images/{name}/{index}.png" for index in range(count)]
        small_images(root / "kitti", names)
        lines = [f"{path} {index % 4}" for index, path in enumerate(names)]
        (root / "kitti" / f"{name}.txt").write_text("\n".join(lines))
    both = [(root / "kitti" / f"{name}.txt").read_text() for name in ("train800", "val200")]
    (root / "kitti" / "train800val200.txt").write_text("\n".join(both))


@pytest.mark.parametrize("method", ["snell", "snella", "lora"])
def test_a_vtab_task_assembles_on_a_small_tree(tmp_path: Path, method: str) -> None:
    vtab_tree(tmp_path)
    parts = assemble(load("vtab/kitti.yaml", f"data.root={tmp_path}", f"method.name={method}", *TINY_MODEL))
    assert parts.data.sizes == {"train": 8, "validation": 4, "test": 6}
    assert len(parts.data.class_names) == 4
    assert parts.data.train[0, 0]["image"].shape == (3, 16, 16)
    assert parts.task.metric == "top1"
    assert 0 < parts.num_trainable_params < parts.num_total_params


def test_dense_snella_has_its_kernel_and_no_competition(tmp_path: Path) -> None:
    vtab_tree(tmp_path)
    options = ["method.name=snella", "method.target_sparsity=null", f"data.root={tmp_path}", *TINY_MODEL]
    module = assemble(load("vtab/kitti.yaml", *options)).tuner.module
    assert isinstance(module, PeftModel)
    peft_config = module.peft_config["default"]
    assert isinstance(peft_config, SnellConfig)
    assert (peft_config.kernel, peft_config.sparsity, peft_config.competes) == ("mixk", None, False)


def test_a_run_by_the_published_protocol_says_so_in_its_record(tmp_path: Path) -> None:
    vtab_tree(tmp_path)
    options = ["data.train_on=train800val200", "evaluation.protocol=best-test", "training.epochs=2"]
    options += ["evaluation.every_epochs=1", "training.num_workers=1", f"output_dir={tmp_path}/runs"]
    result = run(load("vtab/kitti.yaml", f"data.root={tmp_path}", *options, *TINY_MODEL), quiet=True)
    assert (result.status, result.dataset, result.protocol) == ("ok", "vtab/kitti", "best-test")
    assert result.total_steps == 6  # 12 images, not 8, in batches of 4
    table = transfer_table(load_runs([tmp_path / "runs"]), VTAB)
    assert table["source"].iloc[0] == "here (best test epoch)"
    assert table["kitti_mean"].iloc[0] == result.metrics["test"]["top1"]


@pytest.mark.parametrize("method", ["snell", "snella", "full"])
def test_an_fgvc_set_assembles_on_a_small_tree(tmp_path: Path, method: str) -> None:
    for split, count in (("train", 8), ("test", 4)):
        listed = {f"00{index % 2}.bird/{split}{index}.jpg": index % 2 + 1 for index in range(count)}
        small_images(tmp_path / "CUB_200_2011/images", list(listed))
        (tmp_path / "CUB_200_2011" / f"{split}.json").write_text(json.dumps(listed))
    parts = assemble(load("fgvc/cub.yaml", f"data.root={tmp_path}", f"method.name={method}", *TINY_MODEL))
    assert parts.data.sizes == {"train": 6, "validation": 2, "test": 4}  # a tenth, and at least one of a class
    assert parts.data.class_names == ("1", "2")
