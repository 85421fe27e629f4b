"""Nothing that came with a model runs, writes elsewhere or takes forever; README's section on security in tests."""

import ast
import re
import shutil
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
import yaml

from mlxlora import starter
from mlxlora.config.options import ModelOptions
from mlxlora.data import chat_template as templates
from mlxlora.errors import InputError
from mlxlora.utils.safetensors import check_header
from mlxlora.utils.time_limit import TooLong, at_most
from mlxlora.utils.trust import came_with_model, check_config

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("mlxlora", "cli", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
NEW = ("--adapter-path", "out")
QUICK = ("--num-layers", 1, "--iters", 1, "--batch-size", 1, "--val-batches", 0, "--answers", 0, "--quiet")
EVIL = "from pathlib import Path\nPath(r'{marker}').write_text('ran')\n"

# --- the source: what is nowhere in it ----------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "requests", "urllib", "urllib3", "httpx"}
MODULES |= {"aiohttp", "http", "ftplib", "socket", "socketserver", "smtplib", "telnetlib", "xmlrpc", "pty"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "os.popen", "np.save"}
METHODS |= {
    "subprocess.getoutput",
    "os.execv",
    "os.execvp",
    "os.spawnv",
    "runpy.run_path",
    "runpy.run_module",
    "np.load",
    "mx.savez",
}
SPECIAL = {"allow_pickle", "shell"}

ALLOWED = {
    "benchmarks/scaling.py: import socket": "free port numbers for the ranks that it starts on this machine",
    "mlxlora/data/workers.py: import pickle": "over pipes, between a run and the worker processes that it starts itself",
    "mlxlora/distributed/watchdog.py: import socket": "a pair inside the process, through which a signal wakes a thread",
    "examples/picture.py: import pty": "a terminal for the command line whose picture it takes",
}
"""Exceptions, and why."""

LOADERS = {"load", "load_model", "load_tokenizer", "sharded_load", "pipeline_load", "load_adapters"}
LOADERS |= {"_download", "snapshot_download"}
MAY_LOAD = {
    "mlxlora/models/loading.py": "checks code and headers first",
    "mlxlora/rollouts/judges.py": "checks code and headers first",
    "mlxlora/adapters/prepare.py": "checks the header first",
    "mlxlora/models/initialize.py": "reads a tokenizer, without code",
    "mlxlora/adapters/peft.py": "its card shows from_pretrained to readers",
}
MAY_RUN = {"mlxlora/utils/user_code.py": "runs files that the command line names, and says so"}


def found(path):
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for what in suspicious(node):
            yield f"{name}: {what}"


def suspicious(node):
    if isinstance(node, ast.Import):
        yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in MODULES:
        yield f"import {node.module}"
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        yield from [called] if called in CALLS | METHODS else []
        for keyword in node.keywords:
            if keyword.arg in SPECIAL and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                yield f"{called}({keyword.arg}=...)"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_unpickles_evaluates_or_connects(path):
    assert not [line for line in found(path) if line not in ALLOWED]


def test_the_test_sees():
    lines = "import pickle\nfrom urllib.request import urlopen\neval('1')\nnp.load(f, allow_pickle=True)\nrun('x', shell=True)\n"
    seen = [what for node in ast.walk(ast.parse(lines)) for what in suspicious(node)]
    assert sorted(seen) == [
        "eval",
        "import pickle",
        "import urllib.request",
        "np.load",
        "np.load(allow_pickle=...)",
        "run(shell=...)",
    ]


def test_exceptions_are_there():
    assert {line for path in SOURCES for line in found(path)} == ALLOWED.keys()


def loads(path):
    """Names by which a file loads a model, a tokenizer or adapters from mlx-lm or transformers."""
    text = path.read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports if (node.module or "").startswith("mlx_lm") for alias in node.names}
    return (names & LOADERS) | ({"load"} if any(word in text for word in (".from_pretrained(", "mlx_lm.load")) else set())


def test_models_are_loaded_in_few_places():
    """Others go through models/loading.py."""
    package = (path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("mlxlora", "cli"))
    assert {path.relative_to(ROOT).as_posix() for path in package if loads(path)} == MAY_LOAD.keys()


def test_code_of_files_runs_in_one_place():
    words = re.compile(r"spec_from_file_location|exec_module|SourceFileLoader|runpy")
    assert {
        path.relative_to(ROOT).as_posix() for path in SOURCES if words.search(path.read_text(encoding="utf-8"))
    } == MAY_RUN.keys()


# --- code that comes with a model ---------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def ran(place):
    return place / "ran"


def changed(file, **entries):
    file.write_bytes(orjson.dumps({**orjson.loads(file.read_bytes()), **entries}))


@pytest.fixture
def with_model_code(place, ran):
    """A model folder whose config.json names a file to run."""
    shutil.copytree(starter.model_path(), place / "bad")
    body = "from mlx_lm.models.llama import Model, ModelArgs\n"
    (place / "bad" / "architecture.py").write_text(EVIL.format(marker=ran) + body)
    changed(place / "bad" / "config.json", model_file="architecture.py")
    return place / "bad"


@pytest.fixture
def with_tokenizer_code(place, ran):
    """A model folder whose tokenizer is a class of its own."""
    shutil.copytree(starter.model_path(), place / "bad")
    body = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (place / "bad" / "own.py").write_text(EVIL.format(marker=ran) + body)
    changed(place / "bad" / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    return place / "bad"


DATA = ("--data", starter.data_path("sft"))
PAIRS = ("--data", starter.data_path("dpo"))
PROMPTS = ("--data", starter.data_path("grpo"))
GOOD = ("--model", starter.model_path())
COMMANDS = {
    "sft": ("sft", "--model", "bad", *DATA, *QUICK, *NEW),
    "dry run": ("sft", "--model", "bad", *DATA, *QUICK, *NEW, "--dry-run"),
    "reference": ("dpo", *GOOD, "--reference-model-path", "bad", *PAIRS, *QUICK, *NEW),
    "online reference": ("grpo", *GOOD, "--reference-model-path", "bad", "--beta", 0.1, *PROMPTS, *QUICK, *NEW),
    "teacher": ("distill", *GOOD, "--teacher-model", "bad", *DATA, *QUICK, *NEW),
    "judge": ("online-dpo", *GOOD, "--judge-model", "bad", *PROMPTS, *QUICK, *NEW),
    "reward model": ("grpo", *GOOD, "--reward-model", "bad", *PROMPTS, *QUICK, *NEW),
    "preview": ("preview", "--model", "bad", *DATA),
    "eval": ("eval", "--model", "bad", *DATA, "--split", "valid"),
    "generate": ("generate", "--model", "bad", "--prompt", "Hi"),
    "compare": ("compare", "--model", "bad", "--adapter-path", "adapters", "--prompt", "Hi"),
    "fuse": ("fuse", "--model", "bad"),
    "export": ("export", "--model", "bad", "--peft", "out"),
    "import": ("import", "--model", "bad", "--peft", "peft", "--adapter-path", "out"),
    "init": ("init", "--config-file", "bad/config.json", "--tokenizer", "bad", "--output", "out"),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    import mlxlora as ml
    from mlxlora.adapters.peft import to_peft

    folder = tmp_path_factory.mktemp("adapters")
    quick = {"iters": 1, "batch_size": 1, "num_layers": 1, "val_batches": 0, "answers": 0, "quiet": True}
    model = str(starter.model_path())
    ml.sft(model=model, data=str(starter.data_path("sft")), adapter_path=str(folder / "adapters"), **quick)
    to_peft(ModelOptions(model=model), folder / "adapters", folder / "peft")
    return folder


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"init"}))
def test_code_of_a_model_is_refused(name, with_model_code, ran, adapters, mlxlora):
    shutil.copytree(adapters, with_model_code.parent, dirs_exist_ok=True)
    outcome = mlxlora(*COMMANDS[name])
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert "its config.json runs Python code of the model, architecture.py; " in outcome.err and "bad: " in outcome.err
    assert ("use a model without" if name == "reward model" else "--trust-remote-code") in outcome.err
    assert not ran.exists() and not Path("out").exists()


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"reward model"}))
def test_code_of_a_tokenizer_is_refused(name, with_tokenizer_code, ran, adapters, mlxlora):
    shutil.copytree(adapters, with_tokenizer_code.parent, dirs_exist_ok=True)
    outcome = mlxlora(*COMMANDS[name])
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert not ran.exists() and not Path("out").exists()
    if name != "init":
        assert "its tokenizer runs Python code of the model; read it, then allow it with --trust-remote-code" in outcome.err


def test_code_of_a_model_runs_when_allowed_and_is_named(with_model_code, ran, mlxlora):
    outcome = mlxlora("generate", "--model", "bad", "--prompt", "1 + 1 =", "--max-tokens", 2, "--trust-remote-code")
    assert outcome.code == 0 and ran.exists(), outcome
    assert "running Python code: bad/architecture.py (model_file of --model bad, allowed by --trust-remote-code)" in outcome.err


def test_code_of_a_tokenizer_runs_when_allowed_and_is_named(with_tokenizer_code, ran, mlxlora, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(ran.parent / "modules"))
    outcome = mlxlora("generate", "--model", "bad", "--prompt", "1 + 1 =", "--max-tokens", 2, "--trust-remote-code")
    assert outcome.code == 0 and ran.exists(), outcome
    assert "running Python code: {'AutoTokenizer': [None, 'own.Own']} (auto_map in tokenizer_config.json" in outcome.err


@pytest.mark.parametrize("file", ["../evil.py", "/etc/evil.py", 3, "absent.py"])
def test_model_file_is_a_file_of_the_folder(file, with_model_code, ran, mlxlora):
    (ran.parent / "evil.py").write_text(EVIL.format(marker=ran))
    changed(with_model_code / "config.json", model_file=file)
    outcome = mlxlora("generate", "--model", "bad", "--prompt", "Hi", "--trust-remote-code")
    assert outcome.code == 2 and "model_file in its config.json must name a Python file of the folder" in outcome.err
    assert not ran.exists()


# --- configurations that come with a model ------------------------------------------------------


@pytest.fixture
def downloaded(place):
    shutil.copytree(starter.model_path(), place / "model")
    return place / "model"


def config(folder, **options):
    (folder / "train.yaml").write_text(yaml.safe_dump(options))
    return folder / "train.yaml"


HOSTILE = {
    "reward_file": "rewards.py",
    "objective": "mine.py:objective",
    "trust_remote_code": True,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_configuration_beside_a_model_names_no_code(name, downloaded, ran, mlxlora):
    for file in ("rewards.py", "mine.py"):
        Path(file).write_text(EVIL.format(marker=ran))
    file = config(downloaded, **{name: HOSTILE[name]})
    outcome = mlxlora("grpo", "-c", file, "--model", "model", *PROMPTS, *QUICK)
    assert outcome.code == 2 and not ran.exists()
    told = f"{file}:1: {name} runs code, which a configuration beside a model or adapters may not; add --{name.replace('_', '-')}"
    assert told in outcome.err and "to the command line to allow it" in outcome.err


def test_the_users_own_configuration_names_code(place, ran, mlxlora):
    body = "def mine(completions, **_):\n    return [0.0 for _ in completions]\n"
    (place / "mine.py").write_text(EVIL.format(marker=ran) + body)
    file = config(place, reward_file="mine.py", rewards=["mine"])
    short = ("--max-completion-length", 2, "--group-size", 2, "--adapter-path", "out")
    outcome = mlxlora("grpo", "-c", file, *GOOD, *PROMPTS, *QUICK, *short, "--no-quiet")
    assert outcome.code == 0 and ran.exists(), outcome
    assert "runs your Python code: mine.py (--reward-file)" in outcome.out
    ran.unlink()
    resume = ("grpo", "--adapter-path", "out", "--resume", "--iters", 2)
    outcome = mlxlora(*resume)
    assert outcome.code == 2 and not ran.exists()
    assert "reward_file runs code, which a configuration that a run stored may not; add --reward-file mine.py to" in outcome.err
    outcome = mlxlora(*resume, "--reward-file", "mine.py")
    assert outcome.code == 0 and ran.exists(), outcome


def test_a_downloaded_run_is_resumed_without_its_code_and_in_its_place(place, ran, mlxlora):
    """A run's folder from elsewhere: config.yaml says where it was, and what it ran."""
    (place / "theirs").mkdir()
    for entry in ({"objective": "mine.py:x"}, {"trust_remote_code": True}):
        (place / "theirs" / "config.yaml").write_text(yaml.safe_dump(entry))
        outcome = mlxlora("sft", "--adapter-path", "theirs", "--resume", *GOOD, *DATA)
        assert outcome.code == 2 and "theirs/config.yaml:1: " in outcome.err and "runs code" in outcome.err
    (place / "theirs" / "config.yaml").write_text("adapter_path: elsewhere\n")
    assert mlxlora("sft", "--adapter-path", "theirs", "--resume", *GOOD, *DATA, *QUICK).code == 0
    assert not (place / "elsewhere").exists() and (place / "theirs" / "adapters.safetensors").exists()


@pytest.mark.parametrize("path", ["../out", "/tmp/mlxlora-out", "model/../out", "out"])
def test_a_configuration_beside_a_model_writes_beside_it(path, downloaded, mlxlora):
    file = config(downloaded, adapter_path=path)
    outcome = mlxlora("sft", "-c", file, "--model", "model", *DATA, *QUICK)
    assert outcome.code == 2 and f"adapter_path {path} points outside {downloaded}" in outcome.err
    assert not Path("out").exists() and not Path(path).exists()


def test_a_configuration_beside_a_model_may_write_there_and_where_told(downloaded, mlxlora):
    config(downloaded, adapter_path="model/run")
    assert mlxlora("sft", "-c", "model/train.yaml", "--model", "model", *DATA, *QUICK).code == 0
    config(downloaded, adapter_path="../out")
    assert mlxlora("sft", "-c", "model/train.yaml", "--model", "model", *DATA, *QUICK, "--adapter-path", "out").code == 0


def test_a_configuration_beside_adapters_uploads_nothing(place):
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="push_to_hub uploads, which a configuration beside a model or adapters may not"):
        check_config(place / "x.yaml", {"push_to_hub": "a/b"}, (), {})
    check_config(place / "x.yaml", {"push_to_hub": "a/b"}, ("push_to_hub",), {})


@pytest.mark.parametrize(
    ("marker", "file", "found"),
    [
        ("adapter_config.json", "x.yaml", True),
        ("model-00001-of-00002.safetensors", "configs/x.yaml", True),
        ("config.json", "x.yaml", True),
        ("config.json", "configs/x.yaml", False),
        ("adapters/adapters.safetensors", "x.yaml", False),
        ("package.json", "x.yaml", False),
    ],
)
def test_what_came_with_a_model(marker, file, found, tmp_path):
    (tmp_path / marker).parent.mkdir(exist_ok=True)
    (tmp_path / marker).touch()
    assert came_with_model(tmp_path / file) is found


# --- chat templates -----------------------------------------------------------------------------

ROUNDS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "attributes": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
    "attributes by filter": ("{{ (''|attr('__class__')).__mro__ }}", "rejects this conversation"),
    "attributes by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "access to attribute '__class__'"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "access to attribute '__globals__'"),
    "internals": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "rejects this conversation"),
    "change of messages": ("{{ messages.append(1) }}", "rejects this conversation"),
    "a file": ("{% include '/etc/passwd' %}", "rejects this conversation"),
    "an exception": ("{{ raise_exception('no\nsuch\nrole') }}", "rejects this conversation: no such role"),
    "a long range": ("{% for i in range(10 * 1000 * 1000) %}{% endfor %}", "rejects this conversation: Range too big"),
    "no end": (ROUNDS, "timed out after 0.5 s"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "rejects this conversation: maximum recursion depth"),
    "a power": ("{{ 10 ** 10 ** 9 }}", "computes a power"),
    "syntax": ("{% if %}", "rejects this conversation"),
}


@pytest.fixture(scope="module")
def tokenizer():
    from mlxlora.models.loading import load_tokenizer

    return load_tokenizer(ModelOptions(model=str(starter.model_path())))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("threaded", [False, True], ids=["main thread", "another thread"])
def test_templates_are_held(name, threaded, tokenizer, monkeypatch):
    template, told = TEMPLATES[name]
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.5 if name == "no end" else 20.0)  # a busy machine recurses slowly
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    caught = []

    def render():
        try:
            templates.render(tokenizer, [{"role": "user", "content": "Hi"}], "rows.jsonl:3")
        except InputError as error:
            caught.append(str(error))

    began = time.monotonic()
    if threaded:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join(30)
    else:
        render()
    assert time.monotonic() - began < 20
    assert caught and caught[0].startswith("rows.jsonl:3: the model's chat template ") and told in caught[0]
    assert "\n" not in caught[0] and "root:" not in caught[0]


def test_stars_in_a_text_are_no_power(tokenizer, monkeypatch):
    template = "**{{ messages[0].content }}**{# 2 ** 3 #}{{ '2 ** 3' }}"
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    ids = templates.render(tokenizer, [{"role": "user", "content": "1"}], "rows.jsonl:3")
    assert tokenizer.decode(ids).replace(" ", "") == "**1**2**3"


def test_a_limit_of_time_strikes_only_within():
    for _ in range(50):
        with at_most(0.001):
            pass
    with pytest.raises(TooLong), at_most(0.01):
        while True:
            pass
    with pytest.raises(TooLong), at_most(0.01):
        with suppress(TooLong):  # as a destructor does
            while True:
                pass
        while True:
            pass
    with at_most(5.0):
        began = time.monotonic()
        while time.monotonic() < began + 0.6:
            pass


# --- safetensors --------------------------------------------------------------------------------


def written(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else orjson.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "no header": (b"", b"", 0),
    "longer than the file": ({}, b"", 10**6),
    "absurdly long": ({}, b"", 2**63),
    "no JSON": (b"{]", b"", None),
    "no object": ([1], b"", None),
    "deep": (b"[" * 10**5, b"", None),
    "no type": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), None),
    "an unknown type": ({"a": tensor([1], 0, 4, "F99")}, bytes(4), None),
    "a negative dimension": ({"a": tensor([-1], 0, 4)}, bytes(4), None),
    "sizes that overflow": ({"a": tensor([2**33, 2**31], 0, 0)}, b"", None),
    "a dimension too large": ({"a": tensor([0, 2**40], 0, 0)}, b"", None),
    "shape and place": ({"a": tensor([3], 0, 4)}, bytes(4), None),
    "behind the end": ({"a": tensor([1], 0, 4)}, b"", None),
    "before the start": ({"a": tensor([1], -4, 0)}, bytes(4), None),
    "backwards": ({"a": tensor([1], 4, 0)}, bytes(4), None),
    "overlap": ({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, bytes(4), None),
    "a hole": ({"a": tensor([1], 4, 8)}, bytes(8), None),
    "more at the end": ({"a": tensor([1], 0, 4)}, bytes(9), None),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_headers_are_refused(name, tmp_path):
    with pytest.raises(InputError) as caught:
        check_header(written(tmp_path / "x.safetensors", *HEADERS[name]))
    assert str(caught.value).startswith(f"{tmp_path / 'x.safetensors'}: ") and "\n" not in str(caught.value)


def test_a_good_header_passes(tmp_path):
    check_header(written(tmp_path / "x.safetensors", {"a": tensor([1], 0, 4), "b": tensor([], 4, 8)}, bytes(8)))


def test_adapters_that_name_nonsense(place, adapters, mlxlora):
    shutil.copytree(adapters, place, dirs_exist_ok=True)
    changed(place / "adapters" / "adapter_config.json", model=["a"])
    outcome = mlxlora("generate", "--adapter-path", "adapters", "--prompt", "Hi")
    assert outcome.code == 2 and "adapters/adapter_config.json: model must be text, got ['a']" in outcome.err
    changed(place / "peft" / "adapter_config.json", base_model_name_or_path=3)
    outcome = mlxlora("import", "--peft", "peft", "--adapter-path", "out")
    assert outcome.code == 2 and "base_model_name_or_path in its adapter_config.json must be text" in outcome.err


@pytest.mark.parametrize("text", ["a: !!bool x", "a: [", "- 1", "\x00", "3"])
def test_a_damaged_record_of_a_run(text, place, mlxlora):
    (place / "run").mkdir()
    (place / "run" / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n[1]\n')
    (place / "run" / "config.yaml").write_text(text)
    outcome = mlxlora("report", "run", "--output", "out.html")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and "run/config.yaml: damaged" in outcome.err
    assert not (place / "out.html").exists()
