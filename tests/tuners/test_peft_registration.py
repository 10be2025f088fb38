"""peft knows both methods after one import that brings in nothing optional; a fresh process loads an adapter."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from snell_models import METHODS, VIT_TARGETS, build, config, images, train

from snell_scale.tuners import SnellaConfig, SnellaModel, SnellConfig, SnellModel, peft_registration

ROOT = Path(__file__).parents[2]
CONFIGS: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
TUNERS: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
PREFIXES: dict[Any, Any] = PEFT_TYPE_TO_PREFIX_MAPPING


def run_python(code: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_both_are_registered_once_and_again() -> None:
    for _ in range(2):
        peft_registration.register()
        assert {"SNELL": SnellConfig, "SNELLA": SnellaConfig}.items() <= CONFIGS.items()
        assert {"SNELL": SnellModel, "SNELLA": SnellaModel}.items() <= TUNERS.items()
        assert {"SNELL": "snell_", "SNELLA": "snell_"}.items() <= PREFIXES.items()


def test_a_name_taken_by_another_package_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "SNELL", LoraConfig)
    with pytest.raises(ValueError, match="already has a method called SNELL, peft.tuners.lora"):
        peft_registration.register()


def test_import_brings_in_nothing_optional() -> None:
    # What peft itself brings in (some versions of transformers import pandas where it is there) is not ours.
    code = """
import sys, snell_scale, peft
before = set(sys.modules)
import snell_scale.tuners
optional = ("deepspeed", "diffusers", "open_clip", "pandas", "matplotlib")
print([name for name in optional if name in sys.modules.keys() - before])
"""
    assert run_python(code).strip() == "[]"


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_process_with_peft_and_timm_computes_equal_logits(method: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = get_peft_model(build("vit"), config(method, "vit"))
    assert isinstance(model, PeftModel)
    train(model.train(), competes=method == "snella")
    expected = model.eval()(images())
    model.save_pretrained(str(tmp_path))
    torch.save(images(), tmp_path / "images.pt")
    script = """
import sys, snell_scale.tuners, peft, timm, torch
torch.manual_seed(0)
vit = timm.models.VisionTransformer(
    img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, num_classes=5, in_chans=1
)
model = peft.PeftModel.from_pretrained(vit, sys.argv[1]).eval()
print(*model(torch.load(sys.argv[1] + "/images.pt")).flatten().tolist())
"""
    printed = [float(word) for word in run_python(script, str(tmp_path)).split()]
    assert printed == expected.flatten().tolist()
    assert VIT_TARGETS in (tmp_path / "adapter_config.json").read_text().replace("\\\\", "\\")
