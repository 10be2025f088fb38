"""What runs leave of their updates: adapters as the tuners save them, with the updates; SNELLA's allocations."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from analysis.updates.layers import num_stacked
from snell_scale.records import StepWriter, write_yaml
from tests.tuners.methods.tiny_training import apply, save, select, vit

Updates = dict[tuple[str, int], np.ndarray]


def write_peft_adapter(folder: Path, method: str, **changes: Any) -> Updates:
    """A double-precision adapter with random factors below `folder`; the updates by (layer, index)."""
    bundle = vit()
    bundle.module.double()
    tuner = apply(method, bundle, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuner.module.named_parameters():
            if parameter.requires_grad and ("_A" in name or "_B" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        for name, buffer in tuner.module.named_buffers():
            if "snell_sparsity" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    save(tuner, folder / "adapter")
    found: Updates = {}
    for name, layer in tuner.module.named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight("default").detach().flatten(1)
            plan = getattr(layer, "snell_plan", None)
            groups = plan["default"].num_groups if plan else num_stacked(name, *delta.shape)
            for index, part in enumerate(delta.chunk(groups)):
                found[(name.removeprefix("base_model.model."), index)] = part.numpy()
    return found


def write_trained_weights(folder: Path, method: str) -> Updates:
    """The same of full fine-tuning or GPS, whose base weights lie in a file above the run."""
    bundle = vit()
    base = {name: tensor.clone() for name, tensor in bundle.module.state_dict().items()}
    save_file(base, folder.parent / "base.safetensors")
    write_yaml(folder / "config.yaml", {"model": {"weights": "base.safetensors"}})
    tuner = apply(method, bundle)
    if tuner.needs_selection:
        select(tuner, (bundle.module(torch.ones(2, 1, 8, 8)).square().sum() for _ in range(1)))
    with torch.no_grad():
        for name, parameter in tuner.module.named_parameters():
            if parameter.requires_grad:
                chosen = getattr(tuner, "_chosen", {}).get(name, torch.arange(parameter.numel()))
                parameter.view(-1)[chosen] += 0.5
    save(tuner, folder / "adapter")
    found: Updates = {}
    for name, before in base.items():
        change = (tuner.module.state_dict()[name].double() - before.double()).numpy()
        if name.startswith("blocks.") and change.ndim == 2:
            layer = name.removesuffix(".weight")
            for index, part in enumerate(np.split(change, num_stacked(layer, *change.shape))):
                found[(layer, index)] = part
    return found


def record_allocations(folder: Path, shares_at: dict[int, dict[str, list[float]]]) -> None:
    """Add lines to steps.jsonl: step → layer → sparsities."""
    writer = StepWriter(folder, keep_until_step=1_000)
    for step, shares in shares_at.items():
        line = {f"sparsity/{name}/{index}": s for name, each in shares.items() for index, s in enumerate(each)}
        writer.write({"step": step, "sparsity": 0.5, "nonzeros": 9.0, **line})
    writer.close()
