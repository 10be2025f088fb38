"""How images and captions become what a CLIP of open_clip reads: its own preprocess config and tokenizer."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snell_scale.interfaces import InputSpec
from snell_scale.models.open_clip.settings import check_activation, image_size, import_open_clip

_CONFIG_FILE = "open_clip_config.json"
_NORMALISATION = ("mean", "std", "interpolation")


def image_spec(
    architecture: str, settings: Mapping[str, Any], *, tag: str | None, weights_file: Path | None
) -> InputSpec:
    """Size by the model's config; mean, std and interpolation by where the weights come from.

    In this order: the tag's own, `open_clip_config.json` beside the file (as on the hub), what all published
    weights of the architecture share, OpenAI's. ValueError where published weights differ, in this or in their
    activation (GELU or QuickGELU), and nothing says which these are, or where the file beside says that it is
    another activation than the settings'.
    """
    height, width = image_size(settings["vision_cfg"])
    quick_gelu = bool(settings.get("quick_gelu"))
    found = _preprocess_cfg(architecture, tag, weights_file, quick_gelu=quick_gelu)
    return InputSpec(
        channels=3,
        height=height,
        width=width,
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
    )


def _preprocess_cfg(
    architecture: str, tag: str | None, weights_file: Path | None, *, quick_gelu: bool
) -> dict[str, Any]:
    open_clip = import_open_clip()
    defaults = asdict(open_clip.transform.PreprocessCfg())
    if tag is not None:
        return defaults | _stated(open_clip.get_pretrained_cfg(architecture, tag))
    if weights_file is None:
        return defaults
    beside = weights_file.parent / _CONFIG_FILE
    if beside.is_file():
        content = _read(beside)
        if content["model_cfg"]:
            wanted = bool(content["model_cfg"].get("quick_gelu"))
            check_activation(architecture, str(weights_file), wanted=wanted, quick_gelu=quick_gelu)
        return defaults | _stated(content["preprocess_cfg"])
    published = _published_kinds(architecture, defaults)
    if not published:
        return defaults
    if len(published) > 1:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise ValueError(
            f"model.weights: published weights of {architecture} differ in how images are normalised or in their "
            f"activation, and nothing says which {weights_file} are: set model.tag to one of "
            f"{', '.join(tags)}, or put their {_CONFIG_FILE} beside the file"
        )
    weights = (
        f"{weights_file} (as all that is published of {architecture}, unless an {_CONFIG_FILE} beside it differs)"
    )
    check_activation(architecture, weights, wanted=published[0]["quick_gelu"], quick_gelu=quick_gelu)
    return published[0]


def _published_kinds(architecture: str, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The preprocess configs, each with its "quick_gelu", that the architecture's published weights have."""
    open_clip = import_open_clip()
    kinds: list[dict[str, Any]] = []
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        cfg = open_clip.get_pretrained_cfg(architecture, tag)
        kind = {**defaults, **_stated(cfg), "quick_gelu": bool(cfg.get("quick_gelu"))}
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def _stated(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {key: cfg[key] for key in _NORMALISATION if cfg.get(key) is not None}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: dict(content.get(key) or {}) for key in ("model_cfg", "preprocess_cfg")}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no JSON config of open_clip: {error}; correct it or remove it") from error


@dataclass(frozen=True)
class Tokenizer:
    """N captions → (N, context length) int64, cut at that length. Pickles: a worker process makes its own."""

    architecture: str | None
    text_cfg: str
    """As JSON; read where the architecture has no name that open_clip knows."""

    @classmethod
    def of(cls, architecture: str | None, text_cfg: Mapping[str, Any]) -> "Tokenizer":
        """architecture: None for one that open_clip has no name for."""
        return cls(architecture, json.dumps(text_cfg, sort_keys=True))

    def check(self) -> None:
        """ValueError where the tokenizer is not on this machine, or gives tokens that the text tower has not."""
        known = json.loads(self.text_cfg).get("vocab_size", 49408)
        highest = int(self(["a"]).max())
        if highest >= known:
            raise ValueError(
                f"model.arguments.text_cfg.vocab_size is {known}, but the tokenizer gives tokens up to "
                f"{highest}: set it to at least {highest + 1}"
            )

    def __call__(self, captions: Sequence[str]) -> Tensor:
        return _made(self)(list(captions)).to(torch.int64)


@lru_cache(maxsize=4)
def _made(tokenizer: Tokenizer) -> Callable[[list[str]], Tensor]:
    open_clip = import_open_clip()
    text_cfg = json.loads(tokenizer.text_cfg)
    hub_name = text_cfg.get("hf_tokenizer_name")
    try:
        if tokenizer.architecture is not None:
            return open_clip.get_tokenizer(tokenizer.architecture)
        options = text_cfg.get("tokenizer_kwargs") or {}
        options["context_length"] = text_cfg.get("context_length", 77)
        if hub_name:
            mode = text_cfg.get("tokenizer_mode")
            return open_clip.tokenizer.HFTokenizer(hub_name, tokenizer_mode=mode, **options)
        return open_clip.SimpleTokenizer(**options)
    except (OSError, ImportError, ValueError) as error:
        where = f"{hub_name} from the hub" if hub_name else "a package that is not installed"
        raise ValueError(
            f"the tokenizer of {tokenizer.architecture or 'model.arguments'} needs {where}: {error}; fetch it "
            "once with a connection to the internet (it stays in the cache), or choose an architecture with "
            "open_clip's own tokenizer, e.g. ViT-L-14"
        ) from error
