"""Direct preference optimization: of two answers to each question, the bare right number is preferred.

python examples/dpo.py
"""

from common import answers, arguments, measured, read_rows, share, validations

import mlxlora as ml
from mlxlora import starter

iters, output = arguments(__file__, 100)
pairs = starter.data_path("dpo")  # rows with prompt, chosen and rejected
ml.dpo(
    model=str(starter.model_path()),
    data=str(pairs),
    use_chat_template=True,  # prompts are plain strings
    # the preference, and a little likelihood of the chosen, which holds it up (RPO); plain DPO: "sigmoid"
    loss_type="sigmoid+0.2*nll",
    beta=0.1,
    num_layers=-1,
    scale=2.0,
    iters=iters,
    batch_size=16,
    learning_rate=1e-3,
    lr_schedule="cosine",
    max_seq_length=64,
    steps_per_report=25,
    val_batches=-1,
    adapter_path=str(output),
)

rows = read_rows(pairs / "valid.jsonl")
questions, numbers = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
before = share(answers(starter.model_path(), questions), numbers)
after = share(answers(starter.model_path(), questions, output), numbers)
measured("preference loss of held-out pairs", *validations(output, "sigmoid"))
measured("right bare numbers among 100 held-out questions", before, after)
