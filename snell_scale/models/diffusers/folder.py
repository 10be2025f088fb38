"""A diffusers pipeline folder: what its JSON files say, and its denoiser's weights; from disk or from the hub."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from snell_scale.models.diffusers.pipeline_encoders import known_pipelines, refuse_problems
from snell_scale.models.diffusers.shapes import CLASSES, Architecture, Denoiser

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DENOISERS = ("unet", "transformer")
# The published PixArt is from before its class had a name of its own.
_PIXART_BEFORE = ("Transformer2DModel", "ada_norm_single")


@dataclass(frozen=True)
class PipelineFolder:
    """What is known of a pipeline before a weight is read; weights: the folder of its UNet or transformer."""

    denoiser: Denoiser
    weights: Path


def read_folder(source: str) -> PipelineFolder:
    """The pipeline in a local folder, or of a hub id ("owner/name"), whose small files are fetched.

    ValueError where files are missing or name classes that are not supported.
    """
    path = _local(source, weights=False)
    index = _read_json(path / "model_index.json")
    if index.get("_class_name") not in known_pipelines():
        raise ValueError(
            f"model.folder: {path / 'model_index.json'} is of a {index.get('_class_name')}, expected one of "
            f"{', '.join(known_pipelines())}"
        )
    _check_encoders(path, index)
    weights = next((path / name for name in _DENOISERS if name in index), path / _DENOISERS[0])
    arguments = _read_json(weights / "config.json")
    class_name = arguments.get("_class_name")
    if (class_name, arguments.get("norm_type")) == _PIXART_BEFORE:
        class_name = CLASSES["pixart"]
    found: list[Architecture] = [key for key, name in CLASSES.items() if name == class_name]
    if not found:
        raise ValueError(
            f"model.folder: {weights / 'config.json'} is of a {class_name}, expected one of "
            f"{', '.join(CLASSES.values())}"
        )
    levels = len(_read_json(path / "vae" / "config.json").get("block_out_channels", ()))
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json")
    denoiser = Denoiser(found[0], arguments, scheduler, vae_factor=2 ** max(levels - 1, 0))
    return PipelineFolder(denoiser, weights)


def fetch_weights(source: str) -> Path:
    """The local folder with all that the pipeline needs; of a hub id, downloaded unless it is in the cache."""
    return _local(source, weights=True)


def load_denoiser(source: str) -> nn.Module:
    """The UNet or transformer with its weights, float32, on the CPU. ValueError where these do not fit it."""
    import diffusers

    fetch_weights(source)
    folder = read_folder(source)
    cls = getattr(diffusers, CLASSES[folder.denoiser.architecture])
    try:
        module, problems = cls.from_pretrained(folder.weights, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.folder: the weights in {folder.weights} cannot be read: {error}") from error
    refuse_problems(folder.weights, problems)
    return module.train()


def _check_encoders(path: Path, index: Mapping[str, Any]) -> None:
    """A folder may bring classes of its own as Python files, which older releases of diffusers run unasked."""
    for name, entry in index.items():
        is_read = name.startswith(("text_encoder", "tokenizer"))
        library = entry[0] if isinstance(entry, list) and len(entry) == 2 else entry
        if is_read and library not in ("transformers", None):
            raise ValueError(
                f"model.folder: {path / 'model_index.json'} takes its {name} from {library!r}, expected "
                "transformers: code in a pipeline's folder is not run; choose a pipeline without its own classes"
            )


def _local(source: str, *, weights: bool) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise ValueError(
            f"model.folder: there is no folder {path} (looked for from {Path.cwd()}); give the folder of a "
            "diffusers pipeline (with model_index.json), or a hub id, owner/name"
        )
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if weights:
            return Path(DiffusionPipeline.download(source, use_safetensors=True))
        return Path(snapshot_download(source, allow_patterns=["*.json"]))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"model.folder: {source} is no folder here (looked for from {Path.cwd()}) and could not be fetched "
            f"from the hub: {error}; connect to the internet, or give a local folder"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"model.folder: {path} is missing; is this the folder of a diffusers pipeline?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model.folder: {path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"model.folder: {path} holds a {type(content).__name__}, expected an object")
    return content
