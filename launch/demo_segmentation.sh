#!/usr/bin/env bash
# The segmentation demo: pre-train a small ViT on scenes of digits 0-4, adapt it to 5-9 with four methods over two
# seeds, write the report with its pictures of predictions. Finished runs are kept: a second call only rebuilds the
# report. CLEAN=1 starts over.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${CLEAN:-0}" = 1 ] && rm -rf runs/demo-segmentation
snell-scale run configs/segmentation/pretrain.yaml --resume auto
snell-scale compare configs/segmentation/methods.yaml --name demo-segmentation --jobs "${JOBS:-2}"
python -m analysis.report runs/demo-segmentation --output runs/demo-segmentation \
    --title "Segmentation: SNELL beside LoRA and full tuning" \
    --note "scikit-learn's real handwritten digits on made backgrounds: pre-trained on 0-4, adapted to 5-9 (400 scenes)."
