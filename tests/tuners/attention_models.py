"""A model around one nn.MultiheadAttention, its adapters and its inputs: what the attention tests share."""

from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from snell_scale.tuners import SnellaConfig, SnellConfig
from snell_scale.tuners.snell import SnellMultiheadAttention

WIDTH, HEADS, SAMPLES, LENGTH, KEYS = 16, 4, 3, 5, 7
# float64: sums of some dozen products in another order.
CLOSE: Any = {"rtol": 1e-11, "atol": 1e-11}


class Model(nn.Module):
    """A model around one attention."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, **settings)

    def forward(self, *inputs: Tensor, **settings: Any) -> Any:
        return self.attn(*inputs, **settings)


def build(*, dtype: torch.dtype = torch.float64, **settings: Any) -> Model:
    torch.manual_seed(0)
    model = Model(**{"batch_first": True} | settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.to(dtype).eval()


def adapted(model: nn.Module, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    settings = {"r": 4, "sparsity": 0.5, "init_weights": False, "target_modules": ["attn"]} | settings
    kind = SnellaConfig if "init_sparsity" in settings else SnellConfig
    if kind is SnellaConfig:
        settings.pop("sparsity")
    found = get_peft_model(cast(Any, model), kind(**settings)).eval()
    assert isinstance(found, PeftModel)
    return found


def layer_of(model: nn.Module) -> SnellMultiheadAttention:
    return next(m for m in model.modules() if isinstance(m, SnellMultiheadAttention))


def tokens(length: int, seed: int, *, batch_first: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(SAMPLES, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x if batch_first else x.transpose(0, 1)).to(dtype)
