"""SnellaModel: SnellModel plus the two calls that let matrices compete during training."""

from collections.abc import Mapping
from typing import cast

from peft.config import PeftConfig
from torch import Tensor, nn

from snell_scale.tuners.snell.model import SnellModel
from snell_scale.tuners.snella.competition import LastUpdate, SparsityCompetition, own_gradient
from snell_scale.tuners.snella.config import SnellaConfig


class SnellaModel(SnellModel):
    """SNELLA (arXiv 2510.24037) as a PEFT tuner; made by `peft.get_peft_model(model, SnellaConfig(…))`.

    for epoch in range(epochs):
        model.allocate(epoch)
        for batch in loader:
            loss.backward(); optimizer.step(); model.update_scores(); optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        self._competitions: dict[str, SparsityCompetition] = {}

    def update_scores(self, adapter_name: str | None = None, *, last_update: LastUpdate = own_gradient) -> None:
        """After each optimizer.step() and before zero_grad; by default for the active adapter."""
        self.competition(adapter_name).update_scores(last_update=last_update)

    def allocate(self, tick: int, adapter_name: str | None = None) -> dict[str, list[float]] | None:
        """At the start of every tick; returns the new sparsities by layer, None where they stay."""
        return self.competition(adapter_name).allocate(tick)

    def allocator_state_dict(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """What a checkpoint needs beside the model's state so that training resumes identically."""
        return self.competition(adapter_name).state_dict()

    def load_allocator_state_dict(self, state: Mapping[str, Tensor], adapter_name: str | None = None) -> None:
        """Take up the state of `allocator_state_dict`."""
        self.competition(adapter_name).load_state_dict(state)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's delete_adapter; the adapter's scores go with it."""
        super().delete_adapter(adapter_name)
        self._competitions.pop(adapter_name, None)

    def competition(self, adapter_name: str | None = None) -> SparsityCompetition:
        """The competition of the active (or the named) adapter."""
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(f"adapters {self.active_adapters} are active: name the one that is meant")
            adapter_name = self.active_adapters[0]
        if adapter_name not in self._competitions:
            config = cast(SnellaConfig, self.peft_config[adapter_name])
            self._competitions[adapter_name] = SparsityCompetition(self.model, config, adapter_name=adapter_name)
        return self._competitions[adapter_name]
