"""What a method without PEFT trained, on disk: `trained.safetensors`, whole tensors or only the chosen entries.

Of a tensor of which only some entries train, the file holds "<name>#indices" (positions in the flattened
tensor) and "<name>#values". `method.json` beside it says which method wrote it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snell_scale.records import write_json

WEIGHTS_FILE = "trained.safetensors"
METHOD_FILE = "method.json"
_INDICES, _VALUES = "#indices", "#values"


def trained_names(module: nn.Module) -> list[str]:
    """Of the parameters that train, and of the buffers of the modules that own one (batch statistics)."""
    parameters = dict(module.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    owners = {_owner(name) for name in trained}
    return [
        name
        for name in module.state_dict()
        if name in trained or (name not in parameters and _owner(name) in owners)
    ]


def write_trained(
    folder: Path,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    method: Mapping[str, Any],
    chosen: Mapping[str, Tensor] | None = None,
) -> int:
    """Write whole `tensors` of `module` to `folder`; of those in `chosen` only the entries at these indices.

    method: plain data for method.json, which also notes the module's size. Returns the bytes of the files.
    """
    content: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if chosen is None or name not in chosen:
            content[name] = tensor
            continue
        indices = chosen[name].to(tensor.device)
        # int32 where it can count that far: the indices are half of the file.
        content[name + _INDICES] = indices.to(torch.int32 if tensor.numel() <= 2**31 else torch.int64)
        content[name + _VALUES] = tensor.flatten()[indices]
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
    save_file(on_cpu, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / METHOD_FILE, {**method, "model_parameters": _num_parameters(module)})
    return sum((folder / name).stat().st_size for name in (WEIGHTS_FILE, METHOD_FILE))


@torch.no_grad()
def load_trained(module: nn.Module, folder: Path) -> dict[str, Any]:
    """Put what `write_trained` wrote into `module`, in place; returns the content of method.json.

    module: the model as it was before training. ValueError where the files are missing, damaged, or hold
    tensors that the module does not have in that shape.
    """
    try:
        content = load_file(folder / WEIGHTS_FILE)
        method = json.loads((folder / METHOD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} does not hold {WEIGHTS_FILE} and {METHOD_FILE}: is it an adapter folder?"
        ) from None
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    live = module.state_dict()  # shares memory with the module
    expected, found = method.get("model_parameters"), _num_parameters(module)
    if expected != found:
        raise ValueError(
            f"{folder} was trained on a model of {expected} parameters, this one has {found}; build the model "
            "that it was trained on"
        )
    problems = [name for name, tensor in content.items() if not _fits(name, tensor, live)]
    if problems:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not fit this model: {len(problems)} tensors are absent or of another "
            f"shape (first: {problems[0]}); build the model that it was trained on"
        )
    for name, tensor in content.items():
        if name.endswith(_INDICES):
            base = name.removesuffix(_INDICES)
            indices = tensor.long().to(live[base].device)
            live[base].view(-1)[indices] = content[base + _VALUES].to(live[base])
        elif not name.endswith(_VALUES):
            live[name].copy_(tensor)
    return method


def _fits(name: str, tensor: Tensor, live: Mapping[str, Tensor]) -> bool:
    base = name.removesuffix(_INDICES).removesuffix(_VALUES)
    if base not in live:
        return False
    if name.endswith(_INDICES):
        return bool(len(tensor) == 0 or (tensor.min() >= 0 and tensor.max() < live[base].numel()))
    return name.endswith(_VALUES) or tensor.shape == live[base].shape


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
