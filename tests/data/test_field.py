"""Rows and templates from public reports of faults: every folder of shared/field, and what is right for it.

Each case has a test; small ones are also rebuilt in the tests of their modules, which run without the folder.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from mlxlora import starter
from mlxlora.config.options import ModelOptions, RowOptions
from mlxlora.data.labeled import judged_row, with_mismatched
from mlxlora.data.rows import Row, read_rows, read_splits
from mlxlora.data.tokenize import preference_pair, prompt_example, supervised_example, tokenize_all
from mlxlora.errors import InputError
from mlxlora.models.loading import load_tokenizer, load_with_config
from tests.support.paths import SHARED, Outcome
from tests.support.tokens import CHATML, copy_with_token, merging_tokenizer, trained_spans

FIELD = SHARED / "field"
CASES: dict[str, list[Callable[..., None]]] = {}

pytestmark = pytest.mark.skipif(not FIELD.is_dir(), reason=f"needs {FIELD}")


def case(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a test for a folder of the field."""

    def register(test: Callable[..., None]) -> Callable[..., None]:
        CASES.setdefault(name, []).append(test)
        return test

    return register


def rows_of(path: str) -> list[Row]:
    return read_rows(FIELD / path)


def tokenizer_of(name: str) -> TokenizerWrapper:
    template = FIELD / name / "template.jinja"
    return merging_tokenizer(template.read_text() if template.exists() else CHATML)


def spans(path: str) -> list[list[str]]:
    """The trained spans of every row of a file under --mask-prompt, without the line end that some templates write after them."""
    tokenizer = tokenizer_of(path.split("/")[0])
    made = [supervised_example(row, tokenizer, mask_prompt=True) for row in rows_of(path)]
    return [[span.removesuffix("\n") for span in trained_spans(example, tokenizer)] for example in made]


def texts(path: str) -> list[str]:
    tokenizer = tokenizer_of(path.split("/")[0])
    made = [supervised_example(row, tokenizer) for row in rows_of(path)]
    return [tokenizer.decode(example.tokens) if example else "" for example in made]


def sides(path: str) -> list[tuple[list[str], list[str]]]:
    """(chosen, rejected) of the rows of a file: the text before the first trained span, and the trained spans."""
    tokenizer, found = tokenizer_of(path.split("/")[0]), []
    for row in rows_of(path):
        pair = preference_pair(row, tokenizer)
        assert pair is not None
        found.append(tuple(_divided(side, tokenizer) for side in (pair.chosen, pair.rejected)))
    return found


def _divided(example, tokenizer: TokenizerWrapper) -> list[str]:
    start = int(example.loss_mask.argmax())
    return [tokenizer.decode(example.tokens[:start]), *(span.removesuffix("\n") for span in trained_spans(example, tokenizer))]


def refused(path: str, says: str, line: int = 1, read: Callable = supervised_example) -> None:
    """Row `line` is an error of one line that names the file, the line and the fault."""
    with pytest.raises(InputError, match=re.escape(says)) as raised:
        read(rows_of(path)[line - 1], tokenizer_of(path.split("/")[0]))
    assert str(raised.value).startswith(f"{FIELD / path}:{line}: ") and "\n" not in str(raised.value)


END = "<|im_end|>"


def chat(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns)


@case("repeated_turns_think")
def test_repeated_turns() -> None:
    """Only assistant turns are trained, however often user and assistant repeat themselves."""
    thought = "<think>\n\n</think>\n\n"
    assert spans("repeated_turns_think/train.jsonl") == [
        [f"running{END}", f"running{END}", f"{thought}running{END}"],
        [f"Well. Go on.{END}", f"Go on.{END}", f"{thought}Go on.{END}"],
        [f"running{END}", f"{thought}done{END}"],
    ]


@case("glm_stop_token")
def test_the_next_header_ends_a_turn() -> None:
    """It is trained in every turn, also in the last, after which the template does not write it."""
    for number, found in zip(("zero", "one", "two", "three", "four"), spans("glm_stop_token/train.jsonl"), strict=False):
        assert found == [f"{number}<|user|>", "Bye<|user|>"]


@case("eos_mismatch")
@case("eos_in_generation_config")
@pytest.mark.parametrize("name", ["eos_mismatch", "eos_in_generation_config"])
def test_the_end_of_a_turn_is_trained_whatever_the_tokenizers_eos(name: str) -> None:
    template = FIELD / name / "template.jinja"
    tokenizer = merging_tokenizer(template.read_text() if template.exists() else CHATML, eos="<|endoftext|>")
    for row in rows_of(f"{name}/train.jsonl")[:5]:
        (found,) = trained_spans(supervised_example(row, tokenizer, mask_prompt=True), tokenizer)
        assert found.removesuffix("\n").endswith(END)


@case("eos_in_generation_config")
def test_preview_and_runs_know_the_same_stop_tokens(model_folder: Path, tmp_path: Path, mlxlora: Callable[..., Outcome]) -> None:
    """The end of a turn is in generation_config.json alone, and the template's marks leave it out."""
    name = "eos_in_generation_config"
    folder = copy_with_token(model_folder, tmp_path / "model", "<|last|>", (FIELD / name / "template.jinja").read_text(), size=288)
    inner = AutoTokenizer.from_pretrained(folder)
    end = inner.convert_tokens_to_ids("<|im_end|>")
    inner.eos_token = "<|last|>"
    inner.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    options = ModelOptions(model=str(folder))
    for tokenizer in (load_tokenizer(options), load_with_config(options)[1]):
        assert end in tokenizer.eos_token_ids
        (row, *_) = rows_of(f"{name}/train.jsonl")
        assert trained_spans(supervised_example(row, tokenizer, mask_prompt=True), tokenizer) == ["zero<|im_end|>"]
    data = ("--data", FIELD / name / "train.jsonl", "--mask-prompt", "--num", 1)
    done = mlxlora("preview", "--model", folder, *data, "--json")
    assert json.loads(done.out)["trained"] == ["zero<|im_end|>"]


@case("qwen35_opening")
def test_a_conversation_that_the_assistant_opens() -> None:
    """The template rejects its beginnings."""
    assert spans("qwen35_opening/train.jsonl") == [[f"Welcome!{END}", f"How can I help?{END}"]]


@case("roles_dropped")
def test_roles_are_mapped_or_refused() -> None:
    """No message vanishes."""
    tokenizer, shown = tokenizer_of("roles_dropped"), 0
    for row in rows_of("roles_dropped/train.jsonl"):
        try:
            example = supervised_example(row, tokenizer, mask_prompt=True)
        except InputError as error:
            assert re.search(r"drops message \d \(role '\w+'\)", str(error))
            continue
        assert example is not None
        text, shown = tokenizer.decode(example.tokens), shown + 1
        for message in row.fields.get("messages") or row.fields["conversations"]:
            assert (message.get("content") or message.get("value")) in text
    assert shown >= 4
    first, second, third = spans_of_rows("roles_dropped/train.jsonl", 0, 1, 2)
    assert (first, second, third) == ([f"Salut{END}"], [f"Hello{END}", f"Ciao{END}"], [f"Hello{END}", f"yes{END}"])


def spans_of_rows(path: str, *numbers: int) -> list[list[str]]:
    tokenizer, rows = tokenizer_of(path.split("/")[0]), rows_of(path)
    made = [supervised_example(rows[i], tokenizer, mask_prompt=True) for i in numbers]
    return [[span.removesuffix("\n") for span in trained_spans(example, tokenizer)] for example in made]


@case("toolargs_string")
def test_arguments_that_a_template_wants_as_text() -> None:
    assert spans("toolargs_string/train.jsonl") == [['[call]ls {"path": "/tmp"}[/call]' + END, f"One file: a.txt{END}"]]


@case("parquet_tools")
def test_parquet_is_as_jsonl(tmp_path: Path) -> None:
    """Arrow's nulls are not trained."""
    pytest.importorskip("datasets", reason="needs the datasets package")
    pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    subprocess.run([sys.executable, FIELD / "parquet_tools" / "make.py"], cwd=tmp_path, check=True)
    tokenizer = tokenizer_of("parquet_tools")
    made = [[supervised_example(row, tokenizer) for row in read_splits(tmp_path / name)["train"]] for name in ("pq", "js")]
    tokens = [[example.tokens.tolist() for example in examples if example] for examples in made]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 2
    assert all("null" not in tokenizer.decode(ids) for ids in tokens[0])


SCHEMA = '{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}'
TOOLS = f"<|im_start|>system\n{SCHEMA}{END}\n"
CALLED = "[call]now {}"


@case("tool_formats")
@pytest.mark.parametrize(
    ("file", "text", "trained"),
    [
        ("calls_text", TOOLS + chat(("user", "time?"), ("assistant", CALLED)), [CALLED]),
        ("no_content", TOOLS + chat(("user", "time?"), ("assistant", CALLED)), [CALLED]),
        *(
            (
                file,
                TOOLS + chat(("user", "time?"), ("assistant", CALLED), ("tool", "12:00"), ("assistant", "noon")),
                [CALLED, "noon"],
            )
            for file in ("legacy_empty", "legacy_none")
        ),
        ("tool_parts", chat(("user", "time?"), ("assistant", "x"), ("tool", "12"), ("assistant", "done")), ["x", "done"]),
        ("tools_null", chat(("user", "time?"), ("assistant", "noon")), ["noon"]),
    ],
)
def test_tool_formats(file: str, text: str, trained: list[str]) -> None:
    assert texts(f"tool_formats/{file}.jsonl") == [text]
    assert spans(f"tool_formats/{file}.jsonl") == [[span + END for span in trained]]


@case("tool_formats")
@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("empty_answer", "message 2 of 'messages' is an empty answer"),
        ("null_answer", "message 2 of 'messages' is an empty answer"),
        ("tool_dict", "must be a string, got dict {'a': 1}; write it as JSON text"),
    ],
)
def test_tool_formats_that_are_refused(file: str, says: str) -> None:
    refused(f"tool_formats/{file}.jsonl", says)


@case("dpo_edges")
@pytest.mark.parametrize(
    ("file", "chosen", "rejected"),
    [
        ("dicts", [chat(("user", "hi")) + "<|im_start|>assistant\n", f"a{END}"], [f"b{END}"]),
        ("multi", [chat(("user", "hi")) + "<|im_start|>assistant\n", f"a{END}", f"b{END}"], [f"c{END}"]),
        ("orca", ["s\n\nq", f"a{END}"], [f"b{END}"]),
        ("same", ["Say yes.", f" yes{END}"], [f" yes{END}"]),
    ],
)
def test_pairs_that_are_read(file: str, chosen: list[str], rejected: list[str]) -> None:
    """What users say between the turns of an answer is not trained."""
    for found in sides(f"dpo_edges/{file}.jsonl"):
        assert found == (chosen, [chosen[0], *rejected])


@case("dpo_edges")
def test_candidates_in_a_list() -> None:
    for chosen, rejected in sides("dpo_edges/rm_list.jsonl"):
        assert chosen[0] == rejected[0] and chosen[0].endswith("### Input:\n1 1\n\n### Response:")
        assert (chosen[1:], rejected[1:]) == ([f"2{END}"], [f"3{END}"])


@case("dpo_edges")
def test_a_pair_without_a_prompt() -> None:
    """Nothing predicts the first token, unless the tokenizer has BOS."""
    assert sides("dpo_edges/noprompt.jsonl") == [(["a", END], ["b", END])] * 2
    tokenizer = merging_tokenizer(CHATML, bos=True)
    pair = preference_pair(rows_of("dpo_edges/noprompt.jsonl")[0], tokenizer)
    assert pair is not None and trained_spans(pair.chosen, tokenizer) == [f"a{END}"]


@case("dpo_edges")
def test_a_pair_that_is_too_long_is_counted() -> None:
    tokenizer = tokenizer_of("dpo_edges")
    items, counts = tokenize_all(rows_of("dpo_edges/long.jsonl"), lambda row: preference_pair(row, tokenizer, max_seq_length=128))
    assert (len(items), counts.rows, counts.dropped) == (1, 2, 1)


@case("dpo_edges")
@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("empty", 1, "'chosen' is empty; write a completion or remove the row"),
        ("empty", 2, "'rejected' is empty; write a completion or remove the row"),
        ("null", 1, "'rejected' is empty; write a completion or remove the row"),
        ("noshare", 1, "chosen and rejected share no first message; add a 'prompt' field"),
        ("prompt_differs", 1, "'chosen' begins with a user message that is not the prompt's"),
    ],
)
def test_pairs_that_are_refused(file: str, line: int, says: str) -> None:
    refused(f"dpo_edges/{file}.jsonl", says, line, preference_pair)


@case("message_weight")
def test_weights_of_messages() -> None:
    """Of OpenAI, axolotl and ms-swift: with --mask-prompt the second answer alone, else all but the first answer."""
    assert spans("message_weight/train.jsonl") == [[f"Lima.{END}"]] * 3
    tokenizer = tokenizer_of("message_weight")
    for row in rows_of("message_weight/train.jsonl"):
        example = supervised_example(row, tokenizer)
        assert example is not None
        skipped = tokenizer.decode(example.tokens[~example.loss_mask])
        assert skipped.removesuffix("\n") == f"<|im_start|>Quito.{END}"  # the first token is never trained


@case("dpo_prompt_repeated")
@pytest.mark.parametrize("file", ["string_prompt", "system_in_prompt", "system_in_sides"])
def test_a_repeated_prompt_is_there_once(file: str) -> None:
    prompt = chat(("system", "Be brief."), ("user", "Name a fruit.")) + "<|im_start|>assistant\n"
    assert sides(f"dpo_prompt_repeated/{file}.jsonl") == [([prompt, f"Apple{END}"], [prompt, f"Rock{END}"])]


@case("dpo_prompt_repeated")
def test_a_repeated_prompt_of_a_completion() -> None:
    text = chat(("system", "Be brief."), ("user", "Name a fruit."), ("assistant", "Apple"))
    assert texts("dpo_prompt_repeated/sft.jsonl") == [text]
    assert spans("dpo_prompt_repeated/sft.jsonl") == [[f"Apple{END}"]]


@case("prefill_prompt")
def test_a_prompt_that_begins_the_answer() -> None:
    """The answer goes on in the same turn."""
    prompt = chat(("user", "Name a fruit.")) + "<|im_start|>assistant\nSure, a fruit is"
    assert sides("prefill_prompt/pairs.jsonl") == [([prompt, f" apple.{END}"], [prompt, f" rock.{END}"])]
    assert texts("prefill_prompt/sft.jsonl") == [f"{prompt} apple.{END}\n"]
    assert spans("prefill_prompt/sft.jsonl") == [[f" apple.{END}"]]
    tokenizer = tokenizer_of("prefill_prompt")
    (row,) = rows_of("prefill_prompt/prompts.jsonl")
    example = prompt_example(row, tokenizer)
    assert example is not None and tokenizer.decode(example.tokens) == prompt


@case("thinking_field")
def test_reasoning_under_any_name() -> None:
    thought = "<think>\ntwo and two make four\n</think>\n\n4"
    assert spans("thinking_field/three.jsonl") == [[thought + END]] * 3
    assert spans("thinking_field/parts.jsonl") == [[thought + END]]
    assert texts("thinking_field/twoparts.jsonl") == [chat(("user", "2+2?Be brief."), ("assistant", "4"))]


@case("thinking_field")
def test_arguments_of_a_row_for_its_template() -> None:
    """They are those of the prompt too, so that a policy answers as the rows do."""
    tokenizer = tokenizer_of("thinking_field")
    (row,) = rows_of("thinking_field/kwargs.jsonl")
    question = row.fields["messages"][:1]
    header = chat(("user", "2+2?")) + "<|im_start|>assistant\n"
    for arguments, end in (({"enable_thinking": False}, "<think>\n\n</think>\n\n"), ({}, "")):
        asked = prompt_example(Row({"prompt": question, "chat_template_kwargs": arguments}, "a.jsonl", 1), tokenizer)
        assert asked is not None and tokenizer.decode(asked.tokens) == header + end
    assert spans("thinking_field/kwargs.jsonl") == [[f"4{END}"]]


@case("kto_edges")
@pytest.mark.parametrize("file", ["good", "mixed", "six"])
def test_labels_that_are_read(file: str) -> None:
    tokenizer, data = tokenizer_of("kto_edges"), RowOptions(data="x")
    made = [judged_row(row, tokenizer, data=data) for row in rows_of(f"kto_edges/{file}.jsonl")]
    items = with_mismatched([judged for judged in made if judged], 2048)
    assert [item.label for item in items] == [row.fields["label"] for row in rows_of(f"kto_edges/{file}.jsonl")]
    assert all(item.mismatched is not None for item in items)


@case("kto_edges")
def test_labels_that_are_refused() -> None:
    def read(row: Row, tokenizer: TokenizerWrapper) -> object:
        return judged_row(row, tokenizer, data=RowOptions(data="x"))

    refused("kto_edges/int.jsonl", "'label' must be true or false, got int 1", read=read)
    refused("kto_edges/text.jsonl", "'label' must be true or false, got str 'true'", read=read)
    tokenizer = tokenizer_of("kto_edges")
    made = [judged_row(row, tokenizer, data=RowOptions(data="x")) for row in rows_of("kto_edges/same.jsonl")]
    with pytest.raises(InputError, match="all rows have one prompt; KTO compares with completions of other prompts"):
        with_mismatched([judged for judged in made if judged], 2048)


@case("gemma_system")
def test_a_template_without_system_messages() -> None:
    """The refusal names the remedy, and an empty message is nothing."""
    refused("gemma_system/train.jsonl", "put the text of the system message at the beginning of the first user message")
    (found,) = spans("gemma_system/empty.jsonl")
    assert len(found) == 1 and found[0].startswith("Hello")
    refused("gemma_system/pc.jsonl", "put the text of the system message", read=partial(supervised_example, use_chat_template=True))


@case("vocab_too_large")
def test_tokens_outside_the_embedding(model_folder: Path, tmp_path: Path, mlxlora: Callable[..., Outcome]) -> None:
    """Training and generating refuse them: MLX would read past the end of the embedding."""
    folder = copy_with_token(model_folder, tmp_path / "model", "<|tool|>", CHATML)
    for arguments in (
        ("sft", "--data", FIELD / "vocab_too_large" / "train.jsonl", "--adapter-path", tmp_path / "a", "--iters", 1),
        ("grpo", "--data", FIELD / "vocab_too_large" / "prompts.jsonl", "--adapter-path", tmp_path / "b", "--iters", 1),
        ("generate", "--prompt", "a <|tool|> b", "--max-tokens", 1),
    ):
        done = mlxlora(arguments[0], "--model", folder, *arguments[1:])
        assert done.code == 2 and "('<|tool|>') is not among the model's 288" in done.err and done.err.count("\n") == 1


@case("dpo_from_sft_adapter")
def test_the_reference_is_the_model_as_training_starts(tmp_path: Path, mlxlora: Callable[..., Outcome]) -> None:
    """The first loss of DPO on the adapters of SFT is log 2."""
    data, model = FIELD / "dpo_from_sft_adapter", ("--model", starter.model_path())
    how = [
        "--num-layers",
        "2",
        "--iters",
        "2",
        "--learning-rate",
        "1e-2",
        "--batch-size",
        "2",
        "--val-batches",
        "0",
        "--answers",
        "0",
        "--steps-per-report",
        "1",
    ]
    done = mlxlora("sft", *model, "--data", data / "train.jsonl", *how, "--adapter-path", tmp_path / "sft")
    assert done.code == 0, done.err
    resumed = ("--resume-adapter-file", tmp_path / "sft" / "adapters.safetensors", "--adapter-path", tmp_path / "dpo")
    done = mlxlora("dpo", *model, "--data", data / "pairs.jsonl", *how, *resumed)
    assert done.code == 0, done.err
    first = json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


@case("grpo_none_rewards")
def test_rewards_that_do_not_apply(tmp_path: Path, mlxlora: Callable[..., Outcome]) -> None:
    """A reward's mean is that of the completions that it applies to: 1 where it is 1 or None, and none where it is always None."""
    folder = FIELD / "grpo_none_rewards"
    rewards = ("--reward-file", folder / "rewards.py", "--rewards", "math_only,code_only,never")
    how = [
        "--iters",
        "4",
        "--batch-size",
        "1",
        "--group-size",
        "2",
        "--max-completion-length",
        "4",
        "--val-batches",
        "0",
        "--steps-per-report",
        "4",
    ]
    data = ("--data", folder / "prompts.jsonl", "--adapter-path", tmp_path / "grpo")
    done = mlxlora("grpo", "--model", starter.model_path(), *data, *rewards, *how)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()[0])
    means = {name: value for name, value in record.items() if name.startswith("rewards/") and name.endswith("/mean")}
    assert means["rewards/math_only/mean"] == 1.0 and means["rewards/code_only/mean"] == 0.5, means
    assert "rewards/never/mean" not in means or math.isnan(means["rewards/never/mean"])


def test_every_case_has_a_test() -> None:
    assert {folder.name for folder in FIELD.iterdir() if folder.is_dir()} == CASES.keys()
