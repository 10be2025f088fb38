"""Folds a trained adapter into its base model and writes plain weights."""

import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from snell_scale.assembly import build_data_and_model
from snell_scale.config import Config
from snell_scale.records import write_atomically


def merge_adapter(config: Config, adapter: Path, output: Path, *, overwrite: bool) -> tuple[int, int]:
    """Write the merged weights of `config`'s model to `output`; returns (tensors, bytes).

    ValueError if the adapter is none, does not fit the model, or the output is not a free .safetensors path.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"--output is {output}, expected a path that ends in .safetensors")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; choose another --output or pass --overwrite")
    merged = _merged_module(config, adapter)
    tensors = {name: tensor.contiguous().clone() for name, tensor in merged.state_dict().items()}
    content = save(tensors, metadata={"format": "pt"})
    write_atomically(output, content)
    return len(tensors), len(content)


def _merged_module(config: Config, adapter: Path) -> nn.Module:
    _, bundle = build_data_and_model(config)
    if (adapter / "adapter_config.json").is_file():
        return _merge_peft(bundle.module, adapter)
    from snell_scale.tuners.methods.trained_file import load_trained

    load_trained(bundle.module, adapter)
    return bundle.module


def _merge_peft(module: nn.Module, adapter: Path) -> nn.Module:
    from peft import PeftModel, get_peft_model_state_dict

    from snell_scale.tuners import peft_registration

    peft_registration.register()

    try:
        saved = set(load_file(adapter / "adapter_model.safetensors"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of what is refused below
            model = PeftModel.from_pretrained(module, str(adapter))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{adapter} is damaged, or not an adapter of this model: {error}") from error
    wanted = set(get_peft_model_state_dict(model))
    # Single parameters of the base model (cls_token) travel in the file beside the adapter's own.
    wanted |= saved & {name for name, _ in model.named_parameters()}
    if saved != wanted:
        raise ValueError(
            f"{adapter} is not an adapter of this model: {len(wanted - saved)} tensors are missing in it and "
            f"{len(saved - wanted)} have no place (e.g. {min(saved ^ wanted)}); name its own base with --base"
        )
    return model.merge_and_unload(safe_merge=True)
