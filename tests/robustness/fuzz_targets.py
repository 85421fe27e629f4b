"""What fuzz.py calls, and with what: valid inputs of every target, and how they are made invalid."""

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mlxlora.errors import InputError
from tests.robustness.fuzz_checkpoints import checkpoints_target
from tests.robustness.fuzz_files import adapters_target, safetensors_target
from tests.robustness.fuzz_hostile import HOSTILE
from tests.robustness.fuzz_mutations import JSON, WEIRD, Target, mutated_bytes, mutated_json, mutated_value

# --- rows ---------------------------------------------------------------------------------------

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
ROWS: tuple[dict[str, Any], ...] = (
    {"messages": CHAT},
    {"messages": [*CHAT, {"role": "user", "content": "f?"}, CALL, {"role": "tool", "content": "3"}], "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"prompt": CHAT[:2], "completion": CHAT[2:]},
    {"text": "some text"},
    {"instruction": "a", "input": "b", "output": "c"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "preference_score": 0.5},
    {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": [{"role": "assistant", "content": "3"}], "tools": "[]"},
    {"chosen": CHAT, "rejected": [*CHAT[:2], {"role": "assistant", "content": "3"}]},
    {"prompt": "a", "completion": "b", "label": True},
    {"messages": CHAT, "label": False},
    {"prompt": "a", "answer": "b", "types": ["x"], "system": "s"},
    {"question": "a", "answer": "#### 2"},
)


def make_rows(rng: random.Random) -> tuple[str, bytes, int]:
    """(suffix, file, which method reads it)."""
    rows = [mutated_json(rng, rng.choice(ROWS)) for _ in range(rng.choice((1, 1, 2, 4)))]
    data, suffix = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(rows), ".jsonl"
    if rng.random() < 0.15:
        data, suffix = b"[" + b",".join(rows) + b"]", ".json"
    return suffix, mutated_bytes(rng, data) if rng.random() < 0.2 else data, rng.randrange(8)


@cache
def tokenizer() -> Any:
    from mlxlora import starter
    from mlxlora.config.options import ModelOptions
    from mlxlora.models.loading import load_tokenizer

    return load_tokenizer(ModelOptions(model=str(starter.model_path())))


@cache
def readers() -> tuple[Callable[..., Any], ...]:
    from mlxlora.config.options import RowOptions
    from mlxlora.data.labeled import judged_row
    from mlxlora.data.tokenize import preference_pair, prompt_example, supervised_example

    return (
        supervised_example,
        partial(supervised_example, mask_prompt=True),
        partial(supervised_example, use_chat_template=True, mask_prompt=True),
        preference_pair,
        partial(preference_pair, use_chat_template=True, train_prompt=True, max_seq_length=16, prompt_truncation="left"),
        partial(judged_row, data=RowOptions(data="x", max_seq_length=16)),
        prompt_example,
        partial(prompt_example, use_chat_template=True, system="s"),
    )


def call_rows(folder: Path, case: tuple[str, bytes, int]) -> None:
    from mlxlora.data.rows import read_rows
    from mlxlora.data.tokenize import tokenize_all

    suffix, data, which = case
    file = folder.parent / f"rows{suffix}"
    file.write_bytes(data)
    rows = read_rows(file)
    with contextlib.suppress(_NothingLeft):
        _kept(tokenize_all, rows, partial(readers()[which % 8], tokenizer=tokenizer()))


class _NothingLeft(Exception):
    """All rows were cut to nothing: a message about flags."""


def _kept(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except InputError as error:
        if str(error).startswith("none of the "):
            raise _NothingLeft from None
        raise


def rows_target() -> Target:
    objects = st.lists(
        JSON | st.fixed_dictionaries({"messages": st.lists(st.dictionaries(st.sampled_from(["role", "content"]), JSON))})
    )
    strategy = st.tuples(st.just(".json"), objects.map(lambda v: json.dumps(v).encode(errors="surrogatepass")), st.integers(0, 7))
    return Target(make_rows, strategy, call_rows)


# --- YAML ---------------------------------------------------------------------------------------

YAML = (
    "model: m\ndata: d\niters: 100\nlearning_rate: 1e-5\nlora_parameters:\n  rank: 8\n  scale: 20.0\n  dropout: 0.0\n",
    "model: m\ntrain: true\nfine_tune_type: lora\noptimizer: adamw\noptimizer_config:\n  adamw: {weight_decay: 0.1}\nseed: 0\n",
    "lr_schedule:\n  name: cosine_decay\n  warmup: 100\n  arguments: [1e-5, 1000, 1e-7]\nnum_layers: 16\nbatch_size: 4\n",
    "train_mode: dpo\nbeta: 0.1\ndpo_cpo_loss_type: sigmoid\nreference_model_path: null\ndelta: 50.0\n",
    "lora_keys: [self_attn.q_proj, self_attn.v_proj]\nrank_pattern: {q_proj: 16}\nrewards: [accuracy, 'f(a=1)']\n",
    "group-size: 4\nreward_weights: [1, 0.5]\nreward_functions: a,b\ntemperature: 0.8\nmax_completion_length: 512\n",
    "x: &a [1,1,1,1,1,1,1,1]\niters: &b [*a,*a,*a,*a,*a,*a]\nrank: &c [*b,*b,*b,*b,*b,*b]\n"
    "lora_keys: &d [*c,*c,*c,*c,*c,*c]\ndata: [*d,*d,*d,*d]\n",
    "&a model: m\nx: *a\nresume: yes\nquiet: !!bool true\nepochs: .5\n? key\n: value\n",
)


def make_yaml(rng: random.Random) -> tuple[bytes, int]:
    """(file, which method reads it)."""
    lines = [line for _ in range(rng.choice((1, 1, 2))) for line in rng.choice(YAML).splitlines(keepends=True)]
    if rng.random() < 0.3:
        rng.shuffle(lines)
    if rng.random() < 0.6:
        at = rng.randrange(len(lines))
        key = rng.choice((lines[at].partition(":")[0], *yaml_fields()))
        lines[at] = f"{key}: {json.dumps(rng.choice(WEIRD))}\n"
    text = "".join(lines).encode(errors="surrogatepass")
    if rng.random() < 0.3:
        return json.dumps(mutated_value(rng, rng.choice(parsed_yaml()), 0.1)).encode(), rng.randrange(len(methods()))
    return (mutated_bytes(rng, text) if rng.random() < 0.7 else text), rng.randrange(len(methods()))


@cache
def parsed_yaml() -> list[Any]:
    import yaml

    nested = {
        "hf_dataset": {"path": "a", "config": {"name": "b"}},
        "optimizer_config": {"adam": {"betas": [0.9, 0.9]}, "sgd": None},
    }
    return [*(yaml.safe_load(text) for text in YAML if "*a" not in text), nested]


@cache
def groups_of(command: str) -> tuple[type, ...]:
    from mlxlora.config import options as c

    own: dict[str, tuple[type, ...]] = {
        "sft": (c.DataOptions, c.SFTOptions),
        "dpo": (c.PairData, c.DPOOptions),
        "orpo": (c.PairData, c.ORPOOptions),
        "grpo": (c.PromptData, c.SamplingOptions, c.RewardOptions, c.GRPOOptions),
    }
    return (c.ModelOptions, c.AdapterOptions, c.Training, c.Output, *own[command])


@cache
def methods() -> tuple[tuple[str, dict[str, Any]], ...]:
    from mlxlora.config.config_file import fields_of

    return tuple((name, fields_of(*groups_of(name))) for name in ("sft", "dpo", "orpo", "grpo"))


@cache
def yaml_fields() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, fields in methods() for name in fields))


def call_yaml(folder: Path, case: tuple[bytes, int]) -> None:
    from mlxlora.config.config_file import Reading, build, read_config
    from mlxlora.methods import commands
    from mlxlora.reporting.history import read_settings

    file = folder.parent / "config.yaml"
    file.write_bytes(case[0])
    command, fields = methods()[case[1] % len(methods())]
    if len(case[0]) % 4 == 0:
        with contextlib.suppress(InputError):
            read_settings(file)
    values = read_config(file, Reading(fields, command, commands=commands()))
    for group in groups_of(command):
        build(group, values)


def yaml_target() -> Target:
    import yaml

    entries = st.dictionaries(st.sampled_from([*yaml_fields(), "lora_parameters", "lr_schedule", "optimizer_config", "x"]), JSON)
    text = entries.map(lambda v: yaml.safe_dump(v, allow_unicode=True).encode(errors="surrogatepass")) | st.binary(max_size=60)
    return Target(make_yaml, st.tuples(text, st.integers(0, 3)), call_yaml)


# --- chat templates -----------------------------------------------------------------------------

TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ ns.n }}",
    "{% macro show(x) %}{{ x | tojson(indent=2) }}{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}"
    "{{ strftime_now('%Y') }}",
)
PIECES = r"""
{% for i in range(99999) %}
{% endfor %}
{% for m in messages recursive %}
{{ loop(messages) }}
{% if 1 %}
{% endif %}
{{ messages|length }}
{{ messages[9].role }}
{{ x.y.z }}
{{ ''.__class__ }}
{{ messages.append(1) }}
{{ 1/0 }}
{{ 2 ** 99999999 }}
{{ 'a' * 9999 }}
{{ range(9)|list|sort }}
{{ [1]|sum('a') }}
{{ raise_exception('a\nb') }}
{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}
{% include 'x' %}
{% import 'os' as os %}
{% extends x %}
{{ self }}
{% set x = messages %}
{{ cycler(1, 2).next() }}
{{ lipsum() }}
{{ '%s' % 1 }}
{{ '{:>9999}'.format(1) }}
{{ none.a }}
{% generation %}
{% endgeneration %}
{% break %}
{{ m|tojson }}
{{ messages|map(attribute='__class__')|list }}
{{ dict(a=1)|xmlattr }}
{{ messages|random }}
{% filter upper %}
{% endfilter %}
{{ joiner }}
{#
#}
{%- -%}
{{ tools[0].function }}
{{ eos_token * 3 }}
{{ messages[0]['content'].encode() }}
{% call x() %}{% endcall %}
é
""".strip().splitlines()


def make_templates(rng: random.Random) -> tuple[str, int]:
    """(template, which conversation)."""
    text = rng.choice(TEMPLATES) if rng.random() < 0.7 else ""
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(PIECES) + text[at:]
    if rng.random() < 0.3:
        text = mutated_bytes(rng, text.encode()).decode(errors="replace")
    return text, rng.randrange(4)


def call_templates(folder: Path, case: tuple[str, int]) -> None:
    from mlxlora.data import chat_template as templates

    text, which = case
    wrapper, location = tokenizer(), f"{folder}/rows.jsonl:1"
    inner, kept = wrapper._tokenizer, wrapper._tokenizer.chat_template
    inner.chat_template, templates.RENDER_SECONDS = text, 1.0
    try:
        if which < 3:
            templates.render(
                wrapper,
                CHAT[which % 2 : 3],
                location,
                generation_prompt=which == 2,
                tools=[{"function": {"name": "f"}}] if which else None,
            )
        else:
            templates.assistant_turns(wrapper, CHAT, location)
    finally:
        inner.chat_template = kept


def templates_target() -> Target:
    texts = st.lists(st.sampled_from([*PIECES, *TEMPLATES]) | st.text(max_size=6), max_size=5).map("".join)
    return Target(make_templates, st.tuples(texts, st.integers(0, 3)), call_templates)


# --- rewards ------------------------------------------------------------------------------------


class _Odd:
    """An object whose methods raise."""

    def __len__(self) -> int:
        raise OSError("len")

    def __float__(self) -> float:
        raise RuntimeError("float\nof two lines")

    def __repr__(self) -> str:
        raise ValueError("repr")


class _OddList(list):
    """A list that cannot be walked."""

    def __iter__(self) -> Iterator[Any]:
        raise KeyError("iter")


class _OddArray:
    """Says that it becomes a list, and does not."""

    def tolist(self) -> Any:
        return _Odd()


def answers() -> list[Callable[[], Any]]:
    """What a reward may answer, made where it is asked."""
    import mlx.core as mx
    import numpy as np

    async def later() -> Any:
        return [1.0, 2.0]

    plain: list[Callable[[], Any]] = [lambda value=value: value for value in WEIRD]
    numbers = [
        [1.0, 2.0],
        [1, None],
        (True, False),
        [float("nan"), 0],
        [float("inf"), 1],
        [10**400, 1],
        ["1", 2],
        [b"1", 2],
        [[1], 2],
        [1j, 2],
    ]
    plain += [
        lambda value=value: value for value in (*numbers, [1e308, -1e308], {1, 2}, {1: 2}, range(2), "ab", b"ab", object(), 1 + 2j)
    ]
    made = [
        *(
            lambda: np.array([1.0, 2.0]),
            lambda: np.array([[1.0], [2.0]]),
            lambda: np.array(1.0),
            lambda: np.array(["a", None], object),
        ),
        *(lambda: [np.float32(1), np.int64(2)], lambda: mx.array([1.0, 2.0]), lambda: [mx.array(1.0), mx.array([1.0, 2.0])], later),
        *(lambda: iter([1, 2]), lambda: [_Odd(), 1.0], _Odd, lambda: _OddList([1.0, 2.0]), _OddArray, lambda: [1.0] * 10**5),
        *(
            partial(_raise, kind)
            for kind in (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, RecursionError, StopIteration)
        ),
        *(partial(_raise, kind) for kind in (MemoryError, AssertionError, InputError, UnicodeError, OSError)),
    ]
    return plain + made


def _raise(kind: type[BaseException]) -> Any:
    raise kind(*(("a\nb",) if kind is not SystemExit else (3,)))


REQUESTS = (
    "accuracy",
    "accuracy,repetition(ngram_size=4)",
    "think_format",
    "regex(pattern='a+')",
    "length(maximum=10)",
    "tag_count",
)


def make_rewards(rng: random.Random) -> tuple[str, Any]:
    """("answer", which) or ("request", text of --rewards)."""
    if rng.random() < 0.5:
        return "request", mutated_bytes(rng, rng.choice(REQUESTS).encode()).decode(errors="replace")
    return "answer", [rng.randrange(1000) for _ in range(rng.choice((1, 1, 2)))]


def call_rewards(folder: Path, case: tuple[str, Any]) -> None:
    from mlxlora.rollouts import rewards

    kind, value = case
    if kind == "request":
        rewards.load_rewards([value])
        return
    known = _answers()
    given_ = [rewards.NamedReward(f"r{i}", lambda prompts, _i=i, **_: known[_i % len(known)]()) for i in value]
    location = [f"{folder}/rows.jsonl:{n}" for n in (1, 2)]
    columns = {"prompts": ["a", "b"], "completions": ["c", "d"], "completion_ids": [[1], [2]]}
    found = rewards.call_rewards(given_, **columns, columns={"answer": ["1", "2"]}, locations=location, timeout=5.0)
    rewards.combine(found, [1.0] * len(given_))


_answers = cache(answers)


def rewards_target() -> Target:
    asked = st.tuples(st.just("answer"), st.lists(st.integers(0, 999), min_size=1, max_size=3))
    return Target(make_rewards, asked | st.tuples(st.just("request"), st.text(max_size=30)), call_rewards)


TARGETS: dict[str, Callable[[], Target]] = {
    "rows": rows_target,
    "yaml": yaml_target,
    "adapters": adapters_target,
    "safetensors": safetensors_target,
    "templates": templates_target,
    "rewards": rewards_target,
    **HOSTILE,
    "checkpoints": checkpoints_target,
}
