"""Rewards: built-in ones against hand-computed values, a user's file, and one clear line for everything that goes wrong."""

import asyncio
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxlora.errors import InputError, RunError
from mlxlora.rollouts import reward_functions as rf
from mlxlora.rollouts.reward_names import called, executed, requests_in, resolved
from mlxlora.rollouts.rewards import NamedReward, call_rewards, combine, load_rewards
from mlxlora.utils import user_code as userfile

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k_test.jsonl"
FORMATTED = "<think>6 * 12</think><answer>72</answer>"


def asked(*functions, completions=("a", "b"), timeout=None, **columns):
    """One matrix for functions or names of built-in rewards over completions that come from lines 1, 2, ... of a file."""
    rewards = [load_rewards([f])[0] if isinstance(f, str) else NamedReward(f.__name__, f) for f in functions]
    size = len(completions)
    return call_rewards(
        rewards,
        prompts=["p"] * size,
        completions=completions,
        completion_ids=[list(range(len(rf.text_of(c)))) for c in completions],
        columns=columns,
        locations=[f"train.jsonl:{row + 1}" for row in range(size)],
        timeout=timeout,
    )


def one(name, completion, **columns):
    return asked(name, completions=[completion], **{key: [value] for key, value in columns.items()})[0, 0]


# --- numbers and answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234), ("$12.50", 12.5), ("\\$12.50", 12.5), ("-3", -3), ("−3", -3), ("-$3", -3), ("72.", 72), ("$72.$", 72),
        (".5", 0.5), ("50%", 50), ("1/2", 0.5), ("\\frac{1}{2}", 0.5), ("\\dfrac{-3}{4}", -0.75), ("\\text{72}", 72), (" 7\n", 7),
        ("1,000,000.25", 1000000.25), ("+4", 4),
    ],
)  # fmt: skip
def test_number(text, value):
    assert rf.number(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1/0", "12,50", "72 apples", "1.2.3", "-", "\\frac{1}", "9" * 5000, "nan", "inf", "1e5", "²"]
)
def test_no_number(text):
    assert rf.number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20/4 = 5 apples.", 5), ("costs $1,200.", 1200), ("10-3 is 7, so 10-3", 3), ("it is -3", -3), ("so we get...72", 72),
        ("1, 2, 3", 3), ("1,2", 2), ("_72_", 72), ("**-7**", -7), ("room A3 has 5 and B2", 5), ("half: 1/2", 0.5), ("(a)-3", 3),
    ],
)  # fmt: skip
def test_last_number(text, value):
    assert rf.last_number(text) == value


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("#### 72", ["72"]),
        ("\\boxed{\\frac{1}{2}} and \\boxed{3} <answer> 4 </answer>\n#### 5", ["3", "4", "5"]),
        ("\\boxed{\\frac{1}{2}}", ["\\frac{1}{2}"]),
        ("\\boxed{7", []),
        ("<answer>1</answer> no, <answer>2</answer>", ["2"]),
        ("<answer>open", []),
        ("</answer><answer>", []),
        ("##### heading", []),
        ("#### a\n#### b\nc", ["b"]),
    ],
)
def test_marked_answers(text, places):
    assert list(rf.marked_answers(text)) == places


@pytest.mark.parametrize(
    ("completion", "answer", "soft", "strict"),
    [
        ("The answer is 72.", "6*12\n#### 72", 1, 0),
        ("#### 72", "72", 1, 1),
        ("72", 72, 1, 1),
        ("72.0", "72", 1, 1),
        ("\\boxed{1,234}", "1234", 1, 1),
        ("<answer>$12.50</answer>", "12.5", 1, 1),
        ("<answer>12 dollars</answer>", "12", 1, 0),
        ("#### Final answer\n72", "72", 1, 0),
        ("\\boxed{5} or 72", "72", 0, 0),
        ("<answer> Paris. </answer>", "paris", 1, 1),
        ("It is Paris", "Paris", 0, 0),
        ("The answer is 3", "x^2+3", 0, 0),
        ("nothing", "72", 0, 0),
        ([{"role": "assistant", "content": "#### 72"}], "72", 1, 1),
    ],
)
def test_accuracy(completion, answer, soft, strict):
    assert one("accuracy", completion, answer=answer) == soft
    assert one("accuracy_strict", completion, answer=answer) == strict
    assert one("r1_accuracy_reward_func", completion, answer=answer) == 2 * strict
    assert one("accuracy_reward", completion, solution=answer) == soft


def test_accuracy_without_an_answer_does_not_apply():
    assert np.isnan(asked("accuracy", answer=[None, ""])).all()
    with pytest.raises(
        InputError, match=r"^train.jsonl:1 to train.jsonl:2: reward accuracy needs the column 'answer'; the rows have x$"
    ):
        asked("accuracy", x=[1, 2])


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K (shared/data) is not here")
def test_gsm8k_agrees_with_itself():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    finals = [answer.split("####")[1].strip().replace(",", "") for answer in answers]
    for completions in (answers, finals, [f"so it is ${final}." for final in finals], [f"\\boxed{{{final}}}" for final in finals]):
        assert rf.answer_accuracy()(completions=completions, answer=answers) == [1.0] * len(answers)
    assert sum(rf.accuracy_strict()(completions=finals[1:], answer=answers[:-1])) < 0.05 * len(answers)  # not the neighbor's answer


# --- formats and penalties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "strict", "soft", "think", "tags"),
    [
        (FORMATTED, 1, 1, 1, 1),
        (f"\n{FORMATTED}\n", 1, 1, 0, 0.999),
        (f"Sure! {FORMATTED}", 0, 1, 0, 1),
        (f"{FORMATTED} Done", 0, 1, 1, 0.995),
        ("<think> </think><answer>72</answer>", 0, 0, 1, 1),
        ("<answer>72</answer><think>x</think>", 0, 0, 0, 0.984),
        ("<think>a</think>72", 0, 0, 1, 0.482),
        ("<think><think>a</think><answer>b</answer>", 0, 1, 0, 0.75),
        ("", 0, 0, 0, 0),
    ],
)
def test_formats(text, strict, soft, think, tags):
    names = ("format", "format_soft", "think_format_reward", "tag_count", "r1_strict_format_reward_func", "r1_count_xml")
    halved = max(0.0, tags / 2 - 0.001 * len(text.rpartition("</answer>")[2]) / 2)
    expected = [strict, soft, think, tags, strict / 2, halved]
    np.testing.assert_allclose(asked(*names, completions=[text])[:, 0], expected, atol=1e-9)


def test_integer_and_regex():
    assert [one("integer", text) for text in ("<answer>72</answer>", "-5", "7.2", "<answer>a</answer>")] == [1, 1, 0, 0]
    assert one(r'regex(pattern="\A\d+\Z", score=2)', "72") == 2
    assert one(r"regex(pattern=r'\bno\b')", "none") == 0
    assert one("regex(pattern='a.b')", "a\nb") == 1


def test_penalties():
    texts = ["", "a" * 8, "a" * 9, "a" * 10, "a" * 11]
    rows = asked("soft_overlong(max_length=10,cache=2)", "soft_overlong_punishment_reward(max_length=8, cache=0)",
                 "length(max_length=10)", completions=texts)  # fmt: skip
    np.testing.assert_allclose(rows, [[0, 0, -0.5, -1, -1], [0, 0, -1, -1, -1], [0, -0.8, -0.9, -1, -1]])
    repeated = rf.repetition()(completion_ids=[[], [1, 2], [1, 2, 3], [1, 1, 1, 1], [1, 2, 1, 2, 1, 2]])
    np.testing.assert_allclose(repeated, [0, 0, 0, -0.5, -0.5])


# --- loading ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["acuracy"], "no reward function 'acuracy'. Did you mean accuracy"),
        ([], "--rewards names no reward function"),
        (["accuracy,accuracy"], "names accuracy 2 times"),
        (["a b"], "'a b' is not understood; write name,name or name"),
        (["accuracy(2)"], "not understood"),
        (["1"], "not understood"),
        (["a] + [b"], "not understood"),
        (["length"], "--rewards length: it needs max_length; write length(max_length=...)"),
        (["length(max_length='x')"], "max_length='x' is not an option; it takes max_length: int, score: float = -1.0"),
        (["length(max=3)"], "max=3 is not an option"),
        (["length(max_length=open)"], "max_length=open is not an option"),
        (["length(max_length=True)"], "max_length=True is not an option"),
        (["length(max_length=0)"], "--rewards length(max_length=0): max_length must be >= 1, got 0"),
        (["length(**x)"], "is not an option"),
        (["regex(pattern='(')"], "is no regular expression"),
        (["repetition(ngram_size=0)"], "ngram_size must be >= 1, got 0"),
        (["soft_overlong(max_length=4,cache=-1)"], "cache must be >= 0, got -1"),
    ],
)
def test_names_that_are_not_right(names, message):
    with pytest.raises(InputError) as error:
        load_rewards(names)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_weights_and_labels():
    rewards = load_rewards(["accuracy, length(max_length=4)", "regex(pattern='a,b')", "regex(pattern='c')"], weights=[1, 0, 2, 3])
    assert [r.name for r in rewards] == ["accuracy", "length", "regex(pattern='a,b')", "regex(pattern='c')"]
    assert [r.weight for r in rewards] == [1.0, 0.0, 2.0, 3.0]
    with pytest.raises(InputError, match="--reward-weights has 1 numbers for 2 rewards"):
        load_rewards(["accuracy,format"], weights=[1.0])
    with pytest.raises(InputError, match="must be finite numbers, got nan"):
        load_rewards(["accuracy"], weights=[math.nan])


MINE = """
import re

LIMIT = 3

def trl(prompts, completions, completion_ids, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer)]

async def later(completions, **kwargs):
    return [None if c == "a" else 0.5 for c in completions]

def mlx_lm_lora(prompts: list, completions: list, answer: list, types=None) -> list[float]:
    return [2.0 if r and r == a else 0.0 for r, a in zip(completions, answer)] if types is None else [9.0] * len(prompts)

def accuracy(completions):
    return [7] * len(completions)

def broken(completions):
    return [1 / (c != "b") for c in completions]
"""


def mine(tmp_path, text=MINE):
    (tmp_path / "mine.py").write_text(text)
    return str(tmp_path / "mine.py")


def here(names, file):
    """As `load_rewards`, but the file is executed in this process."""
    module = executed(file)
    return [NamedReward(called(request), resolved(request, module)) for request in requests_in(names)]


def asked_of(rewards, **columns):
    chat = [[{"role": "assistant", "content": c}] for c in "ab"]
    prompts = [[{"role": "user", "content": "?"}]] * 2
    return {
        kind: call_rewards(
            rewards, prompts=prompts, completions=c, completion_ids=[[1], [2]], columns=columns, locations=["d:1", "d:2"]
        )
        for kind, c in (("text", ["a", "b"]), ("chat", chat))
    }


def test_a_file(tmp_path):
    rewards = load_rewards(["trl,later", "mlx_lm_lora", "accuracy", "format"], mine(tmp_path))
    answers = asked_of(rewards, answer=["a", "x"], extra=[1, 2])
    np.testing.assert_array_equal(answers["text"], [[1, 0], [np.nan, 0.5], [2, 0], [7, 7], [0, 0]])
    np.testing.assert_array_equal(answers["chat"][2], [2, 0])  # mlx-lm-lora's functions get text
    assert asked_of(rewards[2:3], answer=["a", "x"], type=["t", "t"])["text"].tolist() == [[9, 9]]


def test_what_a_file_answers_crosses_processes(tmp_path):
    answers = (
        "[1, None]",
        "(True, np.float32(0.5))",
        "np.array([1, 2])",
        "[1, b'a']",
        "[10**400, 1]",
        "{1: 2}",
        "[0, float('nan')]",
    )
    functions = "".join(f"def f{i}(completions):\n    print('seen')\n    return {said}\n" for i, said in enumerate(answers))
    rewards = load_rewards([f"f{i}" for i in range(len(answers))], mine(tmp_path, "import numpy as np\n" + functions))
    for reward, right in zip(rewards, ([1, np.nan], [1, 0.5], [1, 2]), strict=False):
        np.testing.assert_array_equal(asked_of([reward])["chat"], [right])
    for reward, wrong in zip(
        rewards[3:], ("d:2: .* answered b'a'", "d:1: .* int 10", r"answered \{1: 2\}", "d:2: .* nan"), strict=True
    ):
        with pytest.raises(InputError, match=wrong):
            asked_of([reward])


def test_a_file_of_wrong_things(tmp_path):
    file = mine(tmp_path)
    for name, message in {
        "LIMIT": "LIMIT is int, not a function",
        "later(x=1)": "later takes no options in --rewards",
        "latr": "Did you mean later?",
    }.items():
        with pytest.raises(InputError) as error:
            here(name, file)
        assert message in str(error.value) and file in str(error.value)
    with pytest.raises(InputError, match=r"--reward-file gone.py: no such file"):
        load_rewards(["accuracy"], "gone.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n\ny = x / 0\n", "mine.py:3: --reward-file raised ZeroDivisionError: division by zero"),
        ("def f(:\n", "mine.py:1: --reward-file raised SyntaxError"),
        ("import sys\nsys.exit(3)\n", "mine.py:2: --reward-file raised SystemExit: 3"),
        ("import no_such.part\n",
         "mine.py:1: --reward-file imports no_such, which is neither installed (pip install no-such) nor beside the file"),
        ("\nfrom no_cv import x\n", "mine.py:2: --reward-file imports no_cv, which is neither installed (pip install opencv)"),
        ("from json import no_such_name\n", "mine.py:1: --reward-file raised ImportError: cannot import name 'no_such_name'"),
        ("import json.part\n", "mine.py:1: --reward-file raised ModuleNotFoundError: No module named 'json.part'"),
        ("raise ValueError('two\\nlines')\n", "ValueError: two lines"),
    ],
)  # fmt: skip
def test_a_file_that_raises(tmp_path, monkeypatch, text, message):
    monkeypatch.setitem(userfile._PACKAGES, "no_cv", "opencv")
    with pytest.raises(InputError) as error:
        executed(mine(tmp_path, text))
    assert message in str(error.value) and "\n" not in str(error.value)


REGISTERED = """
from mlx_lm_lora.trainer.grpo_reward_functions import register_reward_function

@register_reward_function()
def plain(prompts: list, completions: list, answer: list, types=None) -> list[float]:
    return [2.0 * (c == a) for c, a in zip(completions, answer)]

@register_reward_function(name="short")
def of_another_name(prompts: list, completions: list, answer: list, types=None) -> list[float]:
    return [-float(len(c)) for c in completions]
"""


@pytest.fixture
def without_peer(monkeypatch):
    """As where mlx-lm-lora is not installed."""
    for name in [name for name in sys.modules if name.startswith("mlx_lm_lora")]:
        monkeypatch.delitem(sys.modules, name)
    installed = userfile._installed
    monkeypatch.setattr(userfile, "_installed", lambda name: not name.startswith("mlx_lm_lora") and installed(name))


def test_a_file_of_mlx_lm_lora(tmp_path, without_peer):
    """It runs without that package, which nothing finds afterwards."""
    rewards = here("plain,short,of_another_name", mine(tmp_path, REGISTERED))
    np.testing.assert_array_equal(asked_of(rewards, answer=["a", "x"])["text"], [[2, 0], [-1, -1], [-1, -1]])
    assert not [name for name in sys.modules if name.startswith("mlx_lm_lora")]
    with pytest.raises(InputError, match=r"no reward function 'shrt' in .* Did you mean short\?"):
        here("shrt", mine(tmp_path, REGISTERED))


@pytest.mark.parametrize("what", ["trainer.grpo_reward_functions import get_reward_function", "utils import x"])
def test_no_more_of_mlx_lm_lora_is_there(tmp_path, without_peer, what):
    with pytest.raises(
        InputError, match=r"mine.py:1: .* imports mlx_lm_lora, which is neither installed \(pip install mlx-lm-lora\)"
    ):
        executed(mine(tmp_path, f"from mlx_lm_lora.{what}\n"))


def test_an_installed_mlx_lm_lora_is_used(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mlx_lm_lora")]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "packages" / "mlx_lm_lora" / "trainer"
    folder.mkdir(parents=True)
    (folder / "grpo_reward_functions.py").write_text(
        "REWARD_REGISTRY = {'theirs': print}\n"
        "def register_reward_function(name=None):\n"
        "    return lambda function: REWARD_REGISTRY.setdefault(name or function.__name__, function)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    try:
        assert [reward.name for reward in here("plain,short", mine(tmp_path, REGISTERED))] == ["plain", "short"]
        with pytest.raises(InputError, match="no reward function 'theirs'"):
            here("theirs", mine(tmp_path, REGISTERED))
    finally:
        for name in [name for name in sys.modules if name.startswith("mlx_lm_lora")]:
            del sys.modules[name]


def test_a_file_is_executed_only_when_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine(tmp_path, "raise SystemExit")
    assert load_rewards(["accuracy"])[0].name == "accuracy"


# --- calling ---------------------------------------------------------------------------------------------------------------


def test_one_that_raises_names_row_and_line(tmp_path):
    with pytest.raises(InputError) as error:
        asked_of(load_rewards(["broken"], mine(tmp_path)))
    assert str(error.value) == f"d:2: reward broken raised ZeroDivisionError: division by zero ({tmp_path}/mine.py:19)"


def test_one_that_raises_on_no_row_alone():
    def together(completions):
        assert len(completions) == 1, "one at a time"
        return [0.0]

    with pytest.raises(InputError, match=r"^train.jsonl:1 to train.jsonl:2: reward together raised AssertionError: one at a time"):
        asked(together)


def test_leaving_is_an_error_too():
    def leaves(completions):
        raise SystemExit(0)

    with pytest.raises(InputError, match=r"^train.jsonl:1: reward leaves raised SystemExit: 0"):
        asked(leaves)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "train.jsonl:1 to train.jsonl:2: reward f answered 1 values for 2 completions; return one for each"),
        ([1.0, math.nan], "train.jsonl:2: reward f answered nan; return a finite number, or None where it does not apply"),
        ([math.inf, 1.0], "train.jsonl:1: reward f answered inf; "),
        (["1", 1.0], "train.jsonl:1: reward f answered '1'; "),
        ([[1], 1.0], "train.jsonl:1: reward f answered [1]; "),
        ([10**400, 1.0], "train.jsonl:1: reward f answered int 1000"),
        (None, "reward f answered None; return a list with one number per completion"),
        (1.0, "reward f answered 1.0; return a list"),
        ({"a": 1, "b": 2}, "reward f answered {'a': 1, 'b': 2}; return a list"),
        ("ab", "reward f answered 'ab'; return a list"),
        (np.float32(3), "reward f answered 3.0; return a list"),
    ],
)
def test_wrong_answers(answer, message):
    def f(completions):
        return answer

    with pytest.raises(InputError) as error:
        asked(f)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("answer", [(True, False), [1, np.float32(0)], np.array([1, 0]), [np.bool_(True), 0.0]])
def test_right_answers(answer):
    def f(completions, **columns):
        return answer

    assert asked(f).tolist() == [[1, 0]]


def test_a_function_gets_what_it_names():
    def few(completion_ids, level=3):
        return [level] * len(completion_ids)

    def everything(**columns):
        assert columns.keys() == {"prompts", "completions", "completion_ids", "extra"}
        columns["completions"].clear()  # its own list
        return columns["extra"]

    assert asked(few, everything, extra=[4, 5]).tolist() == [[3, 3], [4, 5]]


def test_slow_ones_overlap():
    together = threading.Barrier(3)

    def first(completions):
        together.wait(timeout=20)
        return [0.0, 0.0]

    def second(completions):
        together.wait(timeout=20)
        return [1.0, 1.0]

    async def third(completions):
        await asyncio.to_thread(together.wait, 20)
        return [2.0, 2.0]

    assert asked(first, second, third, timeout=20.0).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_one_that_hangs_times_out():
    released = threading.Event()

    def hangs(completions):
        released.wait(20)
        return [0.0, 0.0]

    with pytest.raises(RunError, match=r"^reward hangs took longer than --reward-timeout 0.1 s on train.jsonl:1 to train.jsonl:2$"):
        asked(hangs, timeout=0.1)
    released.set()


def test_combine():
    matrix = np.array([[1.0, np.nan, np.nan, 2.0], [4.0, 4.0, np.nan, -4.0]])
    np.testing.assert_array_equal(combine(matrix, [1.0, 0.5]), [3.0, 2.0, np.nan, 0.0])


# --- laws ------------------------------------------------------------------------------------------------------------------

EVERY_BUILT_IN = (
    "accuracy", "accuracy_strict", "integer", "format", "format_soft", "think_format", "tag_count", "regex(pattern='a|#')",
    "length(max_length=5)", "repetition", "soft_overlong(max_length=9,cache=4)",
)  # fmt: skip
micros = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "#### ", "\\boxed{", "\\frac{1}{2}", "}", "72", "-", ",", "\n"]
)
texts = st.lists(st.one_of(micros, st.text(max_size=4)), max_size=8).map("".join)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_built_in_rewards_answer_numbers_whatever_the_text(rows):
    completions, answers = map(list, zip(*rows, strict=True))
    matrix = asked(*EVERY_BUILT_IN, completions=completions, answer=answers)
    assert (np.isfinite(matrix) | np.array([[not a for a in answers]])).all() and (np.abs(np.nan_to_num(matrix)) <= 1).all()


@settings(deadline=None, max_examples=80)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3), st.lists, max_leaves=6))
@example([0.5, None])
def test_any_answer_is_numbers_or_one_clear_line(answer):
    def f(**columns):
        return answer

    try:
        row = asked(f)[0]
    except InputError as error:
        assert "reward f answered" in str(error) and "train.jsonl:" in str(error) and "\n" not in str(error)
    else:
        assert [None if math.isnan(v) else v for v in row] == [None if a is None else float(a) for a in answer]


@settings(deadline=None, max_examples=80)
@given(st.text(max_size=20))
def test_any_names_load_or_raise_one_clear_line(text):
    try:
        load_rewards([text])
    except InputError as error:
        assert "\n" not in str(error)


@settings(deadline=None, max_examples=80)
@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "${:,}", "{:,}.00", " {}. ", "\\text{{{}}}"]))
def test_a_number_survives_its_typography(value, layout):
    assert rf.number(layout.format(value)) == value
    assert rf.last_number(f"so: {layout.format(value) if 'text' not in layout else value}") == value


def test_a_missing_column_is_told_before_the_model_is_loaded(tmp_path: Path, mlxlora: Any) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1?", "total": "2"}\n')
    done = mlxlora("grpo", "--model", tmp_path / "no-model", "--data", tmp_path, "--rewards", "accuracy", "--quiet")
    named = mlxlora("grpo", "--model", tmp_path / "no-model", "--data", tmp_path, "--answer-key", "total", "--quiet")
    assert "no-model: no such folder" in named.err, "the column is found"
    assert done.code == 2 and "train.jsonl:1: reward accuracy needs the column 'answer'; the rows have total" in done.err
