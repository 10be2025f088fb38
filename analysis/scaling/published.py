"""Peak training memory as published, to stand beside one's own: SNELL, LoRA and GPS on three ViTs."""

from dataclasses import dataclass

SOURCE = (
    "SNELL, arXiv 2411.01800 (NeurIPS 2024): training memory in MB at batch 8 and 224×224 pixels; the paper "
    "prints the same numbers for SNELL-8 and SNELL-32, its LoRA has rank 8"
)


@dataclass(frozen=True)
class PublishedMemory:
    """One model's row. prefix: how its architecture's name starts in records."""

    model: str
    prefix: str
    peak_mb: dict[str, float]  # by method, as records name it

    def saving_percent(self, subject: str, base: str) -> float | None:
        """How much less `subject` needs than `base`; negative: more. None where one of them is not printed."""
        if subject not in self.peak_mb or base not in self.peak_mb:
            return None
        return 100 * (1 - self.peak_mb[subject] / self.peak_mb[base])


PUBLISHED_MEMORY = (
    PublishedMemory("ViT-B/16", "vit_base_patch16", {"lora": 1546, "snell": 1673, "gps": 2428}),
    PublishedMemory("ViT-L/16", "vit_large_patch16", {"lora": 4325, "snell": 4519, "gps": 7522}),
    PublishedMemory("ViT-H/14", "vit_huge_patch14", {"lora": 9325, "snell": 9692, "gps": 16119}),
)


def published_of(architecture: str, *, image_size: object) -> PublishedMemory | None:
    """The published row of the architecture that a record names, if there is one and the images are as large.

    image_size: as runs have it, "[224, 224]"; where it is not known, what the architecture's name says counts.
    """
    name = architecture.partition(".")[0]  # timm: architecture.weights
    is_224 = image_size == "[224, 224]" if isinstance(image_size, str) else name.endswith("_224")
    return next((row for row in PUBLISHED_MEMORY if is_224 and name.startswith(row.prefix)), None)
