"""Functions and objects in place of names: objective, rewards, optimizer, learning rate, model and tokenizer."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from transformers import AutoTokenizer

import mlxlora as ml
from mlxlora.errors import InputError
from mlxlora.rollouts.rewards import load_rewards
from mlxlora.training.run_folder import read_settings
from mlxlora.training.user_objective import user_objective

ROWS = [{"prompt": f"add {i} and 2.", "completion": str(i + 2)} for i in range(8)]
FAST = {"iters": 3, "batch_size": 2, "num_layers": 1, "quiet": True, "answers": 0, "data": ROWS}

pytestmark = pytest.mark.usefixtures("eager")


def negative(logps, batch):
    return -logps


def trained(folder, **options):
    """The bytes of the adapters that a run writes."""
    ml.sft(adapter_path=folder, **FAST | options)
    return (folder / "adapters.safetensors").read_bytes()


def test_a_function_is_an_objective(model_folder, tmp_path):
    """Its mean over the trained tokens: the negative log-probability is the NLL."""
    plain = trained(tmp_path / "a", model=model_folder)
    assert trained(tmp_path / "b", model=model_folder, objective=negative) == plain
    assert trained(tmp_path / "c", model=model_folder, objective=ml.nll()) == plain
    assert trained(tmp_path / "d", model=model_folder, objective=lambda: ml.nll()) == plain
    assert read_settings(tmp_path / "b" / "config.yaml")["objective"] == "negative (given in Python)"
    file = tmp_path / "mine.py"
    file.write_text("def negative(logps, batch):\n    return -logps\n")
    assert trained(tmp_path / "e", model=model_folder, objective=f"{file}:negative") == plain


def test_a_function_says_which_columns_it_reads():
    found = user_objective(ml.reads("ref_logps")(negative))
    assert found is not None and found.needs == {"ref_logps"} and found.terms[0][1].name == "negative"


def flat(logps, batch):
    return logps.sum()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": flat}, r"^objective: flat must return a value for each trained token, \(\d+,\), got .*; ml\.term\("),
        (
            {"objective": lambda logps: logps},
            r"^objective: expected an Objective or a function \(logps, batch\) -> values, got a f",
        ),
        ({"objective": 3}, r"^objective: expected an Objective or a function \(logps, batch\) -> values, got int 3$"),
        ({"optimizer": 3}, r"^--optimizer must be one of adam, .*, got 3$"),
        (
            {"optimizer": optim.Adam(1e-3), "learning_rate": 1e-3},
            r"^learning_rate has no effect on an optimizer object; give it to A",
        ),
        ({"optimizer": optim.MultiOptimizer([optim.SGD(1)])}, r"^optimizer must be a name or one object of mlx.optimizers"),
        ({"optimizer": optim.Adafactor()}, r"^optimizer: give Adafactor a learning_rate$"),
        (
            {"learning_rate": optim.cosine_decay(1e-3, 9), "warmup": 2},
            r"^learning_rate is a schedule of its own; leave out lr_sched",
        ),
        ({"tokenizer": 3}, r"^tokenizer must be one of mlx-lm or transformers, a folder or a hub name, got int 3$"),
        ({"model": 3}, r"^model must be a folder, a hub name, a model or \(model, tokenizer\), got int 3$"),
    ],
)
def test_objects_that_are_not_what_they_should_be(model_folder, tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        trained(tmp_path / "a", **{"model": model_folder} | given)


def test_an_optimizer_is_taken_as_it_was_made(model_folder, tmp_path):
    """The named optimizers are these objects; a second run starts anew, and leaves the object as it was."""
    own = optim.AdamW(1e-3, bias_correction=True, weight_decay=0.0)
    named = trained(tmp_path / "a", model=model_folder, optimizer="adamw", learning_rate=1e-3)
    assert trained(tmp_path / "b", model=model_folder, optimizer=own) == named
    assert trained(tmp_path / "c", model=model_folder, optimizer=own) == named
    assert own.step.item() == 0 and own.state.keys() == {"step", "learning_rate"}
    assert read_settings(tmp_path / "b" / "config.yaml")["optimizer"] == "AdamW (given in Python)"


def test_schedules(model_folder, tmp_path):
    schedule = optim.linear_schedule(1e-2, 0.0, 3)
    trained(tmp_path / "a", model=model_folder, learning_rate=1e-2, lr_schedule="linear")
    given = trained(tmp_path / "b", model=model_folder, learning_rate=schedule)
    arrays: list[Any] = [mx.load(str(tmp_path / name / "adapters.safetensors")) for name in "ab"]
    assert all(mx.allclose(arrays[0][name], arrays[1][name], rtol=1e-4) for name in arrays[0])
    own = optim.Adam(schedule, bias_correction=True)
    assert trained(tmp_path / "c", model=model_folder, optimizer=own) == given


def test_a_loaded_model_and_a_plain_tokenizer(model_folder, tmp_path):
    by_name = trained(tmp_path / "a", model=model_folder)
    assert trained(tmp_path / "b", model=ml.load(str(model_folder))) == by_name
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model, _ = ml.load(str(model_folder))
    assert trained(tmp_path / "c", model=model, tokenizer=tokenizer) == by_name
    assert trained(tmp_path / "d", model=model_folder, tokenizer=tokenizer) == by_name
    assert trained(tmp_path / "e", model=model_folder, tokenizer=str(model_folder)) == by_name
    for name in "abcde":  # the name of the base stays known
        assert read_settings(tmp_path / name / "config.yaml")["model"] == str(model_folder)
    with pytest.raises(InputError, match=r"^model is a model alone; pass its tokenizer too: model=\(model, tokenizer\), or token"):
        trained(tmp_path / "f", model=ml.load(str(model_folder))[0])
    with pytest.raises(InputError, match=r"^--quantize 4 is for models that are loaded here; quantize this one before$"):
        trained(tmp_path / "f", model=ml.load(str(model_folder)), quantize="4")


def short(completions, **columns):
    return [-float(len(text)) for text in completions]


def theirs(prompts, completions, answer, types=None):
    return [float(wanted in text) for text, wanted in zip(completions, answer, strict=True)]


def test_functions_are_rewards(model_folder, tmp_path):
    """In TRL's and in mlx-lm-lora's form, beside names."""
    rows = [{"prompt": f"add {i}", "answer": str(i)} for i in range(4)]
    rewards = [short, theirs, "accuracy", lambda completions: [1.0] * len(completions)]
    folder, how = tmp_path / "a", {**FAST, "data": rows, "iters": 1, "steps_per_report": 1, "max_completion_length": 4}
    ml.grpo(model=model_folder, rewards=rewards, adapter_path=folder, reward_weights=[1, 1, 0.5, 0], **how)
    text = (folder / "metrics.jsonl").read_text()
    assert all(f'"rewards/{name}/mean"' in text for name in ("short", "theirs", "accuracy", "reward"))
    stored = read_settings(folder / "config.yaml")["rewards"]
    assert stored == ["short (given in Python)", "theirs (given in Python)", "accuracy", "<lambda> (given in Python)"]


def test_names_of_rewards_differ():
    first, second = lambda completions: [], lambda completions: []
    assert [reward.name for reward in load_rewards([first, "accuracy", second])] == ["reward_1", "accuracy", "reward_3"]
    with pytest.raises(InputError, match=r"^rewards: expected a name or a function \(completions, \.\.\.\) -> numbers, got int 3$"):
        load_rewards([3])  # type: ignore[list-item]
