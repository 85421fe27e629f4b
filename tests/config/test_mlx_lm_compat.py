"""Switching from mlx-lm and mlx-lm-lora: their files run unchanged, and every key and flag of theirs has its place here.

`python tests/config/test_mlx_lm_compat.py` writes the tables of docs/ anew.
"""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm.lora
import pytest
import yaml
from mlx_lm.tuner.utils import build_schedule

from mlxlora import starter
from mlxlora.config import config_file as settings
from mlxlora.config import mlx_lm_compat as peers
from mlxlora.config.options import DataOptions, Training
from mlxlora.errors import InputError
from mlxlora.methods import METHODS, commands
from mlxlora.training.optimizers import learning_rate, make_optimizer

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = {name: ROOT / "docs" / f"from-{name.lower()}.md" for name in ("mlx-lm", "mlx-lm-lora", "TRL")}
DATA = Path(__file__).parent / "switch"
GROUPS = {name: row.kinds.kinds() for name, row in METHODS.items() if row.modes}
"""The groups of options of the methods that mlx-lm-lora has too."""
LORA = yaml.safe_load((DATA / "mlx_lm_lora.yaml").read_text(encoding="utf-8"))


def flags_of(parser):
    return {flag[2:].replace("-", "_") for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


KEYS = {
    "mlx-lm": {*mlx_lm.lora.CONFIG_DEFAULTS, *flags_of(mlx_lm.lora.build_parser())} - {"help"},
    "mlx-lm-lora": {*LORA["keys"], *LORA["flags"]},
    "TRL": {*yaml.safe_load((DATA / "trl.yaml").read_text(encoding="utf-8"))},
}


def reading(command, note):
    return settings.Reading(settings.fields_of(*GROUPS[command]), command, note=note, commands=commands())


def read(text, tmp_path, command="sft", **given):
    """The options and notes of a file."""
    path, notes = tmp_path / "peer.yaml", []
    path.write_text(text, encoding="utf-8")
    values = settings.read_config(path, reading(command, notes.append), given)
    return values, [note.replace(str(path), "peer.yaml") for note in notes]


def refused(text, tmp_path, command="sft"):
    with pytest.raises(InputError) as stopped:
        read(text, tmp_path, command)
    return str(stopped.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_every_key_and_flag_has_its_place(peer):
    assert KEYS[peer.name] <= peer.keys.keys(), KEYS[peer.name] - peer.keys.keys()
    options = settings.fields_of(*(group for row in METHODS.values() for group in row.kinds.kinds()))
    assert {key.option for key in peer.keys.values()} - {None} <= options.keys()
    assert all(key.option or key.text for key in peer.keys.values())


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_the_documentation_shows_the_table(peer):
    assert table(peer) in PAGES[peer.name].read_text(encoding="utf-8"), "run `python tests/config/test_mlx_lm_compat.py`"


def test_the_tables_stand_in_their_pages_alone():
    """The README links them; every key of each library is a row of its page."""
    readme = README.read_text(encoding="utf-8")
    for peer in peers.PEERS:
        assert f"docs/{PAGES[peer.name].name}" in readme
        names = [name for row in table(peer).splitlines()[2:] for name in row.split(" | ")[0].strip("| ").split(", ")]
        assert sorted(names) == sorted(f"`{name}`" for name in peer.keys)
    assert "| there |" not in readme


def test_the_defaults_of_mlx_lm_are_taken(tmp_path):
    """Its whole CONFIG_DEFAULTS as a file."""
    values, notes = read(yaml.safe_dump({**mlx_lm.lora.CONFIG_DEFAULTS, "train": True}), tmp_path)
    assert values["iters"] == 1000 and values["train_type"] == "lora" and len(notes) == 1


@pytest.mark.parametrize("command", GROUPS)
def test_a_file_of_mlx_lm_lora_may_have_every_key(tmp_path, command):
    idle = dict.fromkeys(LORA["keys"])
    text = yaml.safe_dump(
        {**idle, "train": True, "train_mode": command.replace("-", "_"), "beta": 0.2, "group_size": 3, "fuse": False}
    )
    values, notes = read(text, tmp_path, command)
    assert ("beta" in values, "group_size" in values) == (command != "sft", command in ("grpo", "online-dpo"))
    assert notes[0].startswith("without effect on this command: ")


def test_the_published_file_of_mlx_lm(tmp_path):
    values, notes = read((DATA / "lora_config.yaml").read_text(), tmp_path)
    expected = {"train_type": "lora", "optimizer": "adamw", "iters": 1000, "rank": 8, "scale": 20.0}
    assert expected.items() <= values.items() and values["lora_keys"] == ("self_attn.q_proj", "self_attn.v_proj")
    assert notes == [
        "peer.yaml is mlx-lm's. Different in mlxlora: Adam has bias correction; gradients are clipped to norm 1 "
        "(max_grad_norm 0 = off); a loss is one mean over all trained tokens of a step; plain-text rows are wrapped "
        "in the chat template only with "
        "use_chat_template. More in docs/from-mlx-lm.md",
        "not set, so they have mlxlora's defaults instead of mlx-lm's: weight_decay (0.01)",
    ]
    assert PAGES["mlx-lm"].is_file()


def test_all_that_the_file_of_mlx_lm_shows(tmp_path):
    values, notes = read((DATA / "lora_config_all.yaml").read_text(), tmp_path)
    assert (values["betas"], values["eps"], values["weight_decay"]) == ((0.9, 0.98), 1e-6, 0.05)
    schedule = ("lr_schedule", "learning_rate", "lr_decay_steps", "lr_end", "warmup", "warmup_init")
    assert [values[name] for name in schedule] == ["cosine", 1e-5, 1000, 1e-7, 100, 1e-7]
    splits = (values["data"], values["train_split"], values["valid_split"])
    assert splits == ("hf://datasets/billsum", "train[:1000]", "train[-100:]")
    assert (values["prompt_key"], values["completion_key"], values["report_to"]) == ("text", "summary", ("wandb", "swanlab"))
    assert values["project_name"] == "Your-awesome-mlx-project-name" and "iters (1000)" in notes[-1]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("gradient_accumulation_steps: 3", {"grad_accumulation_steps": 3}),
        ("sft_loss_type: chunked_nll", {"loss_type": "nll"}),
        ("train: true\nreport_to: none", {}),
        ("load_in_4bits: false\nepochs: 2\niters: 5", {"iters": 5}),
        ("load_in_6bits: true\nload_in_8bits: false", {"quantize": "6"}),
        ("qat_enable: true", {"qat": "8"}),
        ("qat_bits: 4\nqat_enable: true\nqat_group_size: 64\nqat_start_step: 1", {"qat": "4"}),
        ("qat_bits: 4\nqat_enable: false\nqat_interval: 1", {}),
        ("rank_pattern: {q_proj: 16, v_proj: 4}", {"rank_pattern": ("q_proj=16", "v_proj=4")}),
        ("optimizer_config: {adam: {betas: [0.8, 0.9]}, sgd: {momentum: 0.5}}", {"betas": (0.8, 0.9)}),
        ("optimizer: sgd\noptimizer_config: {sgd: {momentum: 0.5}}", {"optimizer": "sgd", "momentum": 0.5}),
        ("lr_schedule: {name: linear_schedule, arguments: [1e-4, 1e-5, 50]}",
         {"lr_schedule": "linear", "learning_rate": 1e-4, "lr_end": 1e-5, "lr_decay_steps": 50}),
        ("hf_dataset: [{path: org/a, config: {name: en}, chat_feature: turns}]", {"data": "org/a:en", "messages_key": "turns"}),
        ("hf_dataset: {path: squad, config: {name: plain}}", {"data": "hf://datasets/squad:plain"}),
        ("lora_layers: 4\nlora_parameters:", {"num_layers": 4}),
        ("chosen_feature: chosen\ntraining_mode: normal", {}),
        ("lr_schedule: {name: exponential_decay, arguments: [1e-4, 0.999]}",
         {"lr_schedule": "exponential", "learning_rate": 1e-4, "lr_decay_rate": 0.999, "lr_decay_steps": 1}),
        ("lr_schedule: {name: step_decay, arguments: [1e-4, 0.9, 10], warmup: 5}",
         {"lr_schedule": "step", "learning_rate": 1e-4, "lr_decay_rate": 0.9, "lr_decay_steps": 10, "warmup": 5}),
    ],
)  # fmt: skip
def test_keys_become_options(tmp_path, text, options):
    assert read(text, tmp_path)[0] == options


@pytest.mark.parametrize(
    ("command", "text", "options"),
    [
        ("dpo", "dpo_cpo_loss_type: dpop\ndelta: 50.0", {"loss_type": "dpop", "delta": 50.0}),
        ("cpo", "dpo_cpo_loss_type: hinge\ndelta: 50.0", {"loss_type": "hinge"}),
        ("cpo", "train_mode: cpo\nloss_type: hinge\ndelta: 2.0", {"loss_type": "hinge", "delta": 2.0}),
        ("grpo", "dpo_cpo_loss_type: sigmoid\ndelta: 50.0\ngrpo_loss_type: dr_grpo", {"loss_type": "dr_grpo"}),
        ("grpo", "delta: 4.0", {"delta": 4.0}),
        ("grpo", "importance_sampling_level: sequence", {"importance_level": "sequence"}),
        ("grpo", 'reward_functions: "r1_int_reward_func, mine"\nreward_weights: "[0.7, 0.3]"',
         {"rewards": ("integer(score=0.5)", "mine"), "reward_weights": (0.7, 0.3)}),
        ("cpo", "alpha: 0.5", {"alpha": 0.5}),
        ("online-dpo", "train_mode: xpo\nalpha: 1e-5\njudge: org/name", {"xpo_alpha": 1e-5, "judge_model": "org/name"}),
        ("online-dpo", "train_mode: online_dpo\nalpha: 1e-5\ndpo_cpo_loss_type: ipo", {"loss_type": "ipo"}),
        ("sft", "train_mode: sft\njudge: human\njudge_config: {system_prompt: x}", {}),
        ("orpo", "train_mode: orpo\nreward_scaling: 1.0\nbeta: 0.3", {"beta": 0.3}),
    ],
)  # fmt: skip
def test_keys_of_the_other_methods(tmp_path, command, text, options):
    assert read(text, tmp_path, command)[0] == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iters: 3\ntrain_mode: dpo", "peer.yaml:2: train_mode is dpo; run `mlxlora dpo -c peer.yaml`"),
        ("train_mode: ppo", "peer.yaml:1: train_mode ppo is not offered; there are sft, dpo, orpo, cpo, grpo, online_dpo, xpo"),
        ("lr_schedule: {name: join_schedules, arguments: [1e-4]}",
         "peer.yaml:1: lr_schedule join_schedules is not offered; there are cosine_decay, linear_schedule, exponential_decay, "
         "step_decay, with their arguments"),
        ("lr_schedule: {name: step_decay, arguments: [0.01, 0.9]}",
         "peer.yaml:1: lr_schedule.arguments of step_decay are [learning_rate, lr_decay_rate, lr_decay_steps], got [0.01, 0.9]"),
        ("lr_schedule: {name: cosine_decay, arguments: [fast, 9]}",
         "peer.yaml:1: lr_schedule: learning_rate must be a number, got 'fast'"),
        ("fine_tune_type: grpo",
         "peer.yaml:1: fine_tune_type must be one of lora, dora, full, got 'grpo'; that is a command: `mlxlora grpo`"),
        ("training_mode: sft", "peer.yaml:1: training_mode: sft has no counterpart here: the command says it"),
        ("delta: 3", "peer.yaml:1: unknown key delta; did you mean data?"),
        ("optimizer_config: {adam: {bias_correction: false}}",
         "peer.yaml:1: optimizer_config.adam.bias_correction: False is not offered; it is always true here; remove it"),
        ("optimizer_config: {adam: {beta: 1}}", "peer.yaml:1: optimizer_config.adam.beta: 1 is not offered; remove it"),
        ("hf_dataset: [{path: a}, {path: b}]",
         "peer.yaml:1: hf_dataset takes one data set, {path: org/name, ...}; join several into one train.jsonl"),
        ("hf_dataset: {path: a, chosen_feature: good}",
         "peer.yaml:1: hf_dataset.chosen_feature is not offered; write such rows to train.jsonl and name its folder with data"),
        (
            "qat_enable: true\nqat_bits: 7",
            "peer.yaml:2: qat_bits: qat must be one of 2, 3, 4, 5, 6, 8, mxfp4, mxfp8, nvfp4, got '7'",
        ),
        ("train_mode: sft\ngradient_accumulation_step: 2",
         "peer.yaml:2: unknown key gradient_accumulation_step; did you mean gradient_accumulation_steps?"),
        ("group_size: 4", "peer.yaml:1: unknown key group_size; see --help for the options of this command"),
        ("fine_tune_type: lora\ntrain_type: dora", "peer.yaml:2: train_type is already set in line 1; remove one of them"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_one_line(tmp_path, text, message):
    assert refused(text, tmp_path) == message


def test_a_judge_is_a_model(tmp_path):
    assert refused("judge: human", tmp_path, "online-dpo") == "peer.yaml:1: judge: human is not offered; name a model, or rewards"
    message = "peer.yaml:1: judge_config: {'model': 'x'} has no counterpart here: the judge has a fixed prompt; remove it"
    assert refused("judge_config: {model: x}", tmp_path, "online-dpo") == message


def test_notes(tmp_path):
    text = "train_mode: sft\nload_in_8bits: true\nfuse: true\ngradient_accumulation_steps: 2\niters: 9\nuse_chat_template: true"
    _, notes = read(text, tmp_path, max_grad_norm=0.0)
    assert notes[0].split(":")[2].strip() == "fuse"
    assert (
        "iters are optimizer steps, not batches" in notes[1] and "clipped" not in notes[1] and "use_chat_template" not in notes[1]
    )
    assert notes[2].endswith("instead of mlx-lm-lora's: num_layers (-1), batch_size (1), scale (10.0)")
    assert read("iters: 3\nrank: 4", tmp_path)[1] == []


def rates(schedule, steps):
    return [float(schedule(mx.array(step))) for step in steps]


SCHEDULES = {
    "cosine_decay": [1e-3, 20, 1e-4],
    "linear_schedule": [1e-3, 1e-4, 20],
    "exponential_decay": [1e-3, 0.9],
    "step_decay": [1e-3, 0.5, 7],
}


def test_every_schedule_of_mlx_is_there():
    """`join_schedules` takes functions, which no file can name."""
    module = optim.schedulers
    found = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    assert found - {"join_schedules"} == SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_mlx(tmp_path, name, warmup):
    """Step for step, but for the peak, which lasts two steps there after a warm-up."""
    spec = {"name": name, "warmup": warmup, "warmup_init": 1e-5 * (warmup > 0), "arguments": SCHEDULES[name]}
    values, _ = read(yaml.safe_dump({"lr_schedule": spec}), tmp_path)
    ours = rates(learning_rate(settings.build(Training, values), 1000), range(40))
    theirs = rates(build_schedule(spec), range(41))
    assert ours == pytest.approx(theirs[:warmup] + theirs[warmup + (warmup > 0) :][: 40 - warmup], rel=1e-5)


@pytest.mark.parametrize(("shape", "expected"), [("exponential", [1.0, 0.1**0.5, 0.1, 0.1**1.5]), ("step", [1.0, 1.0, 0.1, 0.1])])
def test_schedules_take_the_whole_run(shape, expected):
    """A tenth is left at the end; from then on they go on falling, to `lr_end`."""
    schedule = learning_rate(Training(learning_rate=1.0, lr_schedule=shape), 10)
    assert rates(schedule, (0, 5, 10, 15)) == pytest.approx(expected)
    ended = learning_rate(Training(learning_rate=1.0, lr_schedule=shape, lr_end=0.5, lr_decay_steps=1), 10)
    assert rates(ended, (0, 1, 50)) == pytest.approx([1.0, 0.55, 0.5])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer": "adamw", "betas": (0.8, 0.9), "eps": 1e-6}, {"betas": [0.8, 0.9], "eps": 1e-6}),
        ({"optimizer": "lion", "betas": (0.8, 0.9)}, {"betas": [0.8, 0.9]}),
        ({"optimizer": "sgd", "momentum": 0.5}, {"momentum": 0.5}),
        ({"optimizer": "muon"}, {"momentum": 0.95}),
        ({}, {"betas": [0.9, 0.999], "eps": 1e-8}),
    ],
)
def test_hyperparameters_reach_the_optimizer(options, expected):
    optimizer = make_optimizer(Training(**options), 10)
    assert isinstance(optimizer, optim.Optimizer)
    assert {name: list(v) if isinstance(v := getattr(optimizer, name), list | tuple) else v for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd", "betas": (0.9, 0.99)}, "--betas has no effect on sgd; it belongs to adam, adamw, lion"),
        ({"betas": (0.9,)}, r"--betas must be two numbers in \[0, 1\), got \(0.9,\)"),
    ],
)
def test_hyperparameters_of_other_optimizers(options, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(Training(**options), 10)


REPLACED = ("--num-layers", 1, "--iters", 2, "--batch-size", 2, "--steps-per-eval", 0, "--val-batches", 1, "--max-seq-length", 64)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def losses(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("name", ["lora_config", "example_lora"])
def test_the_published_files_train(mlxlora, eager, folder, name):
    given = ("--model", starter.model_path(), "--data", starter.data_path("sft"), *REPLACED)
    done = mlxlora("sft", "-c", DATA / f"{name}.yaml", *given)
    assert done.code == 0, done.err
    assert "Different in mlxlora: Adam has bias correction" in done.out
    assert all(map(math.isfinite, losses(folder / "adapters")))
    config = json.loads((folder / "adapters" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]


REWARDS = """
from typing import Optional
from mlx_lm_lora.trainer.grpo_reward_functions import register_reward_function

@register_reward_function()
def exact_match_reward(prompts: list, completions: list, answer: list, types: Optional[list] = None) -> list[float]:
    return [2.0 if c.strip() == a.strip() else 0.0 for c, a in zip(completions, answer)]

@register_reward_function("custom_tag_match_reward")
def tags(prompts: list, completions: list, answer: list, types: Optional[list] = None) -> list[float]:
    return [float("<result>" in c) for c in completions]

@register_reward_function()
def format_adherence_reward(prompts: list, completions: list, answer: list, types: Optional[list] = None) -> list[float]:
    return [len(c) % 7 / 7 for c in completions]
"""


def test_the_published_grpo_file_trains(mlxlora, eager, folder):
    (folder / "custom_reward_functions.py").write_text(REWARDS)
    given = ("--model", starter.model_path(), "--data", starter.data_path("grpo"), "--max-completion-length", 4, "--group-size", 2)
    done = mlxlora("grpo", "-c", DATA / "grpo_config.yaml", *given, *REPLACED)
    assert done.code == 0, done.err
    assert all(map(math.isfinite, losses(folder / "adapters")))
    keys = json.loads((folder / "adapters" / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert keys[-3:] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], "bare names are paths, which mlx-lm reads"


def test_what_was_typed_for_the_peers(mlxlora, eager, folder):
    """Their flags, with the command's name in place of theirs."""
    places = ("--model", starter.model_path(), *REPLACED, "--val-batches", 0, "--adapter-path")
    one = ("--train", "--fine-tune-type", "lora", "--test-batches", 5, "--optimizer", "adamw", "--mask-prompt", "--seed", 1)
    done = mlxlora("sft", *places, "one", *one, "--data", starter.data_path("sft"), "--clear-cache-threshold", "1GB", "--quiet")
    assert done.code == 0 and "note" not in done.out, done.err
    two = ("--train", "--train-mode", "dpo", "--dpo-cpo-loss-type", "hinge", "--gradient-accumulation-steps", 1, "--fuse")
    done = mlxlora("dpo", *places, "two", *two, "--data", starter.data_path("dpo"))
    assert done.code == 0 and "note: --fuse: run `mlxlora fuse` afterwards" in done.out, done.err
    wrong = mlxlora("sft", "--train-mode", "grpo")
    assert (wrong.code, wrong.err) == (2, "mlxlora: error: --train-mode: train_mode is grpo; run `mlxlora grpo`\n")


def test_rows_of_a_hub_data_set(monkeypatch):
    """The splits that hf_dataset names, each asked of `datasets` as it is written."""
    import sys
    import types

    from mlxlora.data.rows import read_splits

    asked = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda *place, split: asked.append((*place, split)) or [{"text": split}]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = read_splits("org/name:en", {"train": "train[:10]", "valid": "train[-5:]"})
    assert asked == [("org/name", "en", "train[:10]"), ("org/name", "en", "train[-5:]")]
    assert {name: rows[0].fields for name, rows in found.items()} == {
        "train": {"text": "train[:10]"},
        "valid": {"text": "train[-5:]"},
    }
    monkeypatch.chdir(DATA)  # a data set without an organisation is no file, even if one is called like it
    read_splits("hf://datasets/example_lora.yaml:en", {"train": "train"})
    assert asked[-1] == ("example_lora.yaml", "en", "train")
    with pytest.raises(InputError, match=r"billsum: no such file; .* or a hub name like org/name or hf://datasets/name$"):
        read_splits("billsum", {"train": "train"})
    with pytest.raises(InputError, match=r"--train-split is for hub data sets, .* is a local one; leave it out"):
        read_splits(str(DATA / "lora_config.yaml"), {"train": "train[:10]"})


def test_the_data_set_of_the_published_file(monkeypatch, tmp_path):
    """Whose name, billsum, has no organisation."""
    import sys
    import types

    from mlxlora.data.sources import load_rows

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: [{"text": name, "summary": split}]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    values, _ = read((DATA / "lora_config_all.yaml").read_text(), tmp_path)
    rows = load_rows(settings.build(DataOptions, values), seed=0)
    assert {name: [row.fields for row in part] for name, part in rows.items()} == {
        "train": [{"text": "billsum", "summary": "train[:1000]"}],
        "valid": [{"text": "billsum", "summary": "train[-100:]"}],
    }
    assert rows["train"][0].location == "billsum[train]:1"


def table(peer):
    """Every key and flag of a peer, and what it is here."""
    lines = ["| there | here |", "| --- | --- |"]
    for name in sorted(peer.keys):
        lines.append(f"| `{name}` | {meaning(name, peer.keys[name])} |")
    return "\n".join(lines)


def meaning(name, key):
    option = key.option and ("the same" if key.option == name else f"`{key.option}`")
    location = f" (in {', '.join(key.modes)})" if key.modes and not key.text else ""
    fate = {"refused": "an error", "noted": "a note"}.get(key.fate)
    idle = [f"`{value}`" if value else "empty" for value in key.idle if value not in (None, False)]
    text = f"{fate}{f' unless it is {idle[0]}' if idle else ''}: {key.text}" if fate else key.text
    return "; ".join(part for part in (option and option + location, text) if part)


def write_tables():
    for peer in peers.PEERS:
        path = PAGES[peer.name]
        before, _ = path.read_text(encoding="utf-8").split("| there | here |")
        path.write_text(before + table(peer) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_tables()


@pytest.mark.parametrize("key", ["optim", "lr_scheduler_type"])
def test_a_mapping_in_place_of_a_name_is_refused(key, tmp_path):
    assert f"{key} {{'adamw': 1}} is not offered" in refused(f"model: m\n{key}: {{adamw: 1}}\nseed: 0\n", tmp_path)
