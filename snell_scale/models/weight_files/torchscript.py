"""The tensors of a TorchScript archive (OpenAI's CLIP weights are such), read without running what it holds.

`torch.jit.load` compiles and can run the archive's code, and `torch.load(weights_only=True)` refuses archives.
The modules' attributes are a pickle of module objects and tensors: here every module becomes an empty object, and
any other class or function that the pickle names is refused. Layout: pytorch/pytorch :
torch/csrc/jit/docs/serialization.md.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}

# What reading a pickle and its storages raises on bytes that are not those of an archive.
_UNREADABLE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    LookupError,
    StopIteration,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
)


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive of `torch.jit.save`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Dotted name → tensor, of the tensor attributes of all modules. ValueError where it names anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix(
                "data.pkl"
            )
            with archive.open(f"{root}data.pkl") as file:
                module = _Reader(file, archive, root).load()
    except _UNREADABLE as error:
        raise ValueError(
            f"model.weights: {path} is no TorchScript archive of tensors, or is damaged: {error}"
        ) from error
    if not isinstance(module, _Module):
        raise ValueError(f"model.weights: {path} is a TorchScript archive of no module: give the weights alone")
    return _tensors(module, "")


class _Module:
    """Stands where the archive's own class would."""


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name.startswith("__torch__"):
            return _Module
        if module_name == "torch" and global_name in _DTYPES:
            return _DTYPES[global_name]
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is neither module nor tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, as a tensor of one dimension; pid: ("storage", dtype, its file, device, its length)."""
        _, dtype, name, _, _ = pid
        content = bytearray(self._archive.read(f"{self._root}data/{name}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _tensors(module: object, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Module):
            found |= _tensors(value, f"{prefix}{name}.")
    return found
