"""Paths, links, configurations of models, numbers, text for terminals and foreign runs for fuzz.py."""

import copy
import io
import json
import os
import random
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mlxlora.errors import InputError, RunError, listed, plain, printable, quoted
from tests.robustness.fuzz_mutations import JSON, WEIRD, Target, mutated_bytes, mutated_json

# --- paths --------------------------------------------------------------------------------------

PARTS = ("a", "..", ".", "~", "~root", "~nobody-9", "x" * 229, "x" * 231, "\0", "\udcff", " ", "-", "--x", "é" * 120, "con", "a\nb")
STEMS = (
    "adapters",
    "/dev/null",
    "/dev/stdout",
    "/proc/self/mem",
    "/",
    "",
    "a/b/c",
    "../x",
    "~/x",
    "org/name",
    "hf://datasets/x",
    "C:\\x",
)


def make_paths(rng: random.Random) -> str:
    text = rng.choice(STEMS)
    for _ in range(rng.choice((0, 1, 1, 2, 5, 40))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(("/", "", "/")) + rng.choice(PARTS) + text[at:]
    return text


def call_paths(folder: Path, case: str) -> None:
    """A path is taken by the file system, and what is written there replaces nothing."""
    from mlxlora.reporting.card import portable
    from mlxlora.utils.folders import check_new_file, check_vacant
    from mlxlora.utils.paths import checked_path

    portable({"model": case, "system": case})
    path = checked_path(case, "--data")
    os.path.lexists(path)
    check_vacant(case, "--save-path", "fuse", overwrite=True)
    check_new_file(case, "--output", overwrite=False)


def paths_target() -> Target:
    parts = st.lists(st.sampled_from([*PARTS, *STEMS]) | st.text(max_size=8), max_size=6)
    return Target(make_paths, parts.map("/".join), call_paths)


# --- links --------------------------------------------------------------------------------------

SECRET = "a secret of the user"
LINKED = (
    "config.json",
    "chat_template.jinja",
    "adapters.safetensors",
    "metrics.jsonl",
    "checkpoints",
    ".x.tmp",
    "blobs",
    "models--a",
)
GOALS = (
    "../secret",
    "secret",
    "inner",
    "../model/inner",
    "/dev/null",
    "../model",
    "..",
    "config.json",
    "../blobs/0",
    "missing",
    "blobs/x",
)


def make_links(rng: random.Random) -> tuple[list[tuple[str, str]], str]:
    """(links by name, the name that is read)."""
    links = [(rng.choice(LINKED), rng.choice((*GOALS, *LINKED))) for _ in range(rng.choice((1, 1, 2, 3, 6)))]
    return links, rng.choice(links)[0]


def call_links(folder: Path, case: tuple[list[tuple[str, str]], str]) -> None:
    """What is read lies in the folder, and what is written too."""
    from mlxlora.training.run_files import check_names, clean, mark_run
    from mlxlora.utils.files import atomic_directory, atomic_file, sweep
    from mlxlora.utils.paths import check_links, within
    from mlxlora.utils.trust import came_with_model

    root = folder.parent / "links"
    shutil.rmtree(root, ignore_errors=True)
    model = root / "model"
    model.mkdir(parents=True)
    (root / "secret").write_text(SECRET)
    (model / "inner").write_text("{}")
    (model / "adapter_config.json").write_text("{}")
    for name, goal in case[0]:
        if not os.path.lexists(model / name):
            (model / name).symlink_to(goal)
    if not came_with_model(model / case[1]):
        raise AssertionError("a file beside adapters is trusted")
    with atomic_file(model / "x") as temporary:
        temporary.write_text("x")
    with atomic_directory(model / "y") as temporary:
        (temporary / "z").write_text("z")
    sweep(model, "*")
    file = within(model / case[1])
    if file.is_file() and not file.is_char_device() and SECRET in file.read_text():
        raise AssertionError("the secret was read")
    try:
        check_links(model, "--model m")
        check_names(model, resume=True)
        mark_run(model)
        clean(model)
    finally:
        if (root / "secret").read_text() != SECRET or sorted(os.listdir(root)) != ["model", "secret"]:  # noqa: PTH208
            raise AssertionError("something was written outside")


def links_target() -> Target:
    pairs = st.lists(st.tuples(st.sampled_from(LINKED), st.sampled_from([*GOALS, *LINKED])), min_size=1, max_size=6)
    return Target(
        make_links, pairs.flatmap(lambda links: st.tuples(st.just(links), st.sampled_from([n for n, _ in links]))), call_links
    )


# --- configurations of models -------------------------------------------------------------------

NUMBERS = (0, -1, 1, 2**31, 2**31 - 1, 2**63, 10**25, 0.5, 1e300, -1e-300, "x", "1", None, True, [1], [[1]], {}, {"a": 1})


@cache
def configurations() -> tuple[dict[str, Any], ...]:
    from mlxlora import starter

    llama = json.loads((starter.model_path() / "config.json").read_text())
    deep = {"model_type": "x", "text_config": llama, "vision_config": {"hidden_size": 8}, "rope_parameters": {"rope_theta": 1e4}}
    return llama, deep, {**llama, "eos_token_id": [1, 2], "rope_scaling": {"type": "linear", "factor": 2.0}}


def make_configurations(rng: random.Random) -> bytes:
    config = json.loads(json.dumps(rng.choice(configurations())))
    for _ in range(rng.choice((0, 1, 1, 2))):
        inner = config["text_config"] if isinstance(config.get("text_config"), dict) and rng.random() < 0.5 else config
        inner[rng.choice([*inner, "hidden_size"])] = copy.deepcopy(rng.choice(NUMBERS))
    return mutated_json(rng, config) if rng.random() < 0.5 else json.dumps(config).encode()


def call_configurations(folder: Path, case: bytes) -> None:
    """What is accepted can be built as a model, if it is a small one of mlx-lm."""
    from mlx_lm.models import llama

    from mlxlora.models.config_check import check_model_config

    file = folder.parent / "config.json"
    file.write_bytes(case)
    check_model_config(file, f"--model {folder}")
    try:
        config = json.loads(case.decode())  # as mlx-lm reads it: json.loads takes bytes that are no UTF-8
    except (ValueError, RecursionError):
        return
    if isinstance(config, dict) and config.get("model_type") == "llama" and _small(config):
        try:
            llama.Model(llama.ModelArgs.from_dict(config))
        except Exception as error:  # as the loader says it
            raise InputError(f"--model {folder}: cannot be loaded: {plain(str(error))}") from None


def _small(config: dict[str, Any]) -> bool:
    sizes = [value for value in config.values() if type(value) is int]
    return all(value <= 512 for value in sizes) and (config.get("num_hidden_layers") or 99) <= 8


def configurations_target() -> Target:
    names = st.sampled_from(sorted(configurations()[0]))
    changed = st.dictionaries(names, JSON | st.sampled_from(NUMBERS), max_size=3)
    return Target(
        make_configurations,
        st.builds(
            lambda base, more: json.dumps({**base, **more}).encode(errors="surrogatepass"),
            st.sampled_from(configurations()),
            changed,
        ),
        call_configurations,
    )


# --- numbers ------------------------------------------------------------------------------------


@cache
def options() -> list[tuple[type, Any]]:
    import attrs

    from mlxlora.methods import METHODS

    groups = dict.fromkeys(kind for method in METHODS.values() for kind in method.kinds.kinds())
    return [(group, field) for group in groups for field in attrs.fields(group)]


def make_numbers(rng: random.Random) -> tuple[int, Any]:
    """(which option, its value)."""
    value = rng.choice((*WEIRD, *NUMBERS, "1e400", "9" * 30, "-0", "1_0", "٣", "0x1", "q_proj=1e9", "q_proj=99999999999"))
    if rng.random() < 0.5:
        value = rng.choice(
            (rng.getrandbits(rng.choice((8, 31, 32, 63, 64, 100))), rng.uniform(-2, 2) * 10 ** rng.randint(-320, 300))
        )
    return rng.randrange(10**6), value


def call_numbers(folder: Path, case: tuple[int, Any]) -> None:
    """An option takes what MLX can hold."""
    from mlxlora.config.fields import LARGEST_FLOAT, LARGEST_INTEGER, LARGEST_SEED, dashed
    from mlxlora.config.method_options import build
    from mlxlora.config.values import coerce

    group, field = options()[case[0] % len(options())]
    if field.metadata.get("help") is None or "python" in str(field.metadata):
        return
    try:
        value = coerce(case[1], field.type)
    except ValueError as error:
        raise InputError(f"{dashed(field.name)} must be {error}, got {quoted(case[1])}") from None
    taken = getattr(build(group, {field.name: value}), field.name)
    most = LARGEST_SEED if field.name == "seed" else LARGEST_INTEGER if type(taken) is int else LARGEST_FLOAT
    if isinstance(taken, int | float) and not abs(taken) <= most:
        raise AssertionError(f"{field.name} took {taken}")


def numbers_target() -> Target:
    return Target(make_numbers, st.tuples(st.integers(0, 10**6), JSON), call_numbers)


# --- text for terminals -------------------------------------------------------------------------

OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SEQUENCES = (
    "\x1b[2J",
    "\x1b]0;t\x07",
    "\x9b31m",
    "\r",
    "\n",
    "\t",
    "\x08",
    "\u202e",
    "\u2066",
    "\ud800",
    "[bold]",
    "[/]",
    "\x1bP",
    "é€▁日",
)
ENCODINGS = ("utf-8", "latin-1", "ascii", "cp1252", "shift_jis", "utf-16")


def make_text(rng: random.Random) -> tuple[str, str]:
    """(text, encoding of the terminal)."""
    text = "".join(rng.choice((*SEQUENCES, chr(rng.randrange(0x3000)), "ab ")) for _ in range(rng.choice((1, 3, 10, 60))))
    return text, rng.choice(ENCODINGS)


def call_text(folder: Path, case: tuple[str, str]) -> None:
    """Whatever edge a text takes, no control character leaves, and the terminal can show it."""
    from rich.text import Text

    from mlxlora.reporting.terminal import Terminal
    from mlxlora.utils.console import SafeConsole
    from mlxlora.utils.output import json_line, one_line_of, showable

    text, encoding = case
    stream = type("Stream", (io.StringIO,), {"encoding": encoding})()
    console = SafeConsole(file=stream, highlight=False, width=40)
    console.print(Text(text), markup=False)
    terminal = Terminal(console=console)
    terminal.note(text, warning=True)
    terminal.record({"step": 1, "split": "train", "loss": 1.0, text: 2.0})
    terminal.finish({text: text})
    shown = [
        stream.getvalue(),
        one_line_of(text),
        json_line({text: text}),
        str(InputError(text)),
        str(RunError(listed([text, text]))),
    ]
    shown += [showable(printable(text), encoding), printable(plain(text))]
    for part in shown:
        if OBEYED.search(part):
            raise AssertionError(f"sent {OBEYED.search(part)!r}")
        showable(part, encoding).encode(encoding)
    if "\n" in one_line_of(text) + json_line(text) or json.loads(json_line(text)) != text:
        raise AssertionError("not one line")


def text_target() -> Target:
    return Target(make_text, st.tuples(st.text(max_size=60), st.sampled_from(ENCODINGS)), call_text)


# --- foreign runs -------------------------------------------------------------------------------

SETTINGS = (
    "model: org/name\ndata: /home/a/rows.jsonl\nmethod: sft\nrank: 8\nlora_keys: [q_proj]\nquantize: '4'\ntrain_type: dora\n",
    "method: grpo\nmodel: ../a/b\nrewards: [accuracy]\nreward_file: ~/x.py\nbeta: 0.1\n",
    "a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c]\n"
    "e: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nmodel: &m {<<: [*a]}\n",
    "model: 2020-01-01\ndata: !!binary aGk=\n1: 2\n? [a]\n: b\nmethod: !!set {a}\n",
)
METRICS = (
    {"step": 0, "split": "valid", "loss": 2.5, "perplexity": 12.0},
    {"step": 1, "split": "train", "loss": 2.0, "learning_rate": 1e-5, "tokens": 10, "rewards/accuracies": 0.5},
    {"step": 2, "split": "test", "loss": None, "reward": 1.0, "<b>": 3},
)
SAMPLES = ({"step": 1, "prompt": "a", "completion": "b", "reward": 1.0}, {"step": 2, "prompt": [{"role": "user", "content": "a"}]})


def make_runs(rng: random.Random) -> tuple[bytes, ...]:
    """(config.yaml, metrics.jsonl, samples.jsonl)."""
    config = rng.choice(SETTINGS).encode()
    if rng.random() < 0.5:
        config = (
            mutated_bytes(rng, config) if rng.random() < 0.5 else mutated_json(rng, {"model": "m", "data": "d", "method": "sft"})
        )
    lines = [b"\n".join(mutated_json(rng, rng.choice(rows)) for _ in range(rng.choice((1, 2, 4)))) for rows in (METRICS, SAMPLES)]
    return config, *lines


def call_runs(folder: Path, case: tuple[bytes, ...]) -> None:
    """A run from elsewhere becomes a page, a table and a card."""
    from mlxlora.methods import method_info
    from mlxlora.reporting.card import card, portable
    from mlxlora.reporting.history import past_run
    from mlxlora.reporting.html import comparison_page, differences, reached, run_page

    run = folder.parent / "run"
    run.mkdir(exist_ok=True)
    for name, content in zip(("config.yaml", "metrics.jsonl", "samples.jsonl"), case, strict=True):
        (run / name).write_bytes(content)
    record = past_run(run)
    reached([record, record])
    portable(differences([record, record]))
    text = card(record, method_info(record.config))
    if "<b>" in text or "/home/a" in text:
        raise AssertionError("the card has HTML or a path")
    if len(case[0]) % 8 == 0:  # pages are slow
        run_page(record, method_info(record.config))
        comparison_page([record, record])


def runs_target() -> Target:
    lines = st.lists(st.dictionaries(st.sampled_from(["step", "split", "loss", "x"]), JSON), max_size=3).map(
        lambda rows: b"\n".join(json.dumps(row).encode(errors="surrogatepass") for row in rows)
    )
    config = st.dictionaries(st.sampled_from(["model", "data", "method", "quantize", "rank"]), JSON)
    texts = config.map(lambda values: json.dumps(values).encode(errors="surrogatepass"))
    return Target(make_runs, st.tuples(texts, lines, lines), call_runs)


HOSTILE = {
    "paths": paths_target,
    "links": links_target,
    "models": configurations_target,
    "numbers": numbers_target,
    "text": text_target,
    "runs": runs_target,
}
