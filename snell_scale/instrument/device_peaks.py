"""What GPUs can compute at most, from their makers' data sheets: dense products, without sparsity."""

import re

# TFLOP/s of dense products, accumulated in fp32; fp32 itself without tensor cores. The makers print twice as much
# for tensor cores where half of the operand is zero. Each from NVIDIA's data sheet of the product, or the white
# paper of its architecture where there is no sheet (GeForce: Ampere GA102, Ada; V100: Volta).
_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bB200\b", {"fp32": 75, "tf32": 1100, "bf16": 2250, "fp16": 2250}),
    (r"\bH[12]00 NVL\b", {"fp32": 60, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}),
    (r"\bH100 PCIe\b", {"fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756}),
    (r"\bH[12]00\b", {"fp32": 67, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4}),
    (r"\bA100\b", {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312}),
    (r"\bA40\b", {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7}),
    (r"\bA30\b", {"fp32": 10.3, "tf32": 82, "bf16": 165, "fp16": 165}),
    (r"\bA10\b", {"fp32": 31.2, "tf32": 62.5, "bf16": 125, "fp16": 125}),
    (r"\bRTX A6000\b", {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8, "fp16": 154.8}),
    (r"\bL40S\b", {"fp32": 91.6, "tf32": 183, "bf16": 362.05, "fp16": 362.05}),
    (r"\bL4\b", {"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121}),
    (r"\bRTX 4090\b(?! Laptop)", {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2}),
    (r"\bRTX 3090\b(?! Ti)", {"fp32": 35.6, "tf32": 35.6, "bf16": 71, "fp16": 71}),
    (r"\bV100-SXM2\b", {"fp32": 15.7, "fp16": 125}),
    (r"\bV100-PCIE\b", {"fp32": 14, "fp16": 112}),
    (r"\bT4\b", {"fp32": 8.1, "fp16": 65}),
)


def peak_flops_per_s(device_name: str, dtype: str) -> float | None:
    """Of a device by the name that CUDA gives it, in fp32, tf32, bf16 or fp16; None where it is not known.

    Of a MIG instance, which is a part of a device, nothing is known.
    """
    if "MIG" in device_name.split():
        return None
    for pattern, tflops in _TFLOPS:
        if re.search(pattern, device_name):
            return 1e12 * tflops[dtype] if dtype in tflops else None
    return None
