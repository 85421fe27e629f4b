#!/usr/bin/env bash
# Pretraining from scratch: random weights, plain text: bash examples/pretrain.sh [ITERS] [OUTPUT]
set -euo pipefail
cd "$(dirname "$0")/.."
iters=${1:-250} output=${2:-outputs/pretrain}
rm -rf "$output"

# text: a few thousand lines about sums; any JSONL with a field `text` will do
python examples/starter/text.py --pretraining 8000 "$output/text"
head -n 3 "$output/text/train.jsonl"

# a model is an architecture (config.json, any that mlx-lm knows), a tokenizer, and weights; here the starter's, random
mlxlora init --config-file mlxlora/starter/model/config.json --tokenizer mlxlora/starter/model --output "$output/random"

# without --mask-prompt every token is scored; rows of text end with the end-of-sequence token
mlxlora sft --model "$output/random" --data "$output/text" --valid-fraction 0.02 --max-seq-length 64 \
    --train-type full --num-layers -1 --optimizer adamw --weight-decay 0.01 --learning-rate 3e-3 --lr-schedule cosine --warmup 20 \
    --iters "$iters" --batch-size 32 --steps-per-report 50 --adapter-path "$output/run"

# full training of all layers leaves all weights, which `fuse` puts into a model folder
mlxlora fuse --model "$output/random" --adapter-path "$output/run" --save-path "$output/model"
mlxlora generate --model "$output/model" --no-use-chat-template --prompt "what is 7 plus" --max-tokens 12
python examples/common.py "$output/run" loss
