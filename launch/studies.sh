#!/usr/bin/env bash
# The first studies of SNELL on the embedded digits: runs, then a table and a picture for each.
set -euo pipefail
cd "$(dirname "$0")/.."
snell-scale run configs/demo/pretrain.yaml --resume auto
for study in memory kernels sparsity initialisation scale; do
    snell-scale compare "configs/studies/$study.yaml" --name "studies/$study" --jobs "${JOBS:-2}"
    python -m analysis.studies "runs/studies/$study" --output "runs/studies/$study"
done
