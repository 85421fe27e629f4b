"""The same model object again: it continues, or starts from the base with the same numbers as a model that is loaded anew."""

import mlx.core as mx
import numpy as np
import orjson
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load

import mlxlora as ml
from mlxlora.errors import InputError
from mlxlora.training.run_folder import read_settings

ROWS = [{"prompt": f"add {i}.", "completion": str(i + 2)} for i in range(8)]
PAIRS = [{"prompt": f"add {i}.", "chosen": str(i + 2), "rejected": "no"} for i in range(8)]
FAST = {"iters": 3, "batch_size": 2, "num_layers": 2, "quiet": True, "steps_per_report": 1, "answers": 0, "learning_rate": 1e-2}
KINDS = {
    "lora": {},
    "dora": {"train_type": "dora"},
    "embedding": {"lora_keys": ["q_proj", "embed_tokens"]},
    "patterns": {"rank_pattern": ["q_proj=2"], "alpha_pattern": ["v_proj=4"]},
    "pissa": {"init_lora_weights": "pissa"},
    "qat": {"qat": "8"},
    "checkpointed": {"grad_checkpoint": True, "neftune_noise_alpha": 5.0},
    "full": {"train_type": "full"},
}

pytestmark = pytest.mark.usefixtures("eager")


def sft(model, folder, **options):
    return ml.sft(model=model, adapter_path=folder, **FAST | {"data": ROWS} | options)


def arrays(folder):
    return {name: np.array(array) for name, array in mx.load(str(folder / "adapters.safetensors")).items()}  # type: ignore[union-attr]


def losses(folder):
    rows = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return [row["loss"] for row in rows]


def equal(a, b):
    return arrays(a).keys() == arrays(b).keys() and all(np.array_equal(arrays(a)[n], arrays(b)[n]) for n in arrays(a))


def looks(model):
    """Everything that a freshly loaded model can be told by."""
    frozen = sorted((path, sorted(module._no_grad)) for path, module in model.named_modules())
    kinds = sorted((path, type(module).__name__) for path, module in model.named_modules())
    return kinds, frozen, model.training, [name for name, _ in tree_flatten(model.trainable_parameters())]


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_gives_the_numbers_of_a_model_that_is_loaded_anew(model_folder, tmp_path, kind):
    model = ml.load(str(model_folder))
    sft(model, tmp_path / "before", **KINDS[kind])
    sft(model, tmp_path / "again", adapter="fresh", rank=4)
    sft(model_folder, tmp_path / "anew", rank=4)
    assert losses(tmp_path / "again") == losses(tmp_path / "anew")
    assert equal(tmp_path / "again", tmp_path / "anew")


@pytest.mark.parametrize("kind", KINDS)
def test_a_detached_model_is_as_it_was_loaded(model_folder, tmp_path, kind):
    plain, _ = mlx_lm_load(str(model_folder))
    model, tokenizer = ml.load(str(model_folder))
    sft((model, tokenizer), tmp_path / "a", **KINDS[kind])
    assert ml.detach(model) is model
    assert looks(model) == looks(plain)
    ours, theirs = dict(tree_flatten(model.parameters())), dict(tree_flatten(plain.parameters()))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.array_equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("kind", ["lora", "dora", "embedding", "patterns", "full"])
def test_continuing_equals_a_run_from_the_adapters_on_disk(model_folder, tmp_path, kind):
    model, how = ml.load(str(model_folder)), KINDS[kind]
    sft(model, tmp_path / "one", **how)
    sft(model, tmp_path / "two", **how)
    sft(model_folder, tmp_path / "file", resume_adapter_file=tmp_path / "one" / "adapters.safetensors", **how)
    assert equal(tmp_path / "two", tmp_path / "file") and losses(tmp_path / "two") == losses(tmp_path / "file")
    named = read_settings(tmp_path / "two" / "config.yaml")["model"]
    assert named == (None if kind == "full" else str(model_folder))


def test_sft_and_then_dpo_on_the_same_object(model_folder, tmp_path):
    """The reference is the policy as the second run starts, so its first loss is log 2."""
    model = ml.load(str(model_folder))
    sft(model, tmp_path / "sft", rank=4, num_layers=1)
    how = {name: value for name, value in FAST.items() if name != "num_layers"}
    done = ml.dpo(model=model, data=PAIRS, adapter_path=tmp_path / "dpo", **how)  # takes rank and layers over
    assert read_settings(tmp_path / "dpo" / "config.yaml")["rank"] == 4
    assert losses(tmp_path / "dpo")[0] == pytest.approx(np.log(2), abs=1e-6)
    how |= {"rank": 4, "num_layers": 1, "resume_adapter_file": tmp_path / "sft" / "adapters.safetensors"}
    again = ml.dpo(model=model_folder, data=PAIRS, adapter_path=tmp_path / "file", **how)
    assert losses(tmp_path / "dpo") == losses(tmp_path / "file")
    assert again.evaluate(PAIRS)["loss"] == done.evaluate(PAIRS)["loss"] < np.log(2)  # beside the file's adapters too


@pytest.mark.parametrize("anew", [False, True])
def test_a_resumed_run_compares_with_where_it_began(model_folder, tmp_path, anew):
    """With the adapters of the run before, which its folder has, and not with the base."""
    how = {"data": PAIRS, **FAST, "iters": 4}

    def started(name):
        model = ml.load(str(model_folder))
        sft(model, tmp_path / f"before {name}")
        return model

    ml.dpo(model=started("whole"), adapter_path=tmp_path / "whole", **how)
    run = ml.dpo(model=started("part"), adapter_path=tmp_path / "part", **how | {"iters": 2})
    run = ml.dpo(model=model_folder, adapter_path=tmp_path / "part", resume=True, **how) if anew else run.resume(iters=4)
    assert equal(tmp_path / "whole", tmp_path / "part")


def test_what_happened_is_told(model_folder, tmp_path, capsys):
    model = ml.load(str(model_folder))
    for name, adapter, told in (
        ("a", "continue", ""),
        ("b", "continue", "continues from there"),
        ("c", "fresh", "from the base ag"),
    ):
        ml.sft(model=model, data=ROWS, adapter_path=tmp_path / name, adapter=adapter, **{**FAST, "quiet": False})
        out = capsys.readouterr().out
        assert ("an earlier run trained this model: training" in out) == bool(told) and told in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 4},
            r"^the model's adapters do not fit these options: .* has shape .*; give the options of .* adapter='fresh' to",
        ),
        ({"train_type": "full"}, r"^--train-type full: the model has adapters, which are no weights of it; fuse them, or adapter="),
        ({"adapter": "old"}, r"^--adapter must be one of continue, fresh, got 'old'$"),
    ],
)
def test_adapters_that_cannot_be_continued(model_folder, tmp_path, options, message):
    model = ml.load(str(model_folder))
    sft(model, tmp_path / "a")
    with pytest.raises(InputError, match=message):
        sft(model, tmp_path / "b", **options)


def test_adapters_that_were_loaded_are_continued(model_folder, tmp_path):
    sft(model_folder, tmp_path / "one")
    sft(ml.load(str(model_folder), str(tmp_path / "one")), tmp_path / "two")
    sft(model_folder, tmp_path / "file", resume_adapter_file=tmp_path / "one")
    assert equal(tmp_path / "two", tmp_path / "file")


def test_what_is_no_model_has_no_way_back():
    with pytest.raises(InputError, match=r"^detach takes a model, such as the first of what load returns, got tuple \(1, 2\)$"):
        ml.detach((1, 2))  # type: ignore[arg-type]


def test_run_says_it_too(model_folder, tmp_path):
    model, tokenizer = ml.load(str(model_folder))
    training, how = ml.Training(iters=3, batch_size=2), {"quiet": True, "answers": 0}
    for name in ("a", "b"):
        ml.run(model, tokenizer, ml.nll(), ml.rows(ROWS), training, adapter="fresh", adapter_path=str(tmp_path / name), **how)
    assert equal(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match=r"^the model has adapters already; mlxlora.detach\(model\) takes them off$"):
        ml.prepare(model, ml.AdapterOptions())
