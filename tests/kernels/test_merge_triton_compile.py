"""Every Triton kernel compiled to machine code for sm_90, which needs no GPU: what interpreting cannot show.

The interpreter takes programs that the compiler refuses, and knows no registers. The launchers run on CPU tensors
while a stand-in for the launch compiles the kernel with the very arguments it was given. In a process of its own,
for Triton decides at import whether to interpret.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from snell_scale.kernels.merge import triton_impl
from snell_scale.kernels.merge.delta import KERNEL_PARAMETERS, Delta, FactorGradients

KERNELS = {
    "_column_logs_kernel", "_merge_fwd_kernel", "_column_sums_kernel", "_factors_bwd_kernel", "_sample_kernel",
    "_collect_kernel", "_select_kernel", "_histogram_kernel", "_find_upper_kernel", "_finish_kernel",
}  # fmt: skip
# They read counts and keys.
WITHOUT_K = {"_select_kernel", "_find_upper_kernel", "_finish_kernel"}


def test_every_kernel_compiles_and_spills_nothing(tmp_path: Path) -> None:
    """At rank 32, bfloat16 weights: mixk, a distance and a product kernel; and one entry, for 1 is a constant."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_merge_triton_compile"],
        cwd=Path(__file__).parents[2], env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    compiled = [json.loads(line) for line in process.stdout.splitlines()]
    assert {each["name"] for each in compiled} == KERNELS
    assert not [each for each in compiled if each["spilled_bytes"] > 0]
    # The assembler may fuse a product and a sum unless both say how they round: K would differ between kernels.
    assert not [each for each in compiled if each["fusible"] > 0 and each["name"] not in WITHOUT_K]


def main() -> None:
    """Prints a line of JSON for every compiled kernel."""
    from triton.runtime.jit import JITFunction

    JITFunction.run = _compile_instead  # pyright: ignore[reportAttributeAccessIssue]  # only here
    _call_everything("mixk", (2, 256, 384, 2, 16), has_memory=False)
    _call_everything("distance", (2, 256, 384, 2, 16), has_memory=True)
    _call_everything("sigmoid", (2, 256, 384, 2, 16), has_memory=True)
    _call_everything("mixk", (1, 1, 1, 1, 1), has_memory=True)


def _call_everything(kernel: str, shape: tuple[int, int, int, int, int], *, has_memory: bool) -> None:
    groups, rows, columns, components, q = shape
    A, B = torch.rand(groups, components, columns, q), torch.rand(groups, components, rows, q)
    params = [torch.ones(groups) for _ in KERNEL_PARAMETERS[kernel]]
    delta = Delta(A, B, params, kernel, "magnitude", 0.1, False)
    logs = triton_impl.column_logs(delta)
    memory = torch.full((groups, 2), torch.nan) if has_memory else None
    taus = triton_impl.find_thresholds(delta, logs, torch.zeros(groups, dtype=torch.int64), memory)
    weight = torch.zeros(groups * rows, columns, dtype=torch.bfloat16)
    everything = slice(0, columns)
    triton_impl.merge_columns(delta, taus, logs, weight, everything, torch.bfloat16)
    gradients = FactorGradients.zeros(delta, [True] * (2 + len(params)))
    triton_impl.add_gradients(delta, taus, logs, weight, everything, gradients)


def _compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
    """In place of JITFunction.run: compiles for sm_90 what would have been launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = inspect.signature(kernel.fn)
    options = {name: keywords.pop(name) for name in list(keywords) if name not in signature.parameters}
    types, constants, attributes = {}, {}, {}
    for place, (name, value) in enumerate(signature.bind(*args, **keywords).arguments.items()):
        is_number = isinstance(value, int) and not kernel.params[place].is_constexpr
        if kernel.params[place].is_constexpr or (is_number and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = triton.runtime.jit.mangle_type(value)
        if isinstance(value, torch.Tensor) or (is_number and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    report = {"name": kernel.fn.__name__, "kernel": constants.get("KERNEL"), "options": options}
    print(json.dumps(report | _resources(compiled.asm["ptx"])))


def _resources(ptx: str) -> dict[str, int]:
    """Registers per thread, bytes spilled, and sums and products that leave their rounding open."""
    import triton

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(assembler), "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None, said
    assert spilled is not None, said
    fusible = len(re.findall(r"(?:mul|add|sub)\.(?:ftz\.)?f32", ptx))
    return {"registers": int(registers[1]), "spilled_bytes": int(spilled[1]), "fusible": fusible}


if __name__ == "__main__":
    main()
