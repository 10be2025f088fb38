"""The transfer benchmarks: tasks in the published order and groups, and published results to compare with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A result as printed: best epoch on the test images, ViT-B/16 from ImageNet-21k, top-1 in percent."""

    method: str
    mean: float


@dataclass(frozen=True)
class Benchmark:
    """Tasks by their names in records, with the heading of each; groups of tasks, or one group without a name.

    mean: heading of the published mean, over the groups' means (over the tasks where there is one group).
    """

    name: str
    title: str
    groups: dict[str, dict[str, str]]
    mean: str
    published: tuple[Published, ...]

    @property
    def tasks(self) -> dict[str, str]:
        """Task → heading, of all groups."""
        return {task: heading for group in self.groups.values() for task, heading in group.items()}


def _published(means: dict[str, float]) -> tuple[Published, ...]:
    return tuple(Published(method, mean) for method, mean in means.items())


VTAB = Benchmark(
    name="vtab",
    title="VTAB-1k",
    groups={
        "Natural": {
            "cifar": "CIFAR-100",
            "caltech101": "Caltech101",
            "dtd": "DTD",
            "oxford_flowers102": "Flowers102",
            "oxford_iiit_pet": "Pets",
            "svhn": "SVHN",
            "sun397": "Sun397",
        },
        "Specialized": {
            "patch_camelyon": "Camelyon",
            "eurosat": "EuroSAT",
            "resisc45": "Resisc45",
            "diabetic_retinopathy": "Retinopathy",
        },
        "Structured": {
            "clevr_count": "Clevr-count",
            "clevr_dist": "Clevr-dist",
            "dmlab": "DMLab",
            "kitti": "KITTI-dist",
            "dsprites_loc": "dSpr-loc",
            "dsprites_ori": "dSpr-ori",
            "smallnorb_azi": "sNORB-azim",
            "smallnorb_ele": "sNORB-elev",
        },
    },
    mean="Mean of 3 groups",
    published=_published(
        {
            "full fine-tuning": 69.0,
            "linear probe": 57.6,
            "BitFit": 65.2,
            "VPT-Deep": 72.0,
            "Adapter-8": 73.9,
            "LoRA-8": 74.9,
            "SSF": 75.7,
            "SPT-LoRA": 76.4,
            "SNELL-8": 76.4,
            "SNELL-16": 76.7,
            "SNELL-32": 76.9,
        }
    ),
)

FGVC = Benchmark(
    name="fgvc",
    title="FGVC",
    groups={
        "": {
            "cub": "CUB-200-2011",
            "nabirds": "NABirds",
            "flowers": "Oxford Flowers",
            "dogs": "Stanford Dogs",
            "cars": "Stanford Cars",
        }
    },
    mean="Mean of 5 sets",
    published=_published(
        {
            "full fine-tuning": 88.5,
            "linear probe": 79.3,
            "BitFit": 88.4,
            "VPT-Deep": 89.1,
            "Adapter-8": 85.5,
            "LoRA-8": 86.0,
            "SSF": 90.7,
            "SPT-Adapter": 89.8,
            "SPT-LoRA": 90.1,
            "GPS": 91.8,
            "SNELL-8": 91.5,
            "SNELL-16": 91.7,
            "SNELL-32": 91.8,
            "SNELLA": 91.9,
        }
    ),
)

BENCHMARKS = (VTAB, FGVC)
