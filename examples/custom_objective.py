"""An objective that mlxlora does not have, written as a sum: likelihood of the chosen, unlikelihood of the rejected.

Unlikelihood training (Welleck et al., 2020, https://arxiv.org/abs/1908.04319): -log(1 - π(y_t)) for tokens that should not come.

python examples/custom_objective.py

The command line takes the same object: `mlxlora cpo --objective examples/custom_objective.py:objective ...`
"""

import mlxlora as ml


def unlikely(logps, batch):
    """[N] log-probabilities of scored tokens to [N] values; padding and prompts never come here."""
    return -(1.0001 - logps.exp()).log()  # finite where a token is certain


objective = (
    ml.nll(of=ml.chosen)
    + 0.5 * ml.term("unlikelihood", unlikely, ml.token_mean(ml.rejected))
    + ml.terms.rewards(ml.mean_logps, beta=1.0)  # watched, not optimized: how far chosen and rejected are apart
)


def main() -> None:
    from common import answers, arguments, measured, read_rows, share, validations

    from mlxlora import starter

    iters, output = arguments(__file__, 100)
    model, tokenizer = ml.load(ml.ModelOptions(model=str(starter.model_path())))
    pairs = starter.data_path("cpo")
    ml.run(
        model,
        tokenizer,
        objective,
        ml.pairs(str(pairs), use_chat_template=True, max_seq_length=64),
        ml.Training(iters=iters, batch_size=16, learning_rate=1e-3, lr_schedule="cosine"),
        adapter=ml.AdapterOptions(num_layers=-1, scale=2.0),
        adapter_path=str(output),
        steps_per_report=25,
        val_batches=-1,
    )
    rows = read_rows(pairs / "valid.jsonl")
    questions, numbers = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    before = share(answers(starter.model_path(), questions), numbers)
    after = share(answers(starter.model_path(), questions, output), numbers)
    measured("unlikelihood of rejected tokens", *validations(output, "unlikelihood"))
    measured("pairs whose chosen answer is likelier, per token", *validations(output, "rewards/accuracies"))
    measured("right bare numbers among 100 held-out questions", before, after)


if __name__ == "__main__":
    main()
