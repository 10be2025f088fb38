"""Every model family, task, data set, method and engine by name, imported only when asked for."""

import difflib
from importlib import import_module
from typing import Any

# kind → name → "module:attribute" of the component's config class (a StrictModel with `build` or `apply`).
COMPONENTS: dict[str, dict[str, str]] = {
    "model": {
        "timm": "snell_scale.models.timm.config:TimmConfig",
        "open_clip": "snell_scale.models.open_clip.config:OpenClipConfig",
        "diffusers": "snell_scale.models.diffusers.config:DiffusersConfig",
        "timm_segmentation": "snell_scale.models.segmentation.config:TimmSegmentationConfig",
    },
    "data": {
        "digits": "snell_scale.data.embedded:DigitsConfig",
        "vtab": "snell_scale.data.labelled.vtab:VtabConfig",
        "fgvc": "snell_scale.data.labelled.fgvc:FgvcConfig",
        "image_folder": "snell_scale.data.labelled.image_folder:ImageFolderConfig",
        "webdataset": "snell_scale.data.labelled.webdataset:WebdatasetConfig",
        "hf_dataset": "snell_scale.data.labelled.hf:HfDatasetConfig",
        "dreambooth": "snell_scale.data.dreambooth:DreamBoothConfig",
        "shapes": "snell_scale.data.masked.made_scenes:ShapesConfig",
        "digit_scenes": "snell_scale.data.masked.made_scenes:DigitScenesConfig",
        "ade20k": "snell_scale.data.masked.layouts:Ade20kConfig",
        "mask_pairs": "snell_scale.data.masked.layouts:MaskPairsConfig",
        "image_text": "snell_scale.data.captioned.image_text:ImageTextConfig",
    },
    "task": {
        "classification": "snell_scale.tasks.classification:ClassificationConfig",
        "segmentation": "snell_scale.tasks.segmentation:SegmentationConfig",
        "contrastive": "snell_scale.tasks.contrastive:ContrastiveConfig",
        "denoising": "snell_scale.tasks.denoising:DenoisingConfig",
    },
    "method": {
        "probe": "snell_scale.tuners.methods.plain:ProbeConfig",
        "bias": "snell_scale.tuners.methods.plain:BiasConfig",
        "full": "snell_scale.tuners.methods.plain:FullConfig",
        "lora": "snell_scale.tuners.methods.peft_methods:LoraMethodConfig",
        "shira": "snell_scale.tuners.methods.peft_methods:ShiraMethodConfig",
        "gps": "snell_scale.tuners.methods.gps:GpsConfig",
        "klora": "snell_scale.tuners.methods.peft_methods:KloraMethodConfig",
        "snell": "snell_scale.tuners.methods.peft_methods:SnellMethodConfig",
        "snella": "snell_scale.tuners.methods.peft_methods:SnellaMethodConfig",
    },
    "engine": {
        "single": "snell_scale.engines.single:SingleConfig",
        "ddp": "snell_scale.engines.ddp:DdpConfig",
        "deepspeed": "snell_scale.engines.deepspeed_config:DeepSpeedConfig",
        "fsdp2": "snell_scale.engines.fsdp2:Fsdp2Config",
    },
}


def names(kind: str) -> list[str]:
    """The registered names of one kind ("model", "data", "task", "method", "engine")."""
    return list(COMPONENTS[kind])


def config_class(kind: str, name: object) -> type[Any]:
    """The config class registered for (kind, name); ValueError naming the nearest name otherwise."""
    known = COMPONENTS[kind]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{kind}.name is {name!r}, {nearest(str(name), list(known))}")
    module, attribute = known[name].split(":")
    return getattr(import_module(module), attribute)


def nearest(word: str, valid: list[str]) -> str:
    """ "did you mean …?" and the whole list, for an error message."""
    close = difflib.get_close_matches(word, valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"which is not known: {hint}Valid: {', '.join(sorted(valid))}."
