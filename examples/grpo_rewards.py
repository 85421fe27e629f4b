"""GRPO with rewards of your own: right answers, in a sentence of a given form. No answer is ever shown, only rewarded.

python examples/grpo_rewards.py

The command line takes the same functions: `mlxlora grpo --reward-file examples/grpo_rewards.py --rewards right,sentence ...`
"""

import re

SENTENCE = re.compile(r"it is (\d+)\.")


def right(prompts, completions, answer, **columns):
    """1 for the right number, anywhere. `answer` is a field of the rows; each argument has one entry per completion."""
    return [float(re.findall(r"\d+", text) == [number]) for text, number in zip(completions, answer, strict=True)]


def sentence(prompts, completions, **columns):
    """1 for the form alone."""
    return [float(SENTENCE.fullmatch(text.strip()) is not None) for text in completions]


def main() -> None:
    from common import answers, arguments, measured, read_rows, share, validations

    import mlxlora as ml
    from mlxlora import starter

    iters, output = arguments(__file__, 60)
    ml.grpo(
        model=str(starter.model_path()),
        data=str(starter.data_path("grpo")),
        use_chat_template=True,
        reward_file=__file__,
        rewards=("right", "sentence"),
        reward_weights=(1.0, 0.5),  # the form alone is worth less than the answer
        group_size=8,  # completions of each prompt, which are compared with one another
        batch_size=16,  # prompts
        max_completion_length=16,
        beta=0.0,  # no KL, so no reference is computed
        num_layers=-1,
        rank=16,
        scale=2.0,
        iters=iters,
        learning_rate=1e-3,
        optimizer="adamw",
        steps_per_report=10,
        adapter_path=str(output),
    )
    rows = read_rows(starter.data_path("grpo") / "valid.jsonl")
    questions, wanted = [row["prompt"] for row in rows], [f"it is {row['answer']}." for row in rows]
    before = share(answers(starter.model_path(), questions), wanted)
    after = share(answers(starter.model_path(), questions, output), wanted)
    measured("mean reward of greedy answers, held out", *validations(output, "reward"))
    measured(f"right answers in that form, of {len(rows)} held-out questions", before, after)


if __name__ == "__main__":
    main()
