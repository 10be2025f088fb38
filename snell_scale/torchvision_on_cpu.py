"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

torchvision registers fake implementations for operators that only its compiled library defines; without the
library the import ends in "operator torchvision::nms does not exist". Defining the two schemas first is
enough for transforms and models. `torchvision.ops.nms` itself stays unavailable.
"""

import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_libraries: list[Any] = []  # the schemas live as long as their Library object


class _DefineBeforeTorchvision(MetaPathFinder):
    """Finds nothing; sees that torchvision is about to be imported and defines the schemas once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            define_missing_operators()
        return None


def install() -> None:
    """Arrange for the schemas to be there by the time torchvision is imported; imports nothing now."""
    already = any(isinstance(finder, _DefineBeforeTorchvision) for finder in sys.meta_path)
    if "torchvision" not in sys.modules and not already:
        sys.meta_path.insert(0, _DefineBeforeTorchvision())


def define_missing_operators() -> None:
    """Define torchvision's nms schemas where a CPU torch meets a CUDA torchvision; elsewhere do nothing."""
    import torch

    if torch.version.cuda is not None or _libraries or not _torchvision_is_cuda_build():
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def _torchvision_is_cuda_build() -> bool:
    """Read from torchvision's version file, for importing torchvision is what fails.

    A CPU build defines the schemas itself, and defining them twice is an error.
    """
    spec = PathFinder.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        version_file = Path(folder) / "version.py"
        if version_file.is_file():
            return re.search(r"__version__ = .*\+cu\d", version_file.read_text()) is not None
    return False
