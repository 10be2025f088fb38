"""A pipeline folder of every kind: prompts, images and the denoiser's calls are as the pipeline makes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import KINDS, edit, make_pipeline
from torch import Tensor, nn

from snell_scale.interfaces import Diffusion, InputSpec, ModelBundle
from snell_scale.models.diffusers.config import DiffusersConfig
from snell_scale.models.diffusers.pipeline_encoders import PipelineEncoders

SIDE, WIDTH = 16, 24  # pixels, twice as many as the tiny VAE makes latents of them
PROMPT = "a photo of a red cat"
HALF = (0.5, 0.5, 0.5)


class Made(NamedTuple):
    pipeline: Any
    folder: Path
    bundle: ModelBundle
    diffusion: Diffusion


def build(folder: Path, **settings: Any) -> ModelBundle:
    config = DiffusersConfig.model_validate({"folder": str(folder), **settings})
    return config.build(num_classes=0, input_spec=InputSpec(3, SIDE, WIDTH, HALF, HALF), seed=0)


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    pipeline: DiffusionPipeline = make_pipeline(request.param, folder)
    bundle = build(folder / "pipeline")
    assert bundle.diffusion is not None
    return Made(pipeline, folder / "pipeline", bundle, bundle.diffusion)


def denoiser_of(pipeline: Any) -> nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def recorded_call(made: Made, *, output_type: str) -> tuple[dict[str, Any], Tensor]:
    """(what the pipeline gave its denoiser in the last of two steps and what came back, its result)."""
    calls: list[dict[str, Any]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kwargs = dict(kwargs)
        noisy = args[0] if args else kwargs.get("hidden_states")
        time = args[1] if len(args) > 1 else kwargs["timestep"]
        calls.append({"noisy": noisy, "time": time, "output": output[0]})

    extra = {"use_resolution_binning": False} if "PixArt" in type(made.pipeline).__name__ else {}
    hook = denoiser_of(made.pipeline).register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        result = made.pipeline(
            PROMPT,
            height=SIDE,
            width=WIDTH,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
            **extra,
        )
    hook.remove()
    return calls[-1], result.images


def test_the_denoiser_is_called_as_the_pipeline_calls_it(made: Made) -> None:
    call, _ = recorded_call(made, output_type="latent")
    noisy, expected = call["noisy"], call["output"]
    time = torch.as_tensor(call["time"]).reshape(-1).expand(len(noisy))
    if noisy.dim() == 3:  # FLUX takes its latents packed, and its time from 0 to 1
        unpack = type(made.pipeline)._unpack_latents
        noisy, expected = (unpack(packed, SIDE, WIDTH, 2) for packed in (noisy, expected))
        time = time * 1000
    with torch.no_grad():
        condition = made.diffusion.encoders.encode_prompts([PROMPT])
        predicted = made.diffusion.denoise(made.bundle.module.eval(), noisy, time, condition)
    expected = expected[:, : noisy.shape[1]]  # PixArt's second half is the variance
    assert predicted.shape == (1, *made.diffusion.latent_shape)
    # The same operations on the same numbers; time·1000/1000 may round once in FLUX.
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-6)


def test_latents_become_the_pipelines_pictures_and_come_from_their_encoder(made: Made) -> None:
    _, latents = recorded_call(made, output_type="latent")
    _, pictures = recorded_call(made, output_type="pt")
    if latents.dim() == 3:
        latents = type(made.pipeline)._unpack_latents(latents, SIDE, WIDTH, 2)
    decoded = made.diffusion.encoders.decode(latents)
    torch.testing.assert_close(decoded / 2 + 0.5, pictures, rtol=1e-5, atol=1e-6)
    images = torch.rand(2, 3, SIDE, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given = made.diffusion.encoders.encode_images(images)
    with torch.no_grad():
        raw = made.pipeline.vae.encode(images).latent_dist
    config = made.pipeline.vae.config
    torch.testing.assert_close(given["mean"] / config.scaling_factor + (config.shift_factor or 0), raw.mean)
    torch.testing.assert_close(given["std"], raw.std * config.scaling_factor)


def test_an_empty_prompt_is_a_condition_too_and_stacks_with_others(made: Made) -> None:
    condition = made.diffusion.encoders.encode_prompts([PROMPT, "", "a dog"])
    alone = made.diffusion.encoders.encode_prompts([""])
    for name, tensor in condition.items():
        assert len(tensor) == 3, name
        torch.testing.assert_close(tensor[1:2], alone[name], rtol=1e-5, atol=1e-5)  # another batch size
    text = condition["encoder_hidden_states"]
    assert not torch.allclose(text[0], text[1])
    assert not torch.allclose(text[0], text[2])


def test_sdxls_empty_prompt_is_zeros_as_its_pipeline_guides_with(tmp_path: Path) -> None:
    make_pipeline("sdxl", tmp_path)
    diffusion = build(tmp_path / "pipeline").diffusion
    assert diffusion is not None
    condition = diffusion.encoders.encode_prompts(["a cat", ""])
    assert all(tensor[0].any() and not tensor[1].any() for tensor in condition.values())
    edit(tmp_path / "pipeline/model_index.json", force_zeros_for_empty_prompt=False)
    diffusion = build(tmp_path / "pipeline").diffusion
    assert diffusion is not None
    assert all(tensor.any() for tensor in diffusion.encoders.encode_prompts([""]).values())


def test_the_prompt_and_the_time_reach_the_prediction(made: Made) -> None:
    denoise, encoders = made.diffusion.denoise, made.diffusion.encoders
    noisy = torch.randn(1, *made.diffusion.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cat, dog = (encoders.encode_prompts([prompt]) for prompt in ("a cat", "a dog"))
        first = denoise(made.bundle.module, noisy, torch.tensor([10]), cat)
        assert not torch.equal(first, denoise(made.bundle.module, noisy, torch.tensor([10]), dog))
        assert not torch.equal(first, denoise(made.bundle.module, noisy, torch.tensor([900]), cat))


def test_weights_and_schedule_are_those_of_the_folder(made: Made) -> None:
    expected = denoiser_of(made.pipeline).state_dict()
    loaded = made.bundle.module.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert all(p.requires_grad for p in made.bundle.module.parameters())
    assert made.diffusion.scheduler["_class_name"] == type(made.pipeline.scheduler).__name__
    assert made.diffusion.scheduler["num_train_timesteps"] == 1000


def test_encoders_are_loaded_when_called_and_freed_when_released(made: Made) -> None:
    encoders = made.diffusion.encoders
    assert isinstance(encoders, PipelineEncoders)
    encoders.release()
    assert (encoders._loaded_text, encoders._loaded_vae) == (None, None)
    encoders.encode_prompts([""])
    assert encoders._loaded_vae is None
    assert getattr(encoders._loaded_text, "vae", None) is None
    encoders.to("cpu")
    encoders.release()
    assert encoders._loaded_text is None


def test_half_precision_is_close_and_comes_back_in_float32(made: Made) -> None:
    bundle = build(made.folder, encoder_dtype="bfloat16")
    assert bundle.diffusion is not None
    half, full = bundle.diffusion.encoders, made.diffusion.encoders
    images = torch.rand(1, 3, SIDE, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = half.encode_images(images)["mean"]
    assert latents.dtype == torch.float32
    # bf16 has 8 bits: a percent of values of size 1 through a few layers.
    torch.testing.assert_close(latents, full.encode_images(images)["mean"], rtol=0.1, atol=0.1)
    text = half.encode_prompts([PROMPT])["encoder_hidden_states"]
    assert text.dtype == torch.bfloat16
    torch.testing.assert_close(
        text.float(), full.encode_prompts([PROMPT])["encoder_hidden_states"], rtol=0.1, atol=0.1
    )
    assert half.fingerprint != full.fingerprint


def test_the_size_is_the_models_own_unless_the_data_say_otherwise(made: Made) -> None:
    image = DiffusersConfig(folder=str(made.folder)).preprocessing().image
    assert image is not None
    latents = denoiser_of(made.pipeline).config.get("sample_size") or 512  # pyright: ignore
    assert (image.channels, image.height, image.width) == (3, 2 * latents, 2 * latents)
    assert (image.mean, image.std) == (HALF, HALF)
    config = DiffusersConfig(folder=str(made.folder))
    wide = replace(image, height=SIDE, width=2 * SIDE)
    other = config.build(num_classes=0, input_spec=wide, seed=0).diffusion
    assert other is not None
    assert other.latent_shape == (4, SIDE // 2, SIDE)
