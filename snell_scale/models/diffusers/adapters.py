"""Adapters that diffusers put into a model (`add_adapter`), to and from PEFT's files.

diffusers' own `save_lora_adapter` and `load_lora_adapter` know LoRA alone. What is written here is PEFT's layout,
which a run's adapter folder has too, so that either side reads the other's:

    from snell_scale.tuners import SnellConfig        # also makes peft know SNELL and SNELLA

    unet.add_adapter(SnellConfig(r=8, sparsity=0.9, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    …                                    # train
    save_adapter(unet, "adapter")        # adapter_config.json + adapter_model.safetensors
    load_adapter(pipeline.unet, "adapter")             # into a pipeline, by this function
    PeftModel.from_pretrained(pipeline.unet, "adapter")    # or by peft alone
"""

from pathlib import Path

from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.functional import set_adapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snell_scale.models.weight_files.fit import mismatches

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, folder: str | Path, *, adapter_name: str = "default") -> None:
    """Write one adapter of a diffusers model as `PeftModel.save_pretrained` would. ValueError if it has none."""
    configs = getattr(model, "peft_config", None) or {}
    config = configs.get(adapter_name)
    if config is None:
        raise ValueError(
            f"the {type(model).__name__} has no adapter {adapter_name!r}, it has {sorted(configs) or 'none'}"
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    trains, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = trains


def load_adapter(
    model: nn.Module, folder: str | Path, *, adapter_name: str = "default", is_trainable: bool = False
) -> None:
    """Add the adapter in `folder` to a diffusers model, of which it becomes the active one.

    ValueError where files are missing, or where the adapter's tensors are not those of this model.
    """
    folder = Path(folder)
    config, state = _read(folder)
    config.inference_mode = not is_trainable
    if not hasattr(model, "add_adapter"):
        raise ValueError(f"{type(model).__name__} takes no adapters by itself: use PeftModel.from_pretrained")
    model.add_adapter(config, adapter_name)  # pyright: ignore[reportCallIssue]
    problems = mismatches(get_peft_model_state_dict(model, adapter_name=adapter_name), state)
    if problems:
        model.delete_adapters(adapter_name)  # pyright: ignore[reportCallIssue]
        raise ValueError(
            f"{folder} is no adapter of this {type(model).__name__}: {'; '.join(problems)}; give the model "
            "that it was trained on"
        )
    set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    set_adapter(model, adapter_name, inference_mode=not is_trainable)  # diffusers' own always trains


def _read(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}: give the folder of a PEFT adapter")
    try:
        state = load_file(folder / _WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / _WEIGHTS} is damaged: {error}") from error
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except KeyError as error:
        raise ValueError(
            f"peft does not know the method {error} of {folder / _CONFIG}; for SNELL and SNELLA: import "
            "snell_scale.tuners first"
        ) from error
    return config, {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
