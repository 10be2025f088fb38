"""A layer's threshold memory: no state of the model, and in nobody's way."""

import copy

import torch
import torch.utils.checkpoint
from peft import PeftModel, get_peft_model
from torch import nn

from snell_scale.tuners import SnellConfig
from snell_scale.tuners.snell.layer import FixedTypeBuffers, SnellLayer


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def _model(sparsity: float | None = 0.5) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(_Block(), SnellConfig(r=4, sparsity=sparsity, target_modules=["fc"]))


def _memories(model: nn.Module) -> FixedTypeBuffers:
    layer = model.get_submodule("base_model.model.fc")
    assert isinstance(layer, SnellLayer)
    return layer.snell_threshold_memory


def _memory(model: nn.Module) -> torch.Tensor:
    return _memories(model)["default"]


def test_it_is_not_saved_and_keeps_its_dtype() -> None:
    model = _model()
    assert not any("threshold" in name for name in model.state_dict())
    for cast in (model.double, model.half, model.bfloat16):
        assert _memory(cast()).dtype == torch.float32
    assert _memory(model.to("meta")).device.type == "meta"


def test_a_dense_layer_has_none() -> None:
    model = _model(None)
    assert not len(_memories(model))
    model(torch.ones(2, 12)).sum().backward()


def test_inference_mode_before_training() -> None:
    model = _model()
    x = torch.randn(3, 12)
    with torch.inference_mode():
        expected = model(x)
    y = model(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert _memory(model).isfinite().all()


def test_a_copy_has_its_own() -> None:
    model = _model()
    model(torch.ones(2, 12))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "snell" in name:
                parameter.mul_(3)
    before = _memory(model).clone()
    other(torch.ones(2, 12))
    assert torch.equal(_memory(model), before)
    assert not torch.equal(_memory(other), before)


def test_deleting_the_adapter_deletes_it() -> None:
    model = _model()
    model.add_adapter("other", SnellConfig(r=4, sparsity=0.5, target_modules=["fc"]))
    model.delete_adapter("other")
    assert set(_memories(model).keys()) == {"default"}


def test_a_fresh_model_compiles_in_one_piece_under_checkpointing() -> None:
    model, other = _model(), _model()
    x = torch.randn(3, 12)

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), other(x), rtol=0, atol=0)
    compiled(x).sum().backward()
