"""Fine-tune large vision models with little memory: SNELL, SNELLA and the methods they are compared with."""

from snell_scale import torchvision_on_cpu

__version__ = "0.1.0"

torchvision_on_cpu.install()
