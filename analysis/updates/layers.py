"""Names of layers: their order, the block that they belong to, and how many matrices are stacked in one."""

import re

# timm's and open_clip's fused projections: q, k and v, one above the other.
_THREE_IN_ONE = ("qkv", "in_proj_weight", "attn")
_PARTS = {3: ("q", "k", "v"), 4: ("q", "k", "v", "out_proj")}
# blocks.3, resblocks.3, layer1.0, down_blocks.1.attentions.0.transformer_blocks.2: the innermost counts.
_BLOCK = re.compile(r".*(?:^|[._]|res)(?:blocks?|layers?|stages?)\d*\.\d+(?=\.|$)")


def natural(name: str) -> list[str | int]:
    """A key that sorts blocks.2 before blocks.10."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]


def block_of(layer: str) -> str | None:
    """ "blocks.3" of "blocks.3.attn.qkv"; None for what is in no numbered block (an embedding, the head)."""
    found = _BLOCK.match(layer)
    return None if found is None else found[0]


def stage_of(layer: str) -> str:
    """Where it is in a few words: up to its first number ("down_blocks.2", "blocks.3"), or its name."""
    found = re.match(r".*?\.\d+(?=\.|$)", layer)
    return layer if found is None else found[0]


def kind_of(layer: str, index: int, count: int) -> str:
    """ "attn.q" of "blocks.3.attn.qkv", index 0 of 3: what the matrices at one place of every block share."""
    rest = layer.removeprefix(block_of(layer) or "").strip(".").replace("base_layer.", "")
    if count not in _PARTS:
        return rest if count == 1 else f"{rest}.{index}"
    parent = rest.removesuffix("qkv").removesuffix("in_proj_weight").strip(".")
    return f"{parent}.{_PARTS[count][index]}".strip(".")


def num_stacked(layer: str, num_rows: int, num_columns: int) -> int:
    """3 for a fused projection of q, k and v (told by name and shape), else 1."""
    is_fused = layer.rpartition(".")[2] in _THREE_IN_ONE and num_rows == 3 * num_columns
    return 3 if is_fused else 1
