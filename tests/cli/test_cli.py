"""The command line: what a run is told, in which order of precedence, and what a user's mistake looks like."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import attrs
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxlora_cli import app, main
from mlxlora_cli.flags import flags

import mlxlora
from mlxlora.config import config_file as layers
from mlxlora.config.fields import group, option
from mlxlora.config.options import AdapterOptions, DataOptions, ModelOptions, Output, SFTOptions, Training
from mlxlora.errors import InputError, RunError
from mlxlora.methods import Method

GROUPS = (ModelOptions, AdapterOptions, DataOptions, Training, Output, SFTOptions)
NAMED = ("--model", "m", "--data", "d")


def stub(monkeypatch, name, **members):
    module = types.ModuleType(f"mlxlora.{name}")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, f"mlxlora.{name}", module)
    monkeypatch.setattr(mlxlora, name, module, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """The groups that a method was called with, one tuple a call."""
    seen = []
    trains(monkeypatch, lambda _, *groups: seen.append(groups))
    return seen


def trains(monkeypatch, run):
    """Methods run this instead of training."""
    monkeypatch.setattr(Method, "__call__", run)


def run(monkeypatch, *arguments):
    """Exit code of `mlxlora ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["mlxlora", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def resolved(monkeypatch, calls, *arguments):
    assert run(monkeypatch, "sft", *arguments) == 0
    return layers.dump(*calls[-1])


def failed(monkeypatch, capsys, *arguments, code=2):
    """The one line that a mistake prints."""
    assert run(monkeypatch, *arguments) == code
    printed = capsys.readouterr().err
    assert printed.startswith("mlxlora: error: ") and printed.count("\n") == 1
    return printed.strip().removeprefix("mlxlora: error: ")


def config(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("command", [(), ("sft",), ("eval",), ("generate",), ("init",), ("fuse",), ("compare",), ("push",)])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys; sys.argv = ['mlxlora', *sys.argv[1:], '--help']\n"
        "from mlxlora_cli import main\n"
        "try: main()\nexcept SystemExit as stopped: assert stopped.code == 0\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy', 'torch'} & {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: mlxlora" in done.stdout


def test_version_and_module(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"mlxlora {mlxlora.__version__}\n"
    assert subprocess.run([sys.executable, "-m", "mlxlora_cli", "--version"], capture_output=True).returncode == 0


def test_the_method_gets_the_groups(monkeypatch, calls):
    resolved(monkeypatch, calls, *NAMED)
    assert tuple(map(type, calls[0])) == GROUPS


def test_defaults(monkeypatch, calls):
    expected = layers.dump(*(group() for group in GROUPS)) | {"model": "m", "data": "d"}
    assert resolved(monkeypatch, calls, *NAMED) == expected


def test_flag_over_file_over_default(monkeypatch, calls, tmp_path):
    path = config(tmp_path, "model: m\ndata: d\niters: 7\nbatch-size: 2\nshuffle: false\ntest: true\nlearning_rate: 1e-4\n")
    values = resolved(monkeypatch, calls, "-c", path, "--iters", 9, "--no-test")
    assert (values["iters"], values["batch_size"], values["shuffle"], values["test"]) == (9, 2, False, False)
    assert values["learning_rate"] == 1e-4 and values["rank"] == 8


def test_flag_equal_to_the_default_still_wins(monkeypatch, calls, tmp_path):
    path = config(tmp_path, "iters: 7\nshuffle: false\n")
    values = resolved(monkeypatch, calls, *NAMED, "--config", path, "--iters", 600, "--shuffle")
    assert (values["iters"], values["shuffle"]) == (600, True)


def test_null_is_the_default(monkeypatch, calls, tmp_path):
    path = config(tmp_path, "iters: null\nlora_keys:\nlr_schedule: ~\n")
    values = resolved(monkeypatch, calls, *NAMED, "-c", path)
    assert (values["iters"], values["lora_keys"], values["lr_schedule"]) == (600, None, "constant")


def test_empty_file(monkeypatch, calls, tmp_path):
    assert resolved(monkeypatch, calls, *NAMED, "-c", config(tmp_path, "# nothing\n"))["iters"] == 600


@pytest.mark.parametrize(
    "arguments",
    [("--lora-keys", "q,v"), ("--lora-keys", "q", "--lora-keys", "v"), ("--lora-keys", "q, v")],
)
def test_tuples_on_the_command_line(monkeypatch, calls, arguments):
    assert resolved(monkeypatch, calls, *NAMED, *arguments)["lora_keys"] == ["q", "v"]


@pytest.mark.parametrize("text", ["lora_keys: [q, v]", "lora_keys: q,v", "lora_parameters: {keys: [q, v]}"])
def test_tuples_in_a_file(monkeypatch, calls, tmp_path, text):
    assert resolved(monkeypatch, calls, *NAMED, "-c", config(tmp_path, text))["lora_keys"] == ["q", "v"]


def test_aliases(monkeypatch, calls, tmp_path):
    values = resolved(monkeypatch, calls, *NAMED, "--num-epochs", 2, "--fine-tune-type", "dora", "--train")
    assert (values["epochs"], values["train_type"]) == (2.0, "dora")
    text = "train: true\nfine_tune_type: full\nnum_epochs: 3\nlora_parameters: {rank: 4, scale: 10, dropout: 0.5}\n"
    values = resolved(monkeypatch, calls, *NAMED, "-c", config(tmp_path, text))
    assert [values[name] for name in ("train_type", "epochs", "rank", "scale", "dropout")] == ["full", 3.0, 4, 10.0, 0.5]


def test_alias_flag_over_file(monkeypatch, calls, tmp_path):
    assert resolved(monkeypatch, calls, *NAMED, "-c", config(tmp_path, "epochs: 3"), "--num-epochs", 2)["epochs"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iters: 5\nlerning_rate: 1e-5", ":2: unknown key lerning_rate; did you mean learning_rate?"),
        ("lora_parameters: {rnk: 3}", ":1: unknown key lora_parameters.rnk; did you mean lora_parameters.rank?"),
        ("zzz: 1", ":1: unknown key zzz; see --help for the options of this command"),
        ("iters: 10.5", ":1: iters must be a whole number, got 10.5"),
        ("iters: true", ":1: iters must be a whole number, got True"),
        ("batch-size: many", ":1: batch_size must be a whole number, got 'many'"),
        ("learning_rate: fast", ":1: learning_rate must be a number, got 'fast'"),
        ("shuffle: 1", ":1: shuffle must be true or false, got 1"),
        ("model: 7", ":1: model must be text (in quotes), got 7"),
        ("optimizer: [adam]", ":1: optimizer must be one of adam, adamw, sgd, adafactor, lion, muon, got ['adam']"),
        ("lora_keys: 3", ":1: lora_keys must be a list, got 3"),
        ("lora_keys: [3]", ":1: lora_keys must be a list, each text (in quotes), got [3]"),
        ("iters: 0", ":1: --iters must be >= 1, got 0"),
        ("epochs: 1\nnum-epochs: 2", ":2: num_epochs is already set in line 1; remove one of them"),
        ("iters: 1\niters: 1", ":2: iters is already set in line 1; remove one of them"),
        ("- iters", ":1: expected `key: value` lines, got ['iters']"),
        ("iters: [1", ":1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("? [a]\n: 1", ":1: a key must be text, got ['a']"),
    ],
)
def test_mistakes_in_a_file(monkeypatch, capsys, calls, tmp_path, text, message):
    path = config(tmp_path, text)
    assert failed(monkeypatch, capsys, "sft", *NAMED, "-c", path) == f"{path}{message}"
    assert not calls


def test_a_file_for_testing_alone(monkeypatch, capsys, calls, tmp_path):
    for text, folder in (("test: true\ntrain: false\nadapter_path: mine", "mine"), ("train: false", "adapters")):
        path = config(tmp_path, text)
        message = failed(monkeypatch, capsys, "sft", *NAMED, "-c", path)
        assert message.startswith(f"{path}:{text.count('test') + 1}: train must be true, got False; ")
        assert message.endswith(f"run `mlxlora eval --adapter-path {folder} --split test -c {path}`")
    assert "--adapter-path other --split" in failed(monkeypatch, capsys, "sft", "-c", path, "--adapter-path", "other")


@pytest.mark.parametrize("command", ["cpo", "gkd", "online-dpo"])
def test_the_file_of_a_run_of_another_method(monkeypatch, capsys, tmp_path, command):
    path = config(tmp_path, "method: sft\niters: 3\n")
    assert failed(monkeypatch, capsys, command, "-c", path) == f"{path}:1: method is sft; run `mlxlora sft -c {path}`"


def test_the_file_of_a_run(monkeypatch, calls, tmp_path):
    for method in ("sft", "null"):  # a run of Python code has no name
        assert resolved(monkeypatch, calls, *NAMED, "-c", config(tmp_path, f"method: {method}\niters: 3\n"))["iters"] == 3


def test_missing_file(monkeypatch, capsys):
    assert failed(monkeypatch, capsys, "sft", "-c", "nowhere.yaml").startswith("nowhere.yaml: No such file")


def test_mistakes_in_flags(monkeypatch, capsys, calls):
    assert failed(monkeypatch, capsys, "sft", *NAMED, "--iters", 0) == "--iters must be >= 1, got 0"
    assert "--model needs --data" in failed(monkeypatch, capsys, "sft", "--model", "m")
    assert "--data needs --model" in failed(monkeypatch, capsys, "sft", "--data", "d")
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(("--lerning-rate", "1"), "--learning-rate"), (("--iters", "x"), "--iters"), (("--optimizer", "x"), "adamw")],
)
def test_typer_reports_what_it_can_parse(monkeypatch, capsys, calls, arguments, hint):
    assert run(monkeypatch, "sft", *NAMED, *arguments) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(InputError("bad row"), 2), (RunError("loss is nan"), 1)])
def test_exit_codes(monkeypatch, capsys, error, code):
    trains(monkeypatch, raises(error))
    assert failed(monkeypatch, capsys, "sft", *NAMED, code=code) == str(error)


def test_interrupt_is_130(monkeypatch):
    trains(monkeypatch, raises(KeyboardInterrupt()))
    assert run(monkeypatch, "sft", *NAMED) == 130


def test_a_bug_keeps_its_traceback(monkeypatch):
    trains(monkeypatch, raises(ZeroDivisionError()))
    monkeypatch.setattr(sys, "argv", ["mlxlora", "sft", *NAMED])
    with pytest.raises(ZeroDivisionError):
        main()


def raises(error):
    def recipe(*_):
        raise error

    return recipe


@pytest.fixture
def starter(monkeypatch, tmp_path):
    defaults = tmp_path / "defaults.yaml"
    defaults.write_text("iters: 5\nrank: 3\nbatch_size: 2\n")
    stub(
        monkeypatch,
        "starter",
        model_path=lambda: Path("starter-model"),
        data_path=lambda mode: Path(f"starter-{mode}"),
        defaults=lambda mode: defaults,
    )


def test_starter(monkeypatch, capsys, calls, starter, tmp_path):
    values = resolved(monkeypatch, calls, "-c", config(tmp_path, "batch_size: 1\nrank: 2"), "--rank", 1)
    names = ("model", "data", "iters", "batch_size", "rank", "adapter_path")
    assert [values[name] for name in names] == ["starter-model", "starter-sft", 5, 1, 1, "adapters"]
    assert capsys.readouterr().out.count("starter") == 1


def test_eval_prints_metrics(monkeypatch, capsys, starter):
    seen = {}
    monkeypatch.setattr(
        "mlxlora.training.session.evaluate_split", lambda **given: seen.update(given) or {"loss": 1.25, "perplexity": 3.4903}
    )
    assert run(monkeypatch, "eval", "--split", "valid", "--mask-prompt") == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["loss 1.25", "perplexity 3.4903"]
    assert (seen["adapter_path"], seen["split"], seen["batch_size"]) == (None, "valid", 2)
    assert seen["data_options"] == DataOptions(data="starter-sft", mask_prompt=True)


@pytest.mark.parametrize(("method", "found"), [("sft", True), ("distill", True), ("dpo", False), ("null", False), ("[1]", False)])
def test_eval_takes_the_rows_of_the_adapters_run(monkeypatch, tmp_path, starter, method, found):
    """With the options that it read them with; not their model, which adapter_config.json names, and not pairs."""
    seen = {}
    monkeypatch.setattr("mlxlora.training.session.evaluate_split", lambda **given: seen.update(given) or {})
    (tmp_path / "config.yaml").write_text(
        f"method: {method}\nmodel: m\ndata: d\nbatch_size: 9\nmask_prompt: true\npacking: true\nseed: 3\n"
    )
    assert run(monkeypatch, "eval", "--adapter-path", tmp_path) == 0
    assert seen["data_options"] == (DataOptions(data="d", mask_prompt=True, packing=True) if found else DataOptions())
    assert (seen["model_options"], seen["batch_size"], seen["seed"]) == (ModelOptions(), 4, 3 if found else 0)
    assert run(monkeypatch, "eval", "--adapter-path", tmp_path, "--data", "other") == 0
    assert seen["data_options"] == DataOptions(data="other")
    (tmp_path / "config.yaml").write_text("{")  # nobody reads it where the rows are named
    assert run(monkeypatch, "eval", "--adapter-path", tmp_path, "--data", "other") == 0


def test_resolved_configuration_is_a_configuration(monkeypatch, calls, tmp_path):
    first = resolved(monkeypatch, calls, *NAMED, "--lora-keys", "q,v", "--learning-rate", "3e-7", "--no-shuffle")
    path = config(tmp_path, yaml.safe_dump(first))
    assert resolved(monkeypatch, calls, "-c", path) == first
    path.write_text(json.dumps(first))
    assert resolved(monkeypatch, calls, "-c", path) == first


@given(st.floats(1e-12, 1e3), st.integers(1, 10**9), st.lists(st.text("abc._", min_size=1), max_size=3))
@settings(deadline=None, max_examples=50)
def test_dump_and_read_are_inverse(tmp_path_factory, rate, iters, keys):
    groups = Training(learning_rate=rate, iters=iters), AdapterOptions(lora_keys=tuple(keys) or None)
    path = tmp_path_factory.mktemp("c") / "run.yaml"
    path.write_text(yaml.safe_dump(layers.dump(*groups)))
    values = layers.read_config(path, layers.Reading(layers.fields_of(Training, AdapterOptions)))
    assert tuple(layers.build(type(group), values) for group in groups) == groups


def test_names_stay_names_after_mlx_lm_changed_yaml(tmp_path):
    import mlx_lm.lora  # noqa: F401

    path = tmp_path / "run.yaml"
    path.write_text("lora_keys: [._, .__]\n")
    assert layers.read_config(path, layers.Reading(layers.fields_of(AdapterOptions)))["lora_keys"] == ("._", ".__")


def test_tuples_of_numbers(monkeypatch, capsys):
    @group("Weights")
    class Weights:
        """Weights"""

        reward_weights: tuple[float, ...] | None = option(None, "Weights.")

    seen = []
    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])
    app.command("weigh")(flags()(typed(Weights, seen)))
    assert run(monkeypatch, "weigh", "--reward-weights", "1,0.5") == 0
    assert attrs.astuple(seen[0]) == ((1.0, 0.5),)
    assert "--reward-weights must be a list, each a number, got '1,x'" in failed(
        monkeypatch, capsys, "weigh", "--reward-weights", "1,x"
    )


def typed(group, seen):
    def command(options):
        seen.append(options)

    command.__annotations__ = {"options": group, "return": None}
    return command


def test_every_option_has_help():
    assert all(field.metadata["help"] for field in layers.fields_of(*GROUPS).values())


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
    "eos_token_id": 999,
    "quantization": {"bits": 4, "group_size": 64},
}


def init(monkeypatch, tmp_path, tokenizer, *more, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ARCHITECTURE | changes))
    return ("init", "--config-file", path, "--tokenizer", tokenizer, "--output", tmp_path / "model", *more)


def test_init_writes_a_model_that_loads_and_generates(monkeypatch, capsys, tmp_path, tokenizer):
    import mlx.core as mx
    from mlx_lm import load

    arguments = init(monkeypatch, tmp_path, tokenizer, "--dtype", "bfloat16", "--seed", 3)
    assert run(monkeypatch, *arguments) == 0
    assert "parameters, bfloat16" in capsys.readouterr().out
    model, words, *_ = load(str(tmp_path / "model"))
    weight = model.layers[0].mlp.up_proj.weight
    assert weight.dtype == mx.bfloat16 and abs(weight.astype(mx.float32).square().mean().sqrt().item() - 0.02) < 1e-3
    assert words.eos_token_ids == {1}
    again = init(monkeypatch, tmp_path, tokenizer)
    assert "exists and is not empty" in failed(monkeypatch, capsys, *again)
    asked = ("generate", "--model", tmp_path / "model", "--max-tokens", 3, "--prompt")
    assert run(monkeypatch, *asked, "hello") == 0
    capsys.readouterr()
    assert run(monkeypatch, *asked, "hello", "--system", "x") == 0  # without a template: as rows are that `grpo --system` reads
    systematic = capsys.readouterr().out
    assert run(monkeypatch, *asked, "x\n\nhello") == 0
    assert systematic == capsys.readouterr().out
    assert "is empty; write a prompt" in failed(monkeypatch, capsys, *asked, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 3}, "vocab_size 3 is too small for --tokenizer"),
        ({"model_type": "nonesuch"}, "Model type nonesuch not supported"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_size": "wide"}, "config.json: "),
    ],
)
def test_init_mistakes(monkeypatch, capsys, tmp_path, tokenizer, changes, message):
    assert message in failed(monkeypatch, capsys, *init(monkeypatch, tmp_path, tokenizer, **changes))
    assert not (tmp_path / "model").exists()


def test_generate_mistakes(monkeypatch, capsys, tmp_path):
    assert "--prompt is missing" in failed(monkeypatch, capsys, "generate", "--model", "m")
    assert "no adapters there" in failed(monkeypatch, capsys, "generate", "--prompt", "x", "--adapter-path", tmp_path)


@pytest.mark.parametrize("switch", ["off", ""])
def test_fast_blas_never_raises(switch):
    code = (
        "import ctypes; from mlxlora.utils.blas import load_fast_blas\n"
        "def missing(*_, **__): raise OSError\n"
        "ctypes.CDLL = missing; print(load_fast_blas())"
    )
    environment = os.environ | {"MLXLORA_BLAS": switch}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "None", done.stderr
