#!/usr/bin/env bash
# What the estimator says of the published memory table and of models with billions of parameters; nothing is run.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
estimate() { # CONFIG key=value,value … [-- option …]
    local config=$1 matrix=()
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do matrix+=("$1") && shift; done
    snell-scale estimate "configs/estimates/$config.yaml" "${@:2}" --jobs "${JOBS:-2}" --matrix "${matrix[@]}"
}
report() { python -m analysis.memory_scaling "$1" --output "$1"; }

published=(methods=lora,snell,gps,full method.r=8,32 -- --num-classes 200)
estimate published "${published[@]}" --output runs/estimates/fused
TIMM_FUSED_ATTN=0 estimate published "${published[@]}" --output runs/estimates/unfused
ranks=(methods=lora,snell,gps,full world_size=1,8,64,1024 -- --engine fsdp2 --device-memory 80GiB)
estimate billions "${ranks[@]}" --microbatch 8 --num-classes 1000 --output runs/estimates/large
estimate flux "${ranks[@]}" --microbatch 1 --num-classes 1 --output runs/estimates/large
for part in fused unfused large; do report "runs/estimates/$part"; done
