#!/usr/bin/env bash
# Odds-ratio preference optimization, which needs no reference: bash examples/orpo.sh [ITERS] [OUTPUT]
set -euo pipefail
cd "$(dirname "$0")/.."
iters=${1:-100} output=${2:-outputs/orpo}

# ORPO starts from a model that is not tuned yet: its loss is the likelihood of the chosen plus beta times the odds ratio
mlxlora orpo --model mlxlora/starter/model --data mlxlora/starter/data/pairs --use-chat-template \
    --beta 0.5 --iters "$iters" --batch-size 16 --learning-rate 1e-3 --lr-schedule cosine --num-layers -1 --scale 2 \
    --max-seq-length 64 --steps-per-report 25 --val-batches -1 --adapter-path "$output" --overwrite

mlxlora compare --model mlxlora/starter/model --adapter-path "$output" --data mlxlora/starter/data/pairs --num 3 --max-tokens 16
python examples/common.py "$output" nll_loss
python examples/common.py "$output" rewards/accuracies
