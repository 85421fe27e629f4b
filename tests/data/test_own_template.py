"""--chat-template and --chat-template-args: in training, preview, rollouts, eval, generate and compare alike, and stored."""

import json

import orjson
import pytest

import mlxlora as ml
from mlxlora.errors import InputError
from mlxlora.training.run_folder import read_settings

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if not think %}<no>{% endif %}{% endif %}"
)
CHAT = [{"messages": [{"role": "user", "content": f"add {i}."}, {"role": "assistant", "content": str(i)}]} for i in range(8)]
PROMPTS = [{"prompt": row["messages"][:1], "answer": "1"} for row in CHAT]
SHORT = ("--iters", 2, "--batch-size", 2, "--num-layers", 1, "--quiet", "--answers", 0)


@pytest.fixture
def template(tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    return tmp_path / "mine.jinja"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "chat.jsonl").write_bytes(b"\n".join(map(orjson.dumps, CHAT)))
    return tmp_path / "chat.jsonl"


@pytest.fixture
def asked(monkeypatch):
    """The prompts that are answered, as text."""
    import importlib

    import mlx_lm

    from tests.support.tiny import byte_tokenizer

    seen = []

    def stream(model, tokenizer, prompt, *_, **__):
        seen.append(byte_tokenizer().decode(prompt))
        return iter(())

    monkeypatch.setattr(mlx_lm, "stream_generate", stream)
    monkeypatch.setattr(importlib.import_module("mlx_lm.generate"), "stream_generate", stream)
    return seen


def test_preview(mlxlora, model_folder, template, data):
    shown = mlxlora("preview", "--model", model_folder, "--data", data, "--json", "--num", 1, "--chat-template", template)
    assert json.loads(shown.out.splitlines()[0])["text"] == "[user]add 0.<|im_end|>[assistant]0<|im_end|>", shown.err
    none = mlxlora("preview", "--model", model_folder, "--data", data, "--json", "--num", 1)
    assert none.code == 2 and "messages need a chat template" in none.err


def test_a_run_stores_its_template_and_its_readers_use_it(mlxlora, model_folder, template, data, tmp_path, asked):
    run = tmp_path / "run"
    how = ("--chat-template", template, "--chat-template-args", '{"think": false}')
    done = mlxlora("sft", "--model", model_folder, "--data", data, "--mask-prompt", "--adapter-path", run, *SHORT, *how)
    assert done.code == 0, done.err
    assert read_settings(run / "config.yaml")["chat_template_args"] == {"think": False}
    assert (run / "chat_template.jinja").read_text() == TEMPLATE
    assert orjson.loads((run / "adapter_config.json").read_bytes())["chat_template_args"] == {"think": False}
    template.unlink()  # the adapters know it
    assert mlxlora("generate", "--adapter-path", run, "--prompt", "hi").code == 0
    assert mlxlora("generate", "--model", model_folder, "--adapter-path", run, "--prompt", "hi").code == 0
    args = ("--chat-template-args", '{"think": true}')
    assert mlxlora("generate", "--adapter-path", run, "--prompt", "hi", *args).code == 0
    assert asked == ["[user]hi<|im_end|>[assistant]<no>"] * 2 + ["[user]hi<|im_end|>[assistant]"]
    found = mlxlora("eval", "--model", model_folder, "--adapter-path", run, "--data", data, "--mask-prompt", "--split", "train")
    assert found.code == 0 and found.out.startswith("loss "), found.err


def test_compare(mlxlora, model_folder, template, data, tmp_path, monkeypatch):
    from mlxlora.data import prompts

    asked, real = [], prompts.record_prompt

    def noted(record, tokenizer, **how):
        found = real(record, tokenizer, **how)
        asked.append(tokenizer.decode(found.tokens.tolist()))
        return found

    monkeypatch.setattr(prompts, "record_prompt", noted)
    options = {"model": model_folder, "data": CHAT, "iters": 2, "batch_size": 2, "num_layers": 1, "quiet": True, "answers": 0}
    ml.sft(adapter_path=tmp_path / "run", chat_template=TEMPLATE, **options)
    asked.clear()
    assert mlxlora("compare", "--adapter-path", tmp_path / "run", "--data", data, "--num", 1).code == 0
    assert set(asked) == {"[user]add 0.<|im_end|>[assistant]<no>"}


def test_rollouts_and_rows_of_their_own(model_folder, tmp_path, monkeypatch):
    """A row's chat_template_kwargs win over those of the run."""
    from mlxlora.data.rows import Row
    from mlxlora.data.tokenize import prompt_example
    from mlxlora.models.loading import load_tokenizer

    options = ml.ModelOptions(model=model_folder, chat_template=TEMPLATE, chat_template_args={"think": True})
    tokenizer = load_tokenizer(options)
    rows = [PROMPTS[0], {**PROMPTS[0], "chat_template_kwargs": {"think": False}}]
    texts = [tokenizer.decode(prompt_example(Row(row, "rows", 1), tokenizer).tokens.tolist()) for row in rows]
    assert texts == ["[user]add 0.<|im_end|>[assistant]", "[user]add 0.<|im_end|>[assistant]<no>"]
    seen = []
    how = {"iters": 1, "batch_size": 2, "num_layers": 1, "quiet": True, "max_completion_length": 2, "steps_per_report": 1}
    reward = lambda prompts, completions: seen.extend(prompts) or [0.0] * len(prompts)  # noqa: E731
    ml.grpo(model=model_folder, data=PROMPTS, chat_template=TEMPLATE, rewards=[reward], adapter_path=tmp_path / "a", **how)
    assert seen and all(prompt[0]["role"] == "user" for prompt in seen)


def test_the_token_cache_knows_the_variables(model_folder):
    from mlxlora.data.token_cache import tokenizer_identity
    from mlxlora.models.loading import load_tokenizer

    found = {
        tokenizer_identity(load_tokenizer(ml.ModelOptions(model=model_folder, chat_template=TEMPLATE, chat_template_args=args)))
        for args in (None, {"think": True}, {"think": False})
    }
    assert len(found) == 3


def test_results_answer_with_it(model_folder, tmp_path, asked):
    options = {"iters": 1, "batch_size": 2, "num_layers": 1, "quiet": True, "answers": 0, "data": CHAT}
    run = ml.sft(model=model_folder, chat_template=TEMPLATE, adapter_path=tmp_path / "a", **options)
    run.save(tmp_path / "b")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": "none.jinja"}, r"^--chat-template none\.jinja: no such file; name a Jinja file"),
        ({"chat_template": "{{ messages "}, r"^--chat-template:1: is not Jinja: "),
        ({"chat_template": "{{ 2 ** 99 }}{{ messages }}"}, r"the model's chat template computes a power"),
    ],
)
def test_templates_that_are_none(model_folder, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        ml.sft(model=model_folder, data=CHAT, adapter_path=tmp_path / "a", iters=1, **options)


@pytest.mark.parametrize("text", ["x", "[1]", "{think: 1}"])
def test_arguments_that_are_no_object(mlxlora, text):
    done = mlxlora("sft", "--chat-template-args", text)
    expected = '--chat-template-args must be a JSON object, such as {"enable_thinking": false}, got '
    assert done.code == 2 and done.err == f"mlxlora: error: {expected}{text!r}\n"


def test_a_file_has_them_as_a_mapping(mlxlora, model_folder, template, data, tmp_path):
    (tmp_path / "c.yaml").write_text(f"chat_template: {template}\nchat_template_args:\n  think: true\n")
    where = ("--model", model_folder, "--data", data, "--adapter-path", tmp_path / "a")
    done = mlxlora("sft", "-c", tmp_path / "c.yaml", *where, *SHORT)
    assert done.code == 0 and read_settings(tmp_path / "a" / "config.yaml")["chat_template_args"] == {"think": True}, done.err
    again = mlxlora("sft", "--resume", "--adapter-path", tmp_path / "a", "--iters", 3, "--quiet")
    assert again.code == 0, again.err
