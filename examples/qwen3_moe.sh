#!/usr/bin/env bash
# A small mixture of experts (Qwen3-MoE) from nothing: pretraining, SFT, preference: bash examples/qwen3_moe.sh [ITERS] [OUTPUT]
set -euo pipefail
cd "$(dirname "$0")/.."
iters=${1:-200} output=${2:-outputs/qwen3_moe}
rm -rf "$output"
common=(--optimizer adamw --lr-schedule cosine --batch-size 16 --max-seq-length 64 --steps-per-report 50 --val-batches -1)

# 1. pretraining: the architecture is examples/qwen3_moe.json, 8 experts of which each token visits 2
python examples/starter/text.py --pretraining 8000 "$output/text"
mlxlora init --config-file examples/qwen3_moe.json --tokenizer mlxlora/starter/model --output "$output/random"
mlxlora sft --model "$output/random" --data "$output/text" --valid-fraction 0.01 --train-type full --num-layers -1 \
    --learning-rate 3e-3 --iters "$iters" "${common[@]}" --adapter-path "$output/pretraining"
mlxlora fuse --model "$output/random" --adapter-path "$output/pretraining" --save-path "$output/pretrained"

# 2. SFT: conversations; still all weights, at a third of the learning rate
mlxlora sft --model "$output/pretrained" --data mlxlora/starter/data/sft --mask-prompt --train-type full --num-layers -1 \
    --learning-rate 1e-3 --iters $((iters / 2 + 1)) "${common[@]}" --adapter-path "$output/sft"
mlxlora fuse --model "$output/pretrained" --adapter-path "$output/sft" --save-path "$output/tuned"

# 3. preference: ORPO with LoRA on attention and experts. The chosen answers are bare numbers, which SFT did not teach:
# where chosen answers are unlikely, a loss with their likelihood in it (ORPO, CPO, dpo's sigmoid+nll) is the safe choice
mlxlora orpo --model "$output/tuned" --data mlxlora/starter/data/pairs --use-chat-template --num-layers -1 --scale 2 \
    --learning-rate 1e-3 --iters $((iters / 2 + 1)) "${common[@]}" --adapter-path "$output/orpo"

echo "pretraining, SFT, preference:"
python examples/common.py "$output/pretraining" loss
python examples/common.py "$output/sft" loss
python examples/common.py "$output/orpo" rewards/accuracies
