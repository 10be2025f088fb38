"""One real training step of a large model, alone in its process so that its peak memory is its own; prints JSON.

python tests/models/large_model_step.py vit|clip|sdxl
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn

from snell_scale.interfaces import InputSpec, ModelBundle
from snell_scale.registry import config_class
from snell_scale.tuners.methods.peft_methods import SnellMethodConfig

RANK, SPARSITY = 8, 0.9
NUM_TEXT_TOKENS = 77
SDXL_LATENTS = 64


class Case(NamedTuple):
    """A model's config, its input where the config does not say, and a loss of one sample."""

    config: dict[str, Any]
    input_spec: InputSpec | None
    loss: Callable[[nn.Module, ModelBundle], Tensor]


def vit_loss(module: nn.Module, bundle: ModelBundle) -> Tensor:
    side = bundle.input_spec.height
    return F.cross_entropy(module(torch.randn(1, 3, side, side)).float(), torch.zeros(1, dtype=torch.long))


def clip_loss(module: nn.Module, bundle: ModelBundle) -> Tensor:
    """One pair has nothing to be told apart from: the loss is minus its similarity."""
    side = bundle.input_spec.height
    text = torch.randint(1, 40_000, (1, NUM_TEXT_TOKENS))
    image_features, text_features, scale = module(torch.randn(1, 3, side, side), text)
    return -(image_features.float() * text_features.float()).sum() * scale.float()


def sdxl_loss(module: nn.Module, bundle: ModelBundle) -> Tensor:
    assert bundle.diffusion is not None
    latents = torch.randn(1, *bundle.diffusion.latent_shape)
    condition = {
        "encoder_hidden_states": torch.randn(1, NUM_TEXT_TOKENS, 2048),
        "pooled_projections": torch.randn(1, 1280),
    }
    predicted = bundle.diffusion.denoise(module, latents, torch.tensor([500]), condition)
    return F.mse_loss(predicted.float(), torch.randn_like(latents))


def _images(side: int) -> InputSpec:
    return InputSpec(3, side, side, (0.5,) * 3, (0.5,) * 3)


CASES: dict[str, Case] = {
    "vit": Case({"name": "timm", "architecture": "vit_huge_patch14_224"}, _images(224), vit_loss),
    "clip": Case({"name": "open_clip", "architecture": "ViT-H-14"}, None, clip_loss),
    "sdxl": Case({"name": "diffusers", "shape": "sdxl"}, _images(8 * SDXL_LATENTS), sdxl_loss),
}


def build(case: Case) -> ModelBundle:
    """The model in bf16, small random weights, norms at 1: an initialisation of billions takes a minute."""
    config = config_class("model", case.config["name"]).model_validate(case.config)
    input_spec = case.input_spec or config.preprocessing().image
    with init_empty_weights(include_buffers=False):
        bundle = config.build(num_classes=10, input_spec=input_spec, seed=0)
    noise = (0.02 * torch.randn(1_000_003)).bfloat16()
    for child in bundle.module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                filled = _filled(parameter, name, noise)
                child._parameters[name] = nn.Parameter(filled, requires_grad=parameter.requires_grad)
    return bundle


def _filled(parameter: Tensor, name: str, noise: Tensor) -> Tensor:
    value = torch.empty(parameter.shape, dtype=torch.bfloat16)
    if parameter.dim() < 2:
        return value.fill_(1.0 if name.endswith("weight") or name == "logit_scale" else 0.0)
    flat = value.view(-1)
    for start in range(0, len(flat), len(noise)):
        part = flat[start : start + len(noise)]
        part.copy_(noise[: len(part)])
    return value


def fingerprints(module: nn.Module, *, trained: bool) -> dict[str, int]:
    """A number for each parameter that changes with its bits; a copy of the weights would cost as much again."""
    views = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
    return {
        name: int(p.detach().contiguous().view(views[p.dtype]).sum(dtype=torch.int64))
        for name, p in module.named_parameters()
        if p.requires_grad is trained
    }


def measure(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    started = time.perf_counter()
    bundle = build(case)
    num_parameters = sum(p.numel() for p in bundle.module.parameters())
    tuner = SnellMethodConfig(r=RANK, sparsity=SPARSITY).apply(bundle, total_steps=1, steps_per_epoch=1, seed=0)
    module = tuner.module
    frozen, trained = fingerprints(module, trained=False), fingerprints(module, trained=True)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    built = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss(module, bundle)
    loss.backward()
    factors = {name: p.grad for name, p in module.named_parameters() if ".snell_" in name}
    silent = [name for name, grad in factors.items() if grad is None or not float(grad.abs().sum()) > 0]
    finite = all(bool(grad.isfinite().all()) for grad in factors.values() if grad is not None)
    optimizer.step()
    stepped = time.perf_counter()
    after = fingerprints(module, trained=True)
    return {
        "parameters": num_parameters,
        "trainable": tuner.num_trainable(),
        "factors": len(factors),
        "loss": loss.item(),
        "without_gradient": silent,
        "gradients_are_finite": finite,
        "frozen_dtypes": sorted({str(p.dtype) for p in module.parameters() if not p.requires_grad}),
        "factor_dtypes": sorted({str(p.dtype) for n, p in module.named_parameters() if ".snell_" in n}),
        "frozen_unchanged": fingerprints(module, trained=False) == frozen,
        "trained_unchanged": [name for name in after if after[name] == trained[name] and ".snell_" in name],
        "build_s": round(built - started, 1),
        "step_s": round(stepped - built, 1),
        "cpu_s": round(time.process_time(), 1),
        "peak_gib": peak_gib(),
    }


def peak_gib() -> float:
    """Of this program alone: getrusage's maximum counts what the process had before it became this program."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


if __name__ == "__main__":
    print(json.dumps(measure(CASES[sys.argv[1]])))
