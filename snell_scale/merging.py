"""Folds a trained adapter into its base model and writes plain weights."""

from pathlib import Path

from safetensors.torch import save
from torch import nn

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
    data = config.data.build(seed=config.data_seed)
    bundle = config.model.build(num_classes=len(data.class_names), input_spec=data.input_spec, seed=config.seed)
    if (adapter / "adapter_config.json").is_file():
        return _merge_peft(bundle.module, adapter)
    from snell_scale.tuners.methods.trained_file import load_trained

    load_trained(bundle.module, adapter)
    return bundle.module


def _merge_peft(module: nn.Module, adapter: Path) -> nn.Module:
    from peft import PeftModel

    import snell_scale.tuners  # noqa: F401

    model = PeftModel.from_pretrained(module, str(adapter))
    return model.merge_and_unload(safe_merge=True)
