"""How large models are and what adapting them trains: counted from their structure, on the meta device."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from snell_scale.interfaces import ModelBundle
from snell_scale.registry import config_class

Method = Literal["lora", "klora", "snell", "snella", "full"]
RANKS = (8, 32)
METHODS: tuple[Method, ...] = ("lora", "snell", "snella", "full")

_NUM_CLASSES = 1000
# Up to here float32 counts exactly: beyond it an index, or a number of non-zeros, has to be an integer.
_FLOAT32_INTEGERS = 2**24
_SNELLA_SCALARS = 3  # α, γ and β of each matrix

_NOTE = (
    "All targets, without the head that is trained beside them; timm's parameters are with a head of "
    f"{_NUM_CLASSES} classes. klora trains what snell does, snella {_SNELLA_SCALARS} numbers per matrix more, "
    "full every parameter. LoRA is peft's, which sees a fused qkv as one matrix."
)

MODELS: Mapping[str, Mapping[str, Any]] = {
    "ViT-B/16": {"name": "timm", "architecture": "vit_base_patch16_224"},
    "ViT-L/16": {"name": "timm", "architecture": "vit_large_patch16_224"},
    "ViT-H/14": {"name": "timm", "architecture": "vit_huge_patch14_224"},
    "DINOv2 ViT-g/14": {"name": "timm", "architecture": "vit_giant_patch14_dinov2"},
    "DINOv3 ViT-L/16": {"name": "timm", "architecture": "vit_large_patch16_dinov3"},
    "EVA-02-L/14": {"name": "timm", "architecture": "eva02_large_patch14_448"},
    "Swin-B": {"name": "timm", "architecture": "swin_base_patch4_window7_224"},
    "ConvNeXt-B": {"name": "timm", "architecture": "convnext_base"},
    "CLIP ViT-L/14": {"name": "open_clip", "architecture": "ViT-L-14"},
    "CLIP ViT-H/14": {"name": "open_clip", "architecture": "ViT-H-14"},
    "CLIP ViT-bigG/14": {"name": "open_clip", "architecture": "ViT-bigG-14"},
    "SD 1.5 UNet": {"name": "diffusers", "shape": "sd15"},
    "SDXL UNet": {"name": "diffusers", "shape": "sdxl"},
    "SD 3 transformer": {"name": "diffusers", "shape": "sd3"},
    "FLUX.1 transformer": {"name": "diffusers", "shape": "flux"},
    "PixArt-α transformer": {"name": "diffusers", "shape": "pixart"},
}
"""Label → model config of the models that the table lists."""


@dataclass(frozen=True)
class Matrix:
    """One weight as a matrix; a convolution's columns are in·kh·kw."""

    name: str
    num_rows: int
    num_columns: int

    @property
    def num_entries(self) -> int:
        return self.num_rows * self.num_columns


@dataclass(frozen=True)
class Census:
    """What target group "all" of a model holds.

    matrices: what SNELL adapts, q, k and v apart. layers: what peft's LoRA adapts, fused projections as one.
    num_parameters: with the head. num_head: the head's (of 1000 classes in `census_of`).
    """

    matrices: tuple[Matrix, ...]
    layers: tuple[Matrix, ...]
    num_parameters: int
    num_head: int

    @property
    def largest(self) -> Matrix:
        """The first of the largest matrices."""
        return max(self.matrices, key=lambda matrix: matrix.num_entries)

    @property
    def max_rank(self) -> int:
        """The largest rank that every matrix can take."""
        return min(min(matrix.num_rows, matrix.num_columns) for matrix in self.matrices)

    @property
    def exceeds_float32_integers(self) -> bool:
        """Whether a matrix has more than 2^24 entries."""
        return self.largest.num_entries > _FLOAT32_INTEGERS

    def num_trainable(self, method: Method, rank: int) -> int:
        """Numbers that train beside the head; of "full" all of them, whatever the rank."""
        if method == "full":
            return self.num_parameters - self.num_head
        adapted = self.layers if method == "lora" else self.matrices
        factors = sum(rank * (matrix.num_rows + matrix.num_columns) for matrix in adapted)
        return factors + (_SNELLA_SCALARS * len(self.matrices) if method == "snella" else 0)


def census(bundle: ModelBundle) -> Census:
    """Count a bundle's targets and parameters; on any device, meta included."""
    modules = dict(bundle.module.named_modules())
    pattern = re.compile(bundle.target_groups["all"])
    layers = [
        layer for name, module in modules.items() if pattern.fullmatch(name) for layer in _layers(name, module)
    ]
    fused = [(layer, _num_fused(layer.name, bundle.fused_groups)) for layer in layers]
    heads = {p for name in bundle.head_modules for p in modules[name].parameters()}
    return Census(
        matrices=tuple(
            Matrix(layer.name, layer.num_rows // count, layer.num_columns)
            for layer, count in fused
            for _ in range(count)
        ),
        layers=tuple(layers),
        num_parameters=sum(p.numel() for p in bundle.module.parameters()),
        num_head=sum(p.numel() for p in heads),
    )


def census_of(label: str) -> Census:
    """The census of one of `MODELS`, built on the meta device; ValueError where its library is not installed."""
    settings = MODELS[label]
    config = config_class("model", settings["name"]).model_validate(dict(settings))
    image = config.preprocessing().image
    with torch.device("meta"):
        return census(config.build(num_classes=_NUM_CLASSES, input_spec=image, seed=0))


def census_rows(labels: Iterable[str] = tuple(MODELS)) -> list[dict[str, str]]:
    """A row per model, as the table shows it: column → text; without those whose library is not installed."""
    # A family is registered under the name of its library.
    return [_row(label, census_of(label)) for label in labels if find_spec(MODELS[label]["name"])]


def census_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a Markdown table with what the columns leave unsaid below it."""
    titles = list(rows[0])
    lines = [titles, ["---", *["--:"] * (len(titles) - 1)], *([row[title] for title in titles] for row in rows)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", _NOTE])


def _row(label: str, counted: Census) -> dict[str, str]:
    largest = counted.largest
    row = {
        "model": label,
        "parameters": _millions(counted.num_parameters),
        "matrices": f"{len(counted.matrices):,}",
    }
    for method in ("lora", "snell"):
        for rank in RANKS:
            fits = rank <= counted.max_rank
            row[f"{method} r={rank}"] = _millions(counted.num_trainable(method, rank)) if fits else "—"
    mark = " > 2^24" if counted.exceeds_float32_integers else ""
    row["largest matrix"] = f"{largest.num_rows}×{largest.num_columns} ({_millions(largest.num_entries)}{mark})"
    return row


def _layers(name: str, module: nn.Module) -> list[Matrix]:
    """nn.MultiheadAttention has two weights: q, k and v in one, and its out projection."""
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        return [
            Matrix(f"{name}.in_proj_weight", 3 * width, width),
            Matrix(f"{name}.out_proj.weight", width, width),
        ]
    if isinstance(module, nn.Conv2d):
        return [Matrix(f"{name}.weight", module.out_channels, module.weight[0].numel())]
    assert isinstance(module, nn.Linear), f"target {name} is a {type(module).__name__}"
    return [Matrix(f"{name}.weight", module.out_features, module.in_features)]


def _num_fused(name: str, fused_groups: Mapping[str, int]) -> int:
    if name.endswith(".in_proj_weight"):
        return 3
    owner = name.removesuffix(".weight")
    return next((n for end, n in fused_groups.items() if owner == end or owner.endswith(f".{end}")), 1)


def _millions(count: int) -> str:
    return f"{count / 1e6:.4g} M" if count < 1e9 else f"{count / 1e9:.4g} G"
