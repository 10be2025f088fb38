#!/usr/bin/env bash
# The demo: pre-train a small ViT on digits 0-4, adapt it to 5-9 with every method over 3 seeds, write the report.
# Finished runs are kept: a second call only rebuilds the report. CLEAN=1 starts over.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${CLEAN:-0}" = 1 ] && rm -rf runs/demo
snell-scale run configs/demo/pretrain.yaml --resume auto
snell-scale compare configs/demo/methods.yaml --name demo --jobs "${JOBS:-2}"
python -m analysis.report runs/demo --output runs/demo \
    --title "SNELL beside LoRA, sparse and full tuning" \
    --note "Real data: scikit-learn's handwritten digits, pre-trained on 0-4, adapted to 5-9 (40 images a class)."
