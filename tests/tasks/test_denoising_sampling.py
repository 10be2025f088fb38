"""Samplers: with a denoiser that knows the answer they arrive at it; guidance, fixed seeds, pictures."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_scale.interfaces import Diffusion
from snell_scale.tasks.diffusion_losses import alphas_cumprod, is_flow
from snell_scale.tasks.sampling import SamplingConfig, grid, sample, starting_noise, to_bytes
from tests.tasks.diffusion_parts import PlainEncoders

SHAPE = (1, 4, 4)
DISCRETE: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}
FLOW: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def truth() -> Tensor:
    return torch.linspace(-0.9, 0.9, 3 * 16).view(3, *SHAPE)


def oracle(config: Mapping[str, Any], answer: Tensor) -> Diffusion:
    """A "model" that knows which latents it is to find, and predicts what its scheduler asks for."""

    def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        target = answer.repeat(len(noisy) // len(answer), 1, 1, 1).double()
        if is_flow(config):
            sigma = (timesteps.double() / 1000).view(-1, 1, 1, 1)
            return ((noisy - target) / sigma).float()  # noise − latents
        alpha = alphas_cumprod(config)[timesteps.long()].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * target) / (1 - alpha).sqrt()
        answers = {
            "epsilon": noise,
            "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * target,
            "sample": target,
        }
        return answers[config.get("prediction_type", "epsilon")].float()

    return Diffusion(config, PlainEncoders(), SHAPE, denoise)


def run(diffusion: Diffusion, settings: SamplingConfig, *, noise: Tensor | None = None) -> Tensor:
    condition = {"words": torch.zeros(3, 2)}
    start = starting_noise(range(3), SHAPE, seed=0) if noise is None else noise
    return sample(
        nn.Identity(),
        diffusion,
        noise=start,
        condition=condition,
        unconditional=condition,
        settings=settings,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_discrete_samplers_find_what_an_oracle_knows(prediction: str, sampler: Any, guidance: float) -> None:
    diffusion = oracle(DISCRETE | {"prediction_type": prediction}, truth())
    found = run(diffusion, SamplingConfig(sampler=sampler, steps=10, guidance_scale=guidance))
    # float32 through ten steps; at the first, ᾱ is 2e-9 and the noise-predicting sampler divides by its root.
    tolerance = 2e-2 if prediction == "epsilon" else 1e-4
    torch.testing.assert_close(found, truth(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dynamic", [False, True])
def test_euler_steps_along_the_flow_find_what_an_oracle_knows(dynamic: bool) -> None:
    diffusion = oracle(FLOW | {"use_dynamic_shifting": dynamic}, truth())
    found = run(diffusion, SamplingConfig(steps=6))
    torch.testing.assert_close(found, truth(), rtol=0, atol=1e-5)  # straight lines: float32 rounding only


def test_guidance_moves_away_from_the_empty_prompt() -> None:
    seen: list[Tensor] = []

    def denoise(model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        seen.append(condition["words"])
        return condition["words"].view(-1, 1, 1, 1).expand_as(noisy)  # predicts the latents themselves

    config = DISCRETE | {"prediction_type": "sample"}
    found = sample(
        nn.Identity(),
        Diffusion(config, PlainEncoders(), SHAPE, denoise),
        noise=starting_noise(range(3), SHAPE, seed=0),
        condition={"words": torch.tensor([[0.3], [0.4], [0.5]])},
        unconditional={"words": torch.full((3, 1), 0.1)},
        settings=SamplingConfig(steps=5, guidance_scale=2.0),
    )
    assert seen[0].flatten().tolist() == pytest.approx([0.1, 0.1, 0.1, 0.3, 0.4, 0.5])
    expected = torch.tensor([0.5, 0.7, 0.9]).view(3, 1, 1, 1).expand(3, *SHAPE)  # 0.1 + 2·(given − 0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_sample_depends_on_its_number_alone() -> None:
    whole = starting_noise(range(8), SHAPE, seed=4)
    assert torch.equal(whole[5:7], starting_noise(range(5, 7), SHAPE, seed=4))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, starting_noise(range(8), SHAPE, seed=5))
    assert abs(float(starting_noise(range(4000), SHAPE, seed=0).std()) - 1) < 0.01  # 64,000 numbers: ±0.003


@pytest.mark.parametrize(("config", "sampler"), [(FLOW, "ddim"), (DISCRETE, "flow_euler")])
def test_a_sampler_of_the_other_family_is_refused(config: dict[str, Any], sampler: Any) -> None:
    with pytest.raises(ValueError, match="sampler"):
        SamplingConfig(sampler=sampler).check(config)


def test_images_become_the_bytes_of_a_file() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, -0.999]).view(1, 1, 2, 3)
    made = to_bytes(images)
    assert made.shape == (1, 3, 2, 3)
    assert made[0, 2].flatten().tolist() == [0, 0, 128, 255, 255, 0]
    colours = torch.stack([torch.full((2, 2), value) for value in (-1.0, 0.2, 1.0)]).unsqueeze(0)
    assert to_bytes(colours)[0, :, 0, 0].tolist() == [0, 153, 255]


def test_a_picture_shows_small_images_large_and_in_order() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 16, 16) * 40
    picture = grid(images, columns=3)
    assert picture.shape == (2 * 68 + 4, 3 * 68 + 4, 3)
    centres = [int(picture[36 + 68 * row, 36 + 68 * column, 0]) for row in range(2) for column in range(3)]
    assert centres == [0, 40, 80, 120, 160, 200]
