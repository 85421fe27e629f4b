#!/usr/bin/env bash
# Full supervised fine-tuning from a YAML file: bash examples/sft_full.sh [ITERS] [OUTPUT]
set -euo pipefail
cd "$(dirname "$0")/.."
iters=${1:-150} output=${2:-outputs/sft_full}

model=mlxlora/starter/model data=mlxlora/starter/data/sft
loss() { mlxlora eval --model "$model" --data "$data" --mask-prompt "$@" | awk '$1 == "loss" { print $2 }'; }

before=$(loss)
mlxlora sft --config examples/sft_full.yaml --model $model --data $data --iters "$iters" --adapter-path "$output/run" --overwrite
after=$(loss --adapter-path "$output/run")

# `fuse` makes a model folder of the trained weights, for mlx_lm.generate, mlx_lm.server, or the next training
mlxlora fuse --model $model --adapter-path "$output/run" --save-path "$output/model" --overwrite
mlxlora generate --model "$output/model" --prompt "what is 18 plus 36?" --max-tokens 16

echo "measured: test loss, nats per token: $before -> $after"
