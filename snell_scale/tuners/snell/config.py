"""SnellConfig: everything a SNELL adapter is made from, checked before any module is touched."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, get_args

from peft.config import PeftConfig

from snell_scale.tuners.snell.checks import (
    check_choice,
    check_count,
    check_fraction,
    check_names,
    check_positive,
    is_number,
)

Kernel = Literal["distance", "mixk", "linear", "sigmoid", "rbf", "exponential"]
Weighting = Literal["magnitude", "soft", "hard"]
InitWeights = Literal["random", "scaled", "zeros"]


class SnellPeftType(str, Enum):
    """Stands where peft's own PeftType would: equal to the plain strings that peft looks methods up by."""

    SNELL = "SNELL"
    SNELLA = "SNELLA"


def field_help(text: str) -> dict[str, str]:
    """Metadata of a config field, as PEFT writes it."""
    return {"help": text}


@dataclass
class SnellConfig(PeftConfig):
    """Configuration of SNELL (arXiv 2411.01800): W = W0 + sparsify(K(A, B)) for every targeted matrix.

    `r` and `sparsity` have no default: leaving one out raises ValueError, as does every value out of range.
    """

    competes: ClassVar[bool] = False  # whether sparsities change during training

    r: int = field(default=0, metadata=field_help("Rank: columns of A and B, all components together. Required."))
    sparsity: float | None = field(
        default=math.nan,
        metadata=field_help(
            "Share of entries of each ΔW set to zero, in [0, 1); None is the dense kernelised LoRA. Required."
        ),
    )
    kernel: Kernel = field(default="distance", metadata=field_help(f"K(A, B): one of {get_args(Kernel)}."))
    weighting: Weighting = field(
        default="magnitude",
        metadata=field_help("Factor without gradient on surviving entries: |K| (as published), |K| − τ, or 1."),
    )
    num_components: int = field(
        default=2, metadata=field_help("Distance components H that share the rank; r must be divisible by it.")
    )
    scale: float | Literal["auto"] = field(
        default=0.1,
        metadata=field_help(
            "Coefficient c of the distances. 'auto' makes ΔW's start-up size independent of width and rank "
            "(0.1 at 768 features and r=32)."
        ),
    )
    dropout: float = field(default=0.0, metadata=field_help("Dropout on the input of the delta, in [0, 1)."))
    dropout_exclude_modules: list[str] | str | None = field(
        default=None,
        metadata=field_help("Modules without that dropout: list of name endings or a regex (published: proj)."),
    )
    drop_path: float = field(
        default=0.0, metadata=field_help("Share of samples whose delta is dropped in training, in [0, 1).")
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata=field_help(
            "Modules to adapt: list of name endings, a regex, or 'all-linear' (without classifier)."
        ),
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata=field_help("Modules not to adapt: list of name endings or a regex.")
    )
    fused_groups: dict[str, int] = field(
        default_factory=lambda: {"qkv": 3},
        metadata=field_help(
            "Name ending → number of matrices stacked along the output of such a module; each gets its own "
            "factors and threshold."
        ),
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata=field_help("Name ending or regex → rank, for modules that differ from `r`."),
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=field_help("Indices of the layers to adapt; needs target_modules as a list.")
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata=field_help("Name of the list of layers that layers_to_transform counts in.")
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=field_help("Modules trained and saved whole beside the deltas, e.g. the head.")
    )
    init_weights: bool | InitWeights = field(
        default=True,
        metadata=field_help(
            "True or 'random': kaiming-uniform factors, as published (ΔW starts tiny, not zero). 'scaled': the "
            "same times init_scale. 'zeros': a saddle, no gradient ever leaves it; for studies only. False: "
            "factors large enough to change the output at once, for tests."
        ),
    )
    init_scale: float = field(
        default=1.0, metadata=field_help("Multiplies the factors under init_weights='scaled'.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SnellPeftType.SNELL
        self._check_ranks()
        self._check_sparsity()
        check_choice("kernel", self.kernel, get_args(Kernel))
        check_choice("weighting", self.weighting, get_args(Weighting))
        if self.scale != "auto":
            check_positive("scale", self.scale, advice="or give 'auto'")
        check_fraction("dropout", self.dropout)
        check_fraction("drop_path", self.drop_path)
        self._check_targets()
        self._check_init()

    @property
    def start_sparsity(self) -> float | None:
        """The sparsity a new layer begins with."""
        return self.sparsity

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, sets of module names in sorted order (equal files for equal runs)."""
        return {
            key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()
        }

    def _check_ranks(self) -> None:
        check_count("num_components", self.num_components)
        if self.r == 0:
            raise ValueError("r is missing: there is no default rank, give one, e.g. r=8")
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            check_count(name, rank)
            if rank % self.num_components:
                nearest = max(rank // self.num_components, 1) * self.num_components
                raise ValueError(
                    f"{name}={rank} is not divisible by num_components={self.num_components}, which share it: "
                    f"use e.g. {nearest}, or another num_components"
                )

    def _check_sparsity(self) -> None:
        if is_number(self.sparsity) and math.isnan(self.sparsity):
            raise ValueError(
                "sparsity is missing: there is no default, give a share of zeros in [0, 1), e.g. sparsity=0.9, "
                "or sparsity=None for the dense kernelised LoRA"
            )
        if self.sparsity is not None:
            check_fraction(
                "sparsity", self.sparsity, advice="it is the share of entries set to zero; None is dense"
            )

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "dropout_exclude_modules", "modules_to_save"):
            check_names(name, getattr(self, name))
        for ending, count in self.fused_groups.items():
            check_count(f"fused_groups[{ending!r}]", count)
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} does nothing without layers_to_transform: give both"
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform needs target_modules as a list of names, got {self.target_modules!r}: "
                "give a list, or write the layer indices into the regex"
            )

    def _check_init(self) -> None:
        check_choice("init_weights", self.init_weights, (True, False, *get_args(InitWeights)))
        check_positive("init_scale", self.init_scale, advice="for factors of zero give init_weights='zeros'")
        if self.init_scale != 1.0 and self.init_weights != "scaled":
            raise ValueError(
                f"init_scale={self.init_scale} does nothing with init_weights={self.init_weights!r}: "
                "give init_weights='scaled'"
            )
