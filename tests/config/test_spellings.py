"""Command lines of TRL, mlx-lm and mlx-lm-lora's first release, as they were typed but for the command's name."""

import json
import shlex
import sys
import types
from pathlib import Path

import pytest
import yaml
from mlxlora_cli.nearest import nearest_command, nearest_flag, with_nearest

from mlxlora import starter
from mlxlora.config import config_file as settings
from mlxlora.config import mlx_lm_compat as peers
from mlxlora.config.trl_unused import UNUSED
from mlxlora.errors import InputError
from mlxlora.methods import METHODS
from tests.config.test_mlx_lm_compat import DATA, PAGES

TRL = yaml.safe_load((DATA / "trl.yaml").read_text(encoding="utf-8"))
OTHERWISE = {
    "lr_scheduler_type": ("lr_schedule", "cosine"),
    "optim": ("optimizer", "adamw"),
    "max_steps": ("iters", 50),
    "eval_steps": ("steps_per_eval", 9),
    "use_dora": ("train_type", "dora"),
    "load_in_4bit": ("quantize", "4"),
    "lora_alpha": ("scale", 1.0),
    "report_to": ("report_to", ["wandb"]),
    "rank_pattern": ("rank_pattern", ["q_proj=2"]),
    "alpha_pattern": ("alpha_pattern", ["q_proj=4"]),
    "loss_type": ("loss_type", "nll"),
}
LOSSES = {"dpo": "hinge", "cpo": "hinge", "kto": "kto", "grpo": "dapo", "online-dpo": "hinge"}


START = {"model_name_or_path": "m", "dataset_name": "d"}


@pytest.mark.parametrize("command", METHODS)
def test_every_name_of_trl(typed, command, tmp_path):
    """As a key and as a flag: it becomes its option, or is told about. Names go into one command line if their options differ."""
    options = settings.fields_of(*METHODS[command].kinds.kinds())
    for name, value in TRL.items():
        if peers.TRL.keys[name].fate == "refused":
            for arguments, _ in ways({name: value}, tmp_path):
                with pytest.raises(InputError, match=f"has no counterpart here: {peers.TRL.keys[name].text}"):
                    typed(command, *arguments)
    for values in lines(command):
        for arguments, told in ways(values, tmp_path):
            found, out = typed(command, *arguments)
            for name, value in told.items():
                key, (option, expected) = peers.TRL.keys[name], comes_to(name, value)
                if option in options and peers.applies(key, command):
                    assert said(found[option]) == said(expected), (name, found[option])
                elif key.fate == "noted":
                    assert f"{name}: {key.text}" in out or f"--{name.replace('_', '-')}: {key.text}" in out, name
            assert found["model"] == "m"


def comes_to(name, value):
    return (OTHERWISE[name][0], value) if name == "loss_type" else OTHERWISE.get(name, (peers.TRL.keys[name].option, value))


def lines(command):
    """The names that are not refused, in as few groups as leave every option to one name; a scale depends on the rank."""
    groups = []
    for name, value in TRL.items():
        value = LOSSES.get(command, value) if name == "loss_type" else value
        option = comes_to(name, value)[0] or name
        if peers.TRL.keys[name].fate != "refused":
            group = next((group for group in groups if option not in group and "scale" not in (option, *group)), None)
            if group is None:
                groups.append(group := {})
            group[option] = (name, value)
    return [dict(group.values()) for group in groups]


def ways(values, folder):
    """(arguments, what they say): the values as flags, but for tables, which have none, and all of them in a file."""
    (folder / "c.yaml").write_text(yaml.safe_dump(START | values))
    if flags := {name: value for name, value in values.items() if not isinstance(value, dict)}:
        yield [part for name, value in (START | flags).items() for part in flag_of(name, value)], flags
    yield ["-c", folder / "c.yaml"], values


def flag_of(name, value):
    return [f"--{name.replace('_', '-')}", *([] if peers.TRL.keys[name].switch else [str(value)])]


FIELDS = yaml.safe_load((DATA / "trl_fields.yaml").read_text(encoding="utf-8"))


def test_every_field_of_trl_has_its_place():
    """Those of its configurations, of transformers' and of PEFT's; CPO's `alpha` is an option of ours with another meaning."""
    missing = {name for fields in FIELDS.values() for name in fields} - peers.TRL.keys.keys()
    assert missing == {"alpha"}


def test_fields_without_an_option_are_told_of(typed, tmp_path):
    """All of them in one file, and as flags."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model_name_or_path": "m", "dataset_name": "d"} | dict.fromkeys(UNUSED, 77)))
    noted = [name for name, key in UNUSED.items() if key.fate == "noted"]
    _, out = typed("dpo", "-c", tmp_path / "c.yaml")
    assert not [name for name in noted if f": {name}: {UNUSED[name].text}" not in out]
    flags = [part for name, key in UNUSED.items() for part in (f"--{name.replace('_', '-')}", *([] if key.switch else ["77"]))]
    _, out = typed("dpo", "--model-name-or-path", "m", "--dataset-name", "d", *flags)
    assert not [name for name, key in UNUSED.items() if f"--{name.replace('_', '-')}: {key.text}" not in out]


def test_alpha_of_trl_is_another_loss(typed, tmp_path):
    start = "model_name_or_path: m\ndataset_name: d\n"
    (tmp_path / "c.yaml").write_text(f"{start}alpha: 0.5\n")
    with pytest.raises(
        InputError, match=r"alpha: 0.5 is AlphaPO's in TRL, which is not offered; the weight of the NLL is cpo_alpha"
    ):
        typed("cpo", "-c", tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(f"{start}cpo_alpha: 0.5\n")
    assert typed("cpo", "-c", tmp_path / "c.yaml")[0]["alpha"] == 0.5
    (tmp_path / "c.yaml").write_text(f"{start}alpha: 0.0\n")
    assert typed("cpo", "-c", tmp_path / "c.yaml")[0]["alpha"] == 1.0


def said(value):
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).lower() if not isinstance(value, dict) else value


def test_a_file_of_trl(typed, tmp_path):
    text = "model_name_or_path: m\ndataset_name: d\nlora_r: 16\nlora_alpha: 32\nper_device_train_batch_size: 2\nmax_steps: -1\n"
    (tmp_path / "c.yaml").write_text(text)
    options, out = typed("sft", "-c", tmp_path / "c.yaml", "--lr", "1e-4")
    assert (options["scale"], options["rank"], options["learning_rate"], options["iters"]) == (2.0, 16, 1e-4, 600)
    told = out.splitlines()
    assert told[0].endswith("is TRL's. Different in mlxlora: plain-text rows are wrapped in the chat template only with "
        "use_chat_template. More in docs/from-trl.md")  # fmt: skip
    assert told[1].startswith("note: not set, so they have mlxlora's defaults instead of TRL's: epochs (3), ")
    assert PAGES["TRL"].is_file()


def test_counts_of_grpo_are_told(typed):
    options, out = typed("grpo", "--model", "m", "--data", "d", "--per-device-train-batch-size", 8, "--num-generations", 4)
    assert options["batch_size"] == 4 and options["group_size"] == 4
    assert "in `grpo`, `online-dpo` and `gkd` it counts completions there" in out or "per_device_train_batch_size" in out


README = r"""
mlx_lm_lora.train \
    --model <path_to_model> \
    --train \
    --data <path_to_data> \
    --iters 600

mlx_lm_lora.train \
    --model <path_to_model> \
    --train \
    --data <path_to_data>

mlx_lm_lora.train \
    --model <path_to_model> \
    --train \
    --data <path_to_data> \
    --use-chat-template True \
    --mask-prompt

mlx_lm_lora.train \
 --model <path_to_model> \
 --train \
 --train-mode orpo \
 --data <path_to_data> \
 --beta 0.1

mlx_lm.lora \
    --model <path_to_model> \
    --train \
    --train-mode dpo \
    --data <path_to_data> \
    --beta 0.1

mlx_lm.lora \
    --model <path_to_model> \
    --train \
    --train-mode cpo \
    --data <path_to_data> \
    --beta 0.1

mlx_lm.lora \
    --model <path_to_model> \
    --train \
    --data <path_to_data> \
    --fine-tune-type grpo \
    --group-size 4

mlx_lm.lora \
    --model <path_to_model> \
    --train \
    --data <path_to_data> \
    --fine-tune-type grpo \
    --group-size 4 \
    --beta 0.1 \
    --epsilon 1e-4 \
    --max-completion-length 512 \
    --reference-model-path <optional_path_to_reference_model> \
    --temperature 1.0 \
    --reward-weights 1.0 1.0 \
    --use-chat-template False \
    --use-prompt False \
    --batch-size 4 \
    --learning-rate 1e-5 \
    --num-epochs 3

mlx_lm_lora.train \
    --model <path_to_model> \
    --adapter-path <path_to_adapters> \
    --data <path_to_data> \
    --test

mlx_lm.generate \
    --model <path_to_model> \
    --adapter-path <path_to_adapters> \
    --prompt "<your_model_prompt>"

mlx_lm_lora.fuse \
    --model <path_to_model> \
    --export-gguf

mlx_lm_lora.fuse --model <path_to_model>

mlx_lm_lora.train --help

mlx_lm_lora.train --config /path/to/config.yaml
"""
"""The command lines of the README of mlx-lm-lora's first release, but for the upload of a fused model."""
PLACES = {"path_to_model": "m", "path_to_data": "d", "optional_path_to_reference_model": "r", "path_to_adapters": "adapters"}


def commands_of_the_readme():
    """The README's lines with the command's name of mlxlora, and folders for its placeholders."""
    for text in README.replace("\\\n", "").strip().split("\n\n"):
        for place, folder in PLACES.items():
            text = text.replace(f"<{place}>", folder)
        name, *arguments = shlex.split(text)
        mode = next((mode for mode in ("orpo", "dpo", "cpo", "grpo") if mode in arguments), "sft")
        yield (
            name.partition(".")[2] if name.endswith((".generate", ".fuse")) else "eval" if "--test" in arguments else mode,
            *arguments,
        )


*TRAINED, EVALUATED, GENERATED, GGUF, FUSED, HELP, FILE = commands_of_the_readme()
SEED = [
    "sft --model m --train --data d --iters 600",
    "sft --model m --train --data d --fine-tune-type lora --use-chat-template True --mask-prompt",
    'sft --model m --data d --train --fine-tune-type full --lora-parameters \'{"rank": 4, "scale": 10.0, "dropout": 0.0}\'',
    "orpo --model m --train --data d --beta 0.1 --fine-tune-type orpo",
    "dpo --model m --train --data d --beta 0.1 --dpo-loss-type sigmoid --delta 50.0 --reference-model-path r",
    "cpo --model m --train --data d --beta 0.1 --dpo-loss-type hinge --delta 50.0",
    "grpo --model m --train --data d --fine-tune-type grpo --group-size 4 --use-chat-template True --use-prompt False "
    "--reward-weights 1.0 1.0 --rewards accuracy r1_int_reward_func --epsilon 0.0001 --max-completion-length 512 --temperature 1.0",
    "grpo --model m --train --data d --reward-weights '[1.0, -0.5]' --rewards accuracy,r1_int_reward_func",
]


@pytest.mark.parametrize("line", SEED)
def test_commands_of_the_seed(typed, line):
    command, *arguments = shlex.split(line)
    options, _ = typed(command, *arguments)
    assert options["model"] == "m" and options["data"] == "d"


ROWS = {
    "sft": {"messages": [{"role": "user", "content": "add 1 and 2."}, {"role": "assistant", "content": "3"}]},
    "grpo": {"prompt": "add 1 and 2.", "answer": "3"},
    **{name: {"prompt": "add 1 and 2.", "chosen": "3", "rejected": "4"} for name in ("dpo", "cpo", "orpo")},
}
SHORT = ("--iters", 1, "--batch-size", 2, "--val-batches", 0, "--answers", 0, "--num-layers", 1, "--quiet", "--adapter-path", "out")


@pytest.mark.parametrize("line", [*TRAINED[2:-1], *map(shlex.split, SEED[1:])], ids=lambda line: " ".join(line[:9]))
def test_commands_of_the_seed_train(line, mlxlora, eager, folders):
    """For one step; m, r and d are folders. The first is trained below."""
    command, *arguments = line
    folders(command)
    limit = ("--max-completion-length", 4) if command == "grpo" else ()
    done = mlxlora(command, *arguments, *SHORT, *limit)
    assert done.code == 0, done.err
    assert Path("out", "adapters.safetensors").is_file()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Makes m, r and d in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))

    def make(command):
        for name in ("m", "r"):
            (tmp_path / name).symlink_to(starter.model_path(), target_is_directory=True)
        (tmp_path / "d").mkdir()
        for split in ("train", "test"):
            (tmp_path / "d" / f"{split}.jsonl").write_text(4 * f"{json.dumps(ROWS[command])}\n")

    return make


def test_the_readme_of_the_seed_from_training_to_the_fused_model(mlxlora, eager, folders):
    """The second `fuse` replaces the folder with the GGUF file that the first wrote there."""
    folders("sft")
    done = [mlxlora(*TRAINED[0], *SHORT[:-1], "adapters"), mlxlora(*EVALUATED), mlxlora(*GENERATED, "--max-tokens", 2)]
    done += [mlxlora(*GGUF), mlxlora(*FUSED, "--overwrite")]
    assert [one.code for one in done] == [0, 0, 0, 0, 0], [one.err for one in done]
    assert done[1].out.startswith("loss ") and "fused/ggml-model-f16.gguf" in done[3].out
    assert not Path("fused", "ggml-model-f16.gguf").exists()


def test_the_readme_of_the_seed_is_understood(typed, mlxlora, tmp_path):
    for command, *arguments in TRAINED:
        assert typed(command, *arguments)[0]["model"] == "m"
    full = typed(*TRAINED[-1])[0]
    assert (full["reward_weights"], full["epsilon"], full["epochs"], full["use_prompt"]) == ([1.0, 1.0], 1e-4, 3.0, False)
    assert mlxlora(*HELP).code == 0
    (tmp_path / "config.yaml").write_text("model: m\ntrain: true\ntrain_mode: sft\ndata: d\n")
    assert typed(*FILE[:-1], tmp_path / "config.yaml")[0]["data"] == "d"


def test_weights_of_the_readme_need_as_many_rewards(mlxlora, folders):
    """Its last GRPO line has two weights and names no rewards; with five by default it stops in mlx-lm-lora too."""
    folders("grpo")
    done = mlxlora(*TRAINED[-1])
    message = "--reward-weights has 2 numbers for 1 rewards (accuracy); give one per name in --rewards\n"
    assert done.code == 2 and done.err == f"mlxlora: error: {message}"


def test_values_of_the_seed(typed):
    start = ("grpo", "--model", "m", "--data", "d")
    options, _ = typed(
        *start, "--use-chat-template", "True", "--use-prompt", "False", "--reward-weights", "1.0", "-0.5", "--rewards", "a", "b"
    )
    assert (options["use_chat_template"], options["use_prompt"]) == (True, False)
    assert (options["reward_weights"], options["rewards"]) == ([1.0, -0.5], ["a", "b"])
    options, _ = typed("sft", *start[1:], "--lora-parameters", "{rank: 4, alpha: 8, dropout: 0.1, keys: [q_proj, v_proj]}")
    assert (options["rank"], options["scale"], options["dropout"], options["lora_keys"]) == (4, 2.0, 0.1, ["q_proj", "v_proj"])
    assert typed("sft", *start[1:], "--shuffle", "False")[0]["shuffle"] is False
    assert typed("sft", *start[1:], "--project-name", "mine")[0]["project_name"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train",), "No such command 'train'; a method is a command: sft, dpo, "),
        (("lora",), "No such command 'lora'; it is `mlxlora sft`; see `mlxlora --help`"),
        (("xpo",), "No such command 'xpo'; it is `mlxlora online-dpo`; see `mlxlora --help`"),
        (("sft", "--batchsize", 3), "No such option: --batchsize; did you mean --batch-size?; see `mlxlora sft --help`"),
        (("dpo", "--loss-type", "sigmod"), "got 'sigmod'; did you mean sigmoid?"),
        (
            ("cpo", "--loss-type", "hing"),
            "'hing' is not one of 'sigmoid', 'hinge', 'ipo', 'dpop', 'simpo'; did you mean hinge?; see ",
        ),
        (("sft", "--lora-parameters", "[1]"), '--lora-parameters must be an object, such as {"rank": 8, "scale": 20.0}, got [1]'),
        (("sft", "--lora-parameters", "{ranks: 1}"), "--lora-parameters has no ranks; it has rank, scale, dropout, keys and alpha"),
        (("sft", "--lora-alpha", "x", "--model", "m", "--data", "d"), "lora_alpha must be a number, got x"),
    ],
)
def test_nearest_names(mlxlora, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = mlxlora(*arguments)
    assert done.code == 2 and message in done.err


def test_nearest_names_are_near():
    assert nearest_command("zzz", ["sft"]) == nearest_flag("--zzz", ["--rank"]) == ""
    assert with_nearest("--x must be one of a, b, got 'zzz'") == "--x must be one of a, b, got 'zzz'"


@pytest.mark.parametrize("command", [(), ("sft",), ("fuse",), ("generate",)])
def test_h_is_help(mlxlora, command):
    short, long = mlxlora(*command, "-h"), mlxlora(*command, "--help")
    assert short.code == 0 and short.out == long.out != ""


def test_generation_of_mlx_lm(mlxlora, model_folder):
    """Its flags, and a draft model: the same answer."""
    plain = mlxlora("generate", "--model", model_folder, "--prompt", "hi", "--max-tokens", 6)
    theirs = ("generate", "--model", model_folder, "-p", "hi", "-m", 6, "--temp", 0, "--ignore-chat-template", "--top-k", 9)
    assert mlxlora(*theirs, "--min-p", 0.1).out == plain.out != ""
    drafted = mlxlora(*theirs, "--draft-model", model_folder)
    assert drafted.out == plain.out, drafted.err
    config = mlxlora(*theirs, "--system-prompt", "be brief", "--chat-template-config", '{"enable_thinking": false}')
    assert config.code == 0, config.err


def test_fusing_of_mlx_lm(mlxlora, monkeypatch, tmp_path):
    seen = []
    module = sys.modules["mlxlora_cli.fuse"]  # the package has the command under this name
    monkeypatch.setattr(module, "ready", lambda hub: seen.append(hub.push_to_hub))
    monkeypatch.setattr(module, "upload", lambda *_: None)
    monkeypatch.setattr("mlxlora.adapters.prepare.base_of", lambda *_: None)
    monkeypatch.setattr("mlxlora.adapters.fuse.fuse", lambda *_, **how: seen.append(how["gguf"]))
    start = ("fuse", "--model", "m", "--save-path", "out")
    for more in (("--export-gguf",), ("--export-gguf", "--gguf-path", "x.gguf"), ("--gguf-path=y.gguf", "--upload-repo", "a/b")):
        assert mlxlora(*start, *more).code == 0
    assert seen == [None, "out/ggml-model-f16.gguf", None, "out/x.gguf", "a/b", "out/y.gguf"]


def test_the_project_reaches_the_tracker(monkeypatch, tmp_path):
    from mlxlora.reporting.trackers import Tracker

    projects = []
    fake = types.SimpleNamespace(init=lambda project, **_: projects.append(project), log=None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    for config in ({"project_name": "mine"}, {"project_name": None}):
        Tracker("wandb", tmp_path, print).start(config)
    assert projects == ["mine", "theirs"]
