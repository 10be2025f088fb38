#!/usr/bin/env bash
# The first studies of SNELL on the embedded digits: runs, then a table and a picture for each.
set -euo pipefail
cd "$(dirname "$0")/.."
snell-scale run configs/demo/pretrain.yaml --resume auto
study() { # NAME [option of analysis.studies …]
    snell-scale compare "configs/studies/$1.yaml" --name "studies/$1" --jobs "${JOBS:-2}"
    python -m analysis.studies "runs/studies/$1" --output "runs/studies/$1" "${@:2}"
}
study memory --memory-only # accuracy means nothing after ten steps from random weights
snell-scale estimate configs/studies/memory.yaml --target cpu --jobs "${JOBS:-2}" --output runs/studies/estimates
python -m analysis.memory_scaling runs/studies/memory runs/studies/estimates --output runs/studies/memory-scaling
study kernels
study sparsity
study initialisation
study scale
