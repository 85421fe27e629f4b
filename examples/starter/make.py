"""Make the bundled starter from nothing: text, tokenizer, random weights, pretraining.

python examples/starter/make.py                                      # writes mlxlora/starter/{model,data}
python examples/starter/make.py --output /tmp/starter --iters 200    # elsewhere, and briefly
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
TOKENIZER_ROWS = 20000
PRETRAINING_ROWS = 200_000
PRETRAINING = {
    "train_type": "full",
    "num_layers": -1,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "lr_schedule": "cosine",
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "warmup": 100,
    "max_seq_length": 64,
    "steps_per_report": 100,
    "save_every": 250,
    "save_total_limit": 0,
}
KEPT = 2000  # of 3000 steps: chosen by its accuracy on training questions, so that the other modes have something to improve
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{%- else -%}{{ message['content'] + '<|im_end|>\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def train_tokenizer(lines: Iterable[str]) -> Tokenizer:
    """Byte-level BPE, so that any text has tokens; every digit is its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def write_parts(folder: Path, lines: Iterable[str]) -> None:
    """config.json and the tokenizer's files: what `mlxlora init` starts from."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(lines).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def mlxlora(command: str, **options: object) -> None:
    """Runs `mlxlora COMMAND` with options as its flags; True is a switch."""
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value) if part is not True]
    subprocess.run([sys.executable, "-m", "mlxlora_cli", command, *map(str, flags)], check=True)


def make(output: Path, iters: int) -> None:
    """All steps, in a temporary folder, whose results replace `output`/model and `output`/data."""
    for name, rows in text.datasets().items():
        text.write(output / "data" / name, rows)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = text.pretraining_rows(PRETRAINING_ROWS)
        text.write(folder / "text" / "train.jsonl", rows)
        write_parts(folder / "parts", (row["text"] for row in rows[:TOKENIZER_ROWS]))
        mlxlora("init", config_file=folder / "parts" / "config.json", tokenizer=folder / "parts", output=folder / "model")
        mlxlora(
            "sft", model=folder / "model", data=folder / "text", adapter_path=folder / "weights", iters=iters, **PRETRAINING
        )  # fmt: skip
        # full training of all layers leaves all weights where adapters would be
        kept = folder / "weights" / "checkpoints" / f"{min(KEPT, iters):07d}"
        shutil.copyfile(kept / "adapters.safetensors", folder / "model" / "model.safetensors")
        shutil.copytree(folder / "model", output / "model", dirs_exist_ok=True)


def accuracy(folder: Path, rows: list[dict]) -> float:
    """The share of questions that the model, decoding greedily, answers with the bare right number."""
    from mlx_lm import batch_generate, load

    model, tokenizer = load(str(folder))[:2]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True) for row in rows
    ]
    replies = batch_generate(model, tokenizer, prompts, max_tokens=8).texts
    return sum(reply.strip() == row["answer"] for reply, row in zip(replies, rows, strict=True)) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled starter from nothing.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[2] / "mlxlora" / "starter")
    parser.add_argument("--iters", type=int, default=3000, help="pretraining steps")
    args = parser.parse_args()
    make(args.output, args.iters)
    rows = text.datasets()["grpo/valid.jsonl"]
    print(f"{args.output / 'model'}: greedy accuracy {accuracy(args.output / 'model', rows):.0%} on {len(rows)} held-out questions")


if __name__ == "__main__":
    main()
