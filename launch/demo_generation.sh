#!/usr/bin/env bash
# The generation demo: pre-train a small diffusion model on digits 0-4, adapt it to draw 5-9 with four methods over
# two seeds, write the report with their samples. A classifier of the ten digits, trained first, judges them.
# Finished runs are kept: a second call only rebuilds the report. CLEAN=1 starts over.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${CLEAN:-0}" = 1 ] && rm -rf runs/demo-generation
snell-scale run configs/generation/classifier.yaml --resume auto
snell-scale run configs/generation/pretrain.yaml --resume auto
snell-scale compare configs/generation/methods.yaml --name demo-generation --jobs "${JOBS:-2}"
python -m analysis.report runs/demo-generation --output runs/demo-generation \
    --title "Drawing digits: SNELL beside LoRA and full tuning of a diffusion model" \
    --note "Real images: scikit-learn's handwritten digits at 16 pixels. A UNet pre-trained on 0-4 learns to draw 5-9 (40 images a class), prompted by a word that it has not seen. KID, FID and recognised samples are taken with a small classifier of the ten digits, not with Inception: they compare these rows with each other, and with nothing else."
