"""Supervised fine-tuning with LoRA: the starter answers sums in words; it learns to answer with the equation.

python examples/sft_lora.py
"""

from common import answers, arguments, measured, read_rows, share, validations

import mlxlora as ml
from mlxlora import starter

iters, output = arguments(__file__, 400)
ml.sft(
    model=str(starter.model_path()),
    data=str(starter.data_path("sft")),  # a folder with train.jsonl, valid.jsonl and test.jsonl
    mask_prompt=True,  # only the assistant's turns are scored
    num_layers=-1,  # adapters in every block, on all linear layers
    rank=16,
    scale=2.0,  # alpha / rank
    iters=iters,
    batch_size=16,
    learning_rate=4e-3,  # 1e-4 to 1e-5 suits real models; this one has 443k weights
    optimizer="adamw",
    weight_decay=0.3,
    lr_schedule="cosine",
    max_seq_length=64,
    steps_per_report=50,
    adapter_path=str(output),
)

chats = [row["messages"] for row in read_rows(starter.data_path("sft") / "test.jsonl")]
questions, equations = [chat[0]["content"] for chat in chats], [chat[-1]["content"] for chat in chats]
before = share(answers(starter.model_path(), questions), equations)
after = share(answers(starter.model_path(), questions, output), equations)
measured("validation loss, nats per token", *validations(output, "loss"))
measured("right equations among 100 that it never saw", before, after)
