"""The folder of a run from somebody else: read within bounds, shown as text, and told to nobody with paths of this machine."""

import html.parser
import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxlora.adapters.files import CONFIG, WEIGHTS
from mlxlora.adapters.hub import stage
from mlxlora.config.config_file import Reading, read_config
from mlxlora.config.fields import PATHS
from mlxlora.config.method_options import fields_of
from mlxlora.config.options import DataOptions
from mlxlora.errors import InputError
from mlxlora.methods import method_info
from mlxlora.reporting.card import card, markdown, portable
from mlxlora.reporting.history import METRICS, SAMPLES, SETTINGS, past_run, read_record, read_settings
from mlxlora.reporting.html import comparison_page, differences, reached, run_page
from mlxlora.utils.parse import MOST_LEVELS, MOST_YAML, sound_records

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["step", "split", "loss", "reward", "prompt", "completion", "expected", "x"])
RECORDS = st.lists(
    st.dictionaries(NAMES, JSON | st.sampled_from([0, 1, 10**400, "train", "valid", "test", 1e308])) | JSON, max_size=5
)
OPTIONS = st.dictionaries(
    st.sampled_from(["model", "data", "method", "train_type", "quantize", "rank", "iters", "lora_keys", "x"]), JSON
)
FEW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(folder, config: Any = "", metrics=(), samples=()):
    folder.mkdir(exist_ok=True)
    (folder / SETTINGS).write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8")
    for name, rows in ((METRICS, metrics), (SAMPLES, samples)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@FEW
@given(config=OPTIONS, metrics=RECORDS, samples=RECORDS)
def test_any_run_is_reported_or_refused(config, metrics, samples, tmp_path):
    folder = written(tmp_path / "run", config, metrics, samples)
    try:
        record = past_run(folder)
    except InputError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return
    run_page(record, method_info(record.config))
    comparison_page([record, record])
    reached([record, record])
    portable(differences([record, record]))
    card(record, method_info(record.config))


# --- bounds -------------------------------------------------------------------------------------

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name}\n  <<: [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} {'[' * 30}*a{n - 1}{']' * 30}\n" for n in range(1, 60))
BOMBS = {
    "aliases": ALIASES,
    "merged aliases": MERGES,
    "levels by aliases": CHAIN,
    "levels": "a: " + "[" * (MOST_LEVELS + 2) + "]" * (MOST_LEVELS + 2),
    "many levels": "a: " + "[" * 5000,
    "itself": "a: &a [*a]",
    "size": "a: " + "x" * MOST_YAML,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_of_yaml(name, tmp_path, mlxlora):
    folder = written(tmp_path / "run", BOMBS[name], [{"step": 1, "split": "train", "loss": 1.0}])
    for read in (read_settings, lambda file: read_config(file, Reading(fields_of(DataOptions), strict=False))):
        with pytest.raises(InputError) as caught:
            read(folder / SETTINGS)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    outcome = mlxlora("report", folder)
    assert outcome.code == 2 and outcome.err.count("\n") == 1


def test_aliases_of_people_are_fine(tmp_path):
    folder = written(tmp_path / "run", "lora_keys: &k [q_proj, v_proj]\nrank_pattern: *k\n")
    assert read_settings(folder / SETTINGS) == {"lora_keys": ["q_proj", "v_proj"], "rank_pattern": ["q_proj", "v_proj"]}


def test_samples_are_text_or_messages(tmp_path):
    """A page shows the last message of a conversation, which must be one."""
    samples = [
        {"step": 1, "prompt": value, "completion": value} for value in (["a", 1], [[1]], [], {"a": 1}, [{"content": 3}], True)
    ]
    shown = read_record(written(tmp_path / "run", samples=samples)).samples
    assert [row["prompt"] for row in shown] == ["a, 1", "[[1]]", "", "{'a': 1}", "[{'content': 3}]", "True"]
    run_page(read_record(tmp_path / "run"))


@given(RECORDS)
def test_records_are_sound(records):
    for record in sound_records(records):
        assert type(record.get("step", 0)) is int and isinstance(record.get("split", ""), str)


# --- cards and pages ----------------------------------------------------------------------------

HTML = "<img src=x onerror=alert(1)><script>x</script>[a](javascript:x) `c` | d\n# e"


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)


def hostile_run(folder):
    config = dict.fromkeys(("model", "data", "method", "quantize", "train_type"), HTML) | {"rank": HTML, "lora_keys": [HTML]}
    rows = [{"step": step, "split": split, "loss": 1.0, HTML: 2.0} for split in ("train", "valid", "test") for step in (0, 1)]
    return read_record(written(folder, config, rows, [{"step": 1, "prompt": HTML, "completion": HTML}]))


def test_a_card_has_no_html_of_names(tmp_path):
    text = card(hostile_run(tmp_path / "run"))
    body = text.partition("\n---\n")[2]
    outside = "".join(part for number, part in enumerate(body.replace("\\`", "'").split("`")) if number % 2 == 0)
    assert not Tags(outside).found & {"img", "script"}
    assert "](javascript:" not in outside.replace("\\]", "") and "\n# e" not in body
    assert yaml.safe_load(text.split("---")[1] if text.startswith("---") else "")


def test_a_page_has_no_html_of_names(tmp_path):
    record = hostile_run(tmp_path / "run")
    for text in (run_page(record), comparison_page([record, record])):
        assert "img" not in Tags(text).found and "<script>x" not in text


@given(st.text(max_size=60))
def test_text_in_markdown_is_text(text):
    shown = markdown(text)
    assert not Tags(shown).found and "\n" not in shown and "<" not in shown


# --- paths --------------------------------------------------------------------------------------

SECRET = "alice"
PATHS_OF_USERS = ("/home/alice/x", "~/alice/x", "../alice/x", "work/alice/x/", "alice/rows.jsonl", "./alice/x.py:f", "C:\\alice\\x")


@pytest.mark.parametrize("path", PATHS_OF_USERS)
@pytest.mark.parametrize("name", sorted(PATHS))
def test_paths_are_names_only(path, name):
    told = json.dumps([portable({name: path}), portable({name: [path, path]}), portable({"nested": {name: path}})])
    assert SECRET not in told


def test_text_that_looks_like_a_path_stays():
    for text in ("/a b/c", "/think", "say a/b", "https://x.org/a/b"):
        assert portable({"system": text}) == {"system": text}
    assert portable({"model": "org/name", "data": "org/rows"}) == {"model": "org/name", "data": "org/rows"}


def test_what_is_pushed_names_no_user(tmp_path):
    folder, target = written(tmp_path / "run", dict.fromkeys(PATHS, "work/alice/x.jsonl")), tmp_path / "staged"
    target.mkdir()
    (folder / CONFIG).write_text(json.dumps({"model": "work/alice/model", "_name_or_path": "/home/alice/model"}))
    (folder / WEIGHTS).touch()
    stage(folder, target, (WEIGHTS, CONFIG, SETTINGS, METRICS, "README.md"))
    assert not [file.name for file in target.iterdir() if not file.is_symlink() and SECRET in file.read_text()]
