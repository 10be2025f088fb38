"""SnellaConfig: a SnellConfig whose sparsity is a budget that all adapted matrices compete for."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from snell_scale.tuners.snell.checks import check_choice, check_count, check_fraction, is_number
from snell_scale.tuners.snell.config import Kernel, SnellConfig, SnellPeftType, field_help
from snell_scale.tuners.snella.allocator import BudgetSchedule

Tick = Literal["epoch", "step"]


@dataclass
class SnellaConfig(SnellConfig):
    """Configuration of SNELLA (arXiv 2510.24037). `r`, `init_sparsity` and `target_sparsity` have no default.

    The budget of non-zeros goes from `init_sparsity` to `target_sparsity` over `total_ticks`; at the start of
    each tick the training loop calls `allocate(tick)`, after each optimizer step `update_scores()`.
    """

    competes: ClassVar[bool] = True

    kernel: Kernel = field(default="mixk", metadata=field_help("K(A, B), as in SnellConfig."))
    sparsity: float | None = field(
        default=None, metadata=field_help("Not used: each matrix's sparsity follows from the budget.")
    )
    init_sparsity: float = field(
        default=math.nan, metadata=field_help("Share of zeros at the start, in [0, 1). Published: 0. Required.")
    )
    target_sparsity: float = field(
        default=math.nan, metadata=field_help("Share of zeros over all matrices at the end, in [0, 1). Required.")
    )
    init_warmup: int = field(default=0, metadata=field_help("Ticks before the budget begins to shrink."))
    final_warmup: int = field(default=0, metadata=field_help("Last ticks, spent at target_sparsity."))
    mask_interval: int = field(default=1, metadata=field_help("Ticks between two allocations."))
    beta1: float = field(default=0.85, metadata=field_help("Decay of the averaged importance, in [0, 1)."))
    beta2: float = field(default=0.85, metadata=field_help("Decay of the averaged uncertainty, in [0, 1)."))
    tick: Tick = field(
        default="epoch", metadata=field_help("What the training loop counts as a tick; published: the epoch.")
    )
    total_ticks: int | None = field(
        default=None, metadata=field_help("Ticks of the whole training; needed to train, not to use an adapter.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SnellPeftType.SNELLA
        check_choice("tick", self.tick, get_args(Tick))
        for name in ("beta1", "beta2"):
            check_fraction(name, getattr(self, name))
        for name, least in (("init_warmup", 0), ("final_warmup", 0), ("mask_interval", 1)):
            check_count(name, getattr(self, name), least=least)
        if self.total_ticks is not None:
            self.schedule()

    @property
    def start_sparsity(self) -> float | None:
        """The sparsity a new layer begins with."""
        return self.init_sparsity

    def schedule(self) -> BudgetSchedule:
        """The budget over time; ValueError where total_ticks is missing or too few for the warm-ups."""
        if self.total_ticks is None:
            raise ValueError(
                f"total_ticks is missing: to train SNELLA, set it to the number of {self.tick}s of the training"
            )
        check_count("total_ticks", self.total_ticks)
        # The first tick allocates nothing: with one more tick than the warm-ups the budget would never shrink.
        if self.total_ticks <= self.init_warmup + self.final_warmup + 1:
            raise ValueError(
                f"total_ticks={self.total_ticks} must exceed init_warmup + final_warmup + 1 = "
                f"{self.init_warmup} + {self.final_warmup} + 1: train longer, shorten the "
                "warm-ups, or count in steps (tick='step')"
            )
        return BudgetSchedule(
            init_sparsity=self.init_sparsity,
            target_sparsity=self.target_sparsity,
            total_ticks=self.total_ticks,
            init_warmup=self.init_warmup,
            final_warmup=self.final_warmup,
            mask_interval=self.mask_interval,
        )

    def _check_sparsity(self) -> None:
        if self.sparsity is not None:
            raise ValueError(
                f"sparsity={self.sparsity!r} does not apply to SNELLA, whose matrices compete for a budget: "
                "give init_sparsity and target_sparsity"
            )
        for name in ("init_sparsity", "target_sparsity"):
            value = getattr(self, name)
            if is_number(value) and math.isnan(value):
                raise ValueError(f"{name} is missing: there is no default, give a share of zeros in [0, 1)")
            check_fraction(name, value)
