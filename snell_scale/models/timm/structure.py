"""What a tuner and an engine must know of a timm model, read off the model: blocks, targets, head."""

import re
from typing import Any, cast

from torch import nn

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.models.module_names import outermost, pattern_of

# timm's names for the unit that is repeated: Block, SwinTransformerBlock, BasicBlock, Bottleneck, …
_BLOCK_CLASS = re.compile(
    r"(Block(\d+|\dd)?|BlockPostNorm|Bottleneck|Bottle2neck|InvertedResidual|DepthwiseSeparableConv"
    r"|(PreAct|Dla|SelectiveKernel)Basic|^Transformer(Layer)?|Outlooker|Inception[A-E]|Cell)$"
)

# timm's files whose `qkv`, `kv` and `qk` layers hold whole matrices, one above the other. In others (TinyViT,
# EfficientFormer, LeViT, MaxViT) the rows of q, k and v alternate head by head, or their sizes differ.
_STACKED_IN = (
    r"(beit|cait|coat|convit|davit|edgenext|eva|fastvit|hiera|hieradet_sam2|metaformer|mvitv2|nest|pvt_v2|tnt|twins"
    r"|swin_transformer(_v2|_v2_cr)?|vision_transformer_(relpos|sam)|volo|xcit|attention|attention_pool)"
)
_POSITION_BIASES = {"cpb_mlp", "meta_mlp", "rel_pos", "pos_embed", "pos_proj"}
# (timm's file, class) of modules that read their convolution's kernel_size, which an adapter's layer has not.
_READS_ITS_CONV = {("davit", "Downsample")}
_STACKED = {"qkv": 3, "kv": 2, "qk": 2}


def bundle_of(module: nn.Module, input_spec: InputSpec) -> ModelBundle:
    """The bundle of a timm model.

    Targets are the linear layers and ungrouped convolutions other than the stem (patch embedding) and the
    head. Left out are also convolutions whose class changes the weight before its use (weight standardisation,
    TensorFlow's padding), which no delta could follow, those whose attributes the model reads (DaViT's
    downsampling), and the small layers that make tables of position biases (a row per head: fewer than most
    ranks). Groups: "all", "linear", "attention" (below a module named attn), "mlp" (below one named mlp).

    fused_groups has every layer that stacks matrices of equal size: qkv (3), the kv of attention pools and
    spatial reductions (2), and fc1 of packed gated MLPs (2: DINOv2-g's SwiGLU), whose gate and value are two
    matrices in the papers and in EVA-02's files. Each then has its own factors and threshold, as the authors' q,
    k and v have. in_proj of timm's parallel blocks stacks matrices of different sizes and stays one.

    Layers that would not be called are made to be, see `call_every_layer`.
    """
    heads = _head_modules(module)
    targets = _targets(module, heads)
    call_every_layer(module)
    names = {
        "all": targets,
        "linear": [name for name in targets if isinstance(module.get_submodule(name), nn.Linear)],
        "attention": [name for name in targets if "attn" in name.split(".")],
        "mlp": [name for name in targets if "mlp" in name.split(".")],
    }
    parameters = dict(module.named_parameters())
    return ModelBundle(
        module=module,
        wrap_points=outermost(module, _BLOCK_CLASS),
        target_groups={group: pattern_of(module, members) for group, members in names.items() if members},
        fused_groups=_fused_groups(module, targets),
        head_modules=heads,
        input_spec=input_spec,
        extra_trainable=tuple(name for name in ("cls_token",) if name in parameters),
        no_decay=frozenset(_undecayed(module) & parameters.keys()),
    )


def patch_size(module: nn.Module) -> tuple[int, int]:
    """(height, width) of the patches that a timm model cuts an image into; (1, 1) of one that cuts none."""
    found = getattr(getattr(module, "patch_embed", None), "patch_size", None) or 1
    return tuple(found) if isinstance(found, (tuple, list)) else (found, found)


def call_every_layer(module: nn.Module) -> None:
    """Make EVA's, BEiT's and Swin-V2's attention call its fused qkv layer. In place; same outputs.

    With biases for q and v alone they read `qkv.weight` past the layer: an adapter on it would do nothing,
    peft's own included. Whoever puts an adapter on such a model without this package calls this first.
    """
    for child in module.modules():
        if getattr(child, "qkv_bias_separate", True) is False:
            cast(Any, child).qkv_bias_separate = True


def _head_modules(module: nn.Module) -> tuple[str, ...]:
    classifier = cast(Any, module).get_classifier()  # of every timm model, but of no type it declares
    classifiers = list(classifier) if isinstance(classifier, tuple) else [classifier]
    # VOLO's second classifier: its scores are added to the first's.
    classifiers += [child for name, child in module.named_children() if name == "aux_head"]
    # CrossViT has a list with a classifier per branch; peft keeps copies of modules that are called only.
    called = [child for each in classifiers for child in (each if isinstance(each, nn.ModuleList) else [each])]
    return tuple(name for name, child in module.named_modules() if name and any(child is one for one in called))


def _targets(module: nn.Module, heads: tuple[str, ...]) -> list[str]:
    layers = {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d))}
    stem = next((name for name, child in layers.items() if isinstance(child, nn.Conv2d)), "")
    below = tuple(f"{head}." for head in heads)
    names = [
        name
        for name, child in layers.items()
        if _is_adaptable(name, child)
        and not f"{name}.".startswith(below)
        and _kind(module.get_submodule(name.rpartition(".")[0])) not in _READS_ITS_CONV
    ]
    root = stem.split(".")[0]
    outside = [name for name in names if name.split(".")[0] != root]
    # Where stem and body live in one container (VGG's features), only the first convolution is the stem.
    return outside or [name for name in names if name != stem]


def _is_adaptable(name: str, layer: nn.Linear | nn.Conv2d) -> bool:
    if _POSITION_BIASES & set(name.split(".")):
        return False
    return isinstance(layer, nn.Linear) or (layer.groups == 1 and type(layer).forward is nn.Conv2d.forward)


def _fused_groups(module: nn.Module, targets: list[str]) -> dict[str, int]:
    """Name ending → count, the shortest ending that means the same of every target it matches."""
    counts = {name: _num_stacked(module, name) for name in targets}
    groups: dict[str, int] = {}
    for name, count in counts.items():
        parts = name.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        exact = (end for end in endings if {counts[other] for other in _ending(targets, end)} == {count})
        if count > 1:
            groups[next(exact)] = count
    return groups


def _num_stacked(module: nn.Module, name: str) -> int:
    parent_name, _, own_name = name.rpartition(".")
    parent, layer = module.get_submodule(parent_name), module.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        return 1
    if type(parent).__name__ == "GluMlp" and own_name == "fc1":
        return 2
    return _STACKED.get(own_name, 1) if re.fullmatch(_STACKED_IN, _kind(parent)[0]) else 1


def _kind(module: nn.Module) -> tuple[str, str]:
    """(the file that defines it, its class), by name."""
    return type(module).__module__.rpartition(".")[2], type(module).__name__


def _ending(names: list[str], end: str) -> list[str]:
    return [name for name in names if name == end or name.endswith(f".{end}")]


def _undecayed(module: nn.Module) -> set[str]:
    return set(cast(Any, module).no_weight_decay()) if hasattr(module, "no_weight_decay") else set()
