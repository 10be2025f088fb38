"""What a tuner and an engine must know of a diffusers denoiser, read off the model: blocks and targets."""

import re
from typing import Any, cast

from torch import nn

from snell_scale.models.module_names import outermost, pattern_of

# The repeated units: ResnetBlock2D, BasicTransformerBlock, JointTransformerBlock, FluxSingleTransformerBlock, …
_BLOCK_CLASS = re.compile(r"(ResnetBlock2D|TransformerBlock)$")
# Into and out of the model: as the stem and the head of a classifier, they are left as they are.
_ENDS = ("conv_in", "conv_out", "pos_embed", "x_embedder", "proj_out")


def wrap_points(module: nn.Module) -> tuple[str, ...]:
    """Names of the outermost residual and transformer blocks, in order."""
    return outermost(module, _BLOCK_CLASS)


def target_groups(module: nn.Module) -> dict[str, str]:
    """Group → regular expression of the layers in it.

    "all": every linear layer and ungrouped convolution but the model's first and last; "linear", "conv";
    "attention": below an attention module; "cross_attention": below one that reads the text alone; "mlp":
    feed-forward layers. Layers whose output the model throws away are in none: an adapter there never trains.
    """
    targets = _targets(module)
    names = {
        "all": targets,
        "linear": [name for name in targets if isinstance(module.get_submodule(name), nn.Linear)],
        "conv": [name for name in targets if isinstance(module.get_submodule(name), nn.Conv2d)],
        "attention": [name for name in targets if _attention_above(module, name) is not None],
        "cross_attention": [
            name for name in targets if getattr(_attention_above(module, name), "is_cross_attention", False)
        ],
        "mlp": [name for name in targets if _is_feed_forward(module, name)],
    }
    return {group: pattern_of(module, members) for group, members in names.items() if members}


def _targets(module: nn.Module) -> list[str]:
    return [
        name
        for name, child in module.named_modules()
        if (isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and child.groups == 1))
        and name.split(".")[0] not in _ENDS
        and not _is_unused(module, name)
    ]


def _is_unused(module: nn.Module, name: str) -> bool:
    """Queries of the text in SD3's last block: the block returns no text, so that nothing reads them."""
    attention = _attention_above(module, name)
    return name.endswith(".add_q_proj") and cast(Any, attention).context_pre_only is True


def _attention_above(module: nn.Module, name: str) -> nn.Module | None:
    for above in _ancestors(module, name):
        if type(above).__name__.endswith("Attention"):
            return above
    return None


def _is_feed_forward(module: nn.Module, name: str) -> bool:
    below = any(type(above).__name__ == "FeedForward" for above in _ancestors(module, name))
    return below or name.endswith(".proj_mlp")  # FLUX's single blocks have theirs beside the attention


def _ancestors(module: nn.Module, name: str) -> list[nn.Module]:
    parts = name.split(".")
    return [module.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
