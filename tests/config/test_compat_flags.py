"""The flags of mlx-lm and mlx-lm-lora, typed on every command: each is taken, told about or refused as the table says."""

import mlx_lm.lora
import pytest
from mlxlora_cli import app
from typer.main import get_command

from mlxlora.config import config_file as settings
from mlxlora.config import mlx_lm_compat as peers
from mlxlora.errors import InputError
from mlxlora.rollouts.reward_functions import BUILT_IN
from tests.config.test_mlx_lm_compat import GROUPS, KEYS, LORA, flags_of

SPECIAL = {"model", "data", "config", "train", "train_mode", "delta", "alpha", "epochs", "qat_bits", "list_reward_functions"}
FLAGS = sorted({name for peer in (peers.MLX_LM_LORA, peers.MLX_LM) for name in peer.keys if peers.flag(name)} - SPECIAL)
WORDS = {
    "optimizer": "adamw",
    "train_type": "dora",
    "fine_tune_type": "dora",
    "sft_loss_type": "dft",
    "dpo_cpo_loss_type": "hinge",
    "grpo_loss_type": "dr_grpo",
    "importance_sampling_level": "sequence",
    "report_to": "wandb",
    "lr_schedule": "linear",
    "top_p": "0.5",
    "min_p": "0.5",
    "reward_functions": "length",
    "training_mode": "sft",
    "judge_config": "{model: m}",
}
FORMS = {"4bits": "4", "6bits": "6", "8bits": "8", "mxfp4": "mxfp4"}
COMES_TO = {
    "sft_loss_type": ("loss_type", "dft"),
    "wandb": ("report_to", "wandb"),
    "report_to": ("report_to", "wandb"),
    "lr_schedule": ("lr_schedule", "linear"),
    "qat_enable": ("qat", "8"),
    **{f"load_in_{name}": ("quantize", form) for name, form in FORMS.items()},
}
"""Of the flags that are no option as they stand: the option and its value."""

BUILT = get_command(app).commands
MODES = {"online-dpo": "online_dpo"}


@pytest.fixture
def typed(typed):
    """With a model and data."""
    return lambda command, *arguments: typed(command, "--model", "m", "--data", "d", *arguments)


def flag_of(name):
    return ["--" + name.replace("_", "-"), *([] if peers.flag(name).switch else [WORDS.get(name, "3")])]


def signed(command):
    return ["--train-mode", MODES.get(command, command)]


def test_switches_are_theirs():
    """A flag takes a value if it does there."""
    actions = mlx_lm.lora.build_parser()._actions
    theirs = {flag[2:].replace("-", "_") for a in actions if a.nargs == 0 for flag in a.option_strings if flag[:2] == "--"}
    assert theirs <= KEYS["mlx-lm"] | {"help"}
    switches = {*LORA["switches"], *theirs} - {"help"}
    flags = {name for name in (*LORA["flags"], *flags_of(mlx_lm.lora.build_parser())) if peers.flag(name)}
    assert {name for name in flags if peers.flag(name).switch} == switches
    own = {parameter.name: parameter.is_flag for parameter in BUILT["sft"].params}
    assert all(own[name] == (name in switches) for name in flags & own.keys()) and flags & own.keys()


@pytest.mark.parametrize("command", GROUPS)
def test_every_flag_of_the_table(typed, command):
    fields, defaults = settings.fields_of(*GROUPS[command]), settings.dump(*(group() for group in GROUPS[command]))
    for name in FLAGS:
        key, arguments = peers.find(name), flag_of(name)
        here = peers.applies(key, command)
        if key.fate == "refused" and here:
            with pytest.raises(InputError) as stopped:
                typed(command, *signed(command), *arguments)
            assert str(stopped.value).startswith(f"{arguments[0]}: ")
            assert str(stopped.value).endswith(f" has no counterpart here: {key.text}")
            continue
        options, out = typed(command, *signed(command), *arguments)
        option, value = COMES_TO.get(name, (key.option, key.switch or arguments[-1]))
        if option in fields and here:
            assert options[option] != defaults[option], f"{name} changes nothing"
            assert said(options[option]) == said(value), name
            assert "without effect" not in out
        elif key.option or not here:
            text = key.absent.get(command)
            assert f"note: {arguments[0]}: {text}\n" in out if text else f"note: without effect on this command: {name}\n" in out
        else:
            assert f"note: {arguments[0]}: {key.text}\n" in out


@pytest.mark.parametrize("command", GROUPS)
def test_options_of_other_commands(typed, command):
    """Without a flag that only a peer has, what the command has not is a mistake, not a habit."""
    fields = settings.fields_of(*GROUPS[command])
    refused = 0
    for name in FLAGS:
        key = peers.find(name)
        if key.option and key.option not in fields and not key.convert and not peers.peer_of([name]):
            if command in key.absent:
                assert key.absent[command] in typed(command, *flag_of(name))[1]
                continue
            with pytest.raises(InputError, match=rf"^No such option: {flag_of(name)[0]}; see `mlxlora {command} --help`$"):
                typed(command, *flag_of(name))
            refused += 1
    assert refused or command == "online-dpo"


DPO = ("--train", "--train-mode", "dpo", "--dpo-cpo-loss-type")


@pytest.mark.parametrize(
    ("command", "arguments", "expected", "moot"),
    [
        ("dpo", (*DPO, "hinge", "--delta", 50.0), {"loss_type": "hinge", "delta": None}, "delta"),
        ("dpo", (*DPO, "dpop", "--delta", 5), {"loss_type": "dpop", "delta": 5.0}, ""),
        ("dpo", ("--train-mode", "dpo", "--delta", 50), {"loss_type": "sigmoid", "delta": None}, "delta"),
        ("dpo", ("--loss-type", "hinge", "--delta", 2), {"loss_type": "hinge", "delta": 2.0}, ""),
        ("dpo", ("--train-mode", "dpo", "--loss-type", "hinge", "--delta", 2), {"loss_type": "hinge", "delta": 2.0}, ""),
        ("grpo", ("--grpo-loss-type", "grpo", "--delta", 50), {"delta": None}, "delta"),
        ("grpo", ("--delta", 50), {"delta": 50.0}, ""),
        ("sft", ("--qat-bits", 4), {"qat": None}, "qat_bits"),
        ("sft", ("--qat-bits", 4, "--qat-enable"), {"qat": "4"}, ""),
        ("sft", ("--load-in-4bits", "--epochs", 2, "--iters", 5), {"epochs": None, "iters": 5}, "epochs"),
        ("sft", ("--train", "--epochs", 2, "--iters", 5), {"epochs": 2.0, "iters": 5}, ""),
        ("online-dpo", ("--train-mode", "xpo", "--alpha", "1e-5"), {"xpo_alpha": 1e-5}, ""),
        ("online-dpo", ("--train-mode", "online_dpo", "--alpha", "1e-5"), {"xpo_alpha": 0.0}, "alpha"),
        ("cpo", ("--train-mode", "cpo", "--alpha", 0.5), {"alpha": 0.5}, ""),
        ("sft", ("--report-to", "none"), {"report_to": None}, ""),
    ],
)
def test_flags_settle_as_files_do(typed, command, arguments, expected, moot):
    options, out = typed(command, *arguments)
    assert expected == {name: options[name] for name in expected}
    assert (f"note: without effect here, as in mlx-lm-lora: {moot}\n" in out) == bool(moot)


@pytest.mark.parametrize(
    ("arguments", "delta"),
    [
        (("--dpo-cpo-loss-type", "hinge"), None),
        (("--loss-type", "hinge"), None),
        (("--gradient-accumulation-steps", 2), 7.0),
        (("--gradient-accumulation-steps", 2, "--delta", 9), 9.0),
    ],
)
def test_flags_over_a_file(typed, tmp_path, arguments, delta):
    """The file's delta is dpop's; flags may say that it is another loss."""
    path = tmp_path / "peer.yaml"
    path.write_text("train_mode: dpo\ndpo_cpo_loss_type: dpop\ndelta: 7.0\n")
    options, out = typed("dpo", "-c", path, *arguments)
    assert options["delta"] == delta
    assert out.count("Different in mlxlora") == 1 and f"{path} is mlx-lm-lora's" in out


def test_differences_are_told_for_flags_too(typed):
    told = typed("sft", "--fine-tune-type", "lora", "--optimizer", "adamw")[1].splitlines()
    assert told[0].startswith("note: --fine-tune-type is mlx-lm's. Different in mlxlora: Adam has bias correction; ")
    assert told[1:] == ["note: not set, so they have mlxlora's defaults instead of mlx-lm's: iters (1000), weight_decay (0.01)"]
    assert typed("sft", "--fine-tune-type", "lora", "--quiet")[1] == ""
    assert typed("sft", "--optimizer", "adamw")[1] == ""


def test_what_does_not_train_has_no_differences(mlxlora, tmp_path):
    path = tmp_path / "peer.yaml"
    path.write_text("train: true\n")
    assert "Different in mlxlora" not in mlxlora("eval", "-c", path, "--data", tmp_path / "none", "--model", "m").out


def test_one_rank_tells(typed, monkeypatch):
    monkeypatch.setattr("mlxlora_cli.layers.launched_rank", lambda: 1)
    assert typed("sft", "--train")[1] == ""


def test_rewards_are_listed(typed):
    options, out = typed("grpo", "--list-reward-functions")
    assert options is None and out.split() == sorted(BUILT_IN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sft", "--judge"), "--judge needs a value; see `mlxlora sft --help`"),
        (("sft", "--judge", "--fuse"), "--judge needs a value; see `mlxlora sft --help`"),
        (("sft", "--fuse=no"), "--fuse takes no value; see `mlxlora sft --help`"),
        (("sft", "--qat-bits=7", "--qat-enable"), "--qat-bits: qat must be one of 2, 3, 4, 5, 6, 8, mxfp4, mxfp8, nvfp4, got '7'"),
        (("sft", "--fine-tune-type", "dpo"),
         "--fine-tune-type must be one of lora, dora, full, got 'dpo'; that is a command: `mlxlora dpo`"),
        (("sft", "--train-type", "xpo"),
         "Invalid value for '--train-type': 'xpo' is not one of 'lora', 'dora', 'full'; that is a command: `mlxlora online-dpo`; "
         "see `mlxlora sft --help`"),
        (("sft", "--lr-schedule", "x"),
         "Invalid value for '--lr-schedule': 'x' is not one of 'constant', 'linear', 'cosine', 'exponential', 'step'; "
         "see `mlxlora sft --help`"),
        (("sft", "--train-mode", "ppo"),
         "--train-mode: train_mode ppo is not offered; there are sft, dpo, orpo, cpo, grpo, online_dpo, xpo"),
        (("online-dpo", "--judge", "human"), "--judge: judge: human is not offered; name a model, or rewards"),
    ],
)  # fmt: skip
def test_mistakes_in_flags_of_peers(mlxlora, arguments, message):
    done = mlxlora(*arguments)
    assert (done.code, done.err) == (2, f"mlxlora: error: {message}\n")


def test_other_commands_have_no_such_flags(mlxlora):
    assert "No such option: --fuse" in mlxlora("eval", "--fuse").err


def said(value):
    """Values of options as they would be typed: 3 and 3.0 and ["3"] are the same."""
    value = value[0] if isinstance(value, list) else value
    try:
        return str(float(value))
    except ValueError:
        return value
