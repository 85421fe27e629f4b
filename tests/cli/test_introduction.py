"""What a run says of its rows before it trains."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxlora import starter

pytestmark = pytest.mark.usefixtures("eager")

HINT = "rows are plain text; the model has a chat template: --use-chat-template would wrap prompts and completions in it"
PAIR = {"prompt": "a?", "completion": " b"}


@pytest.mark.parametrize(
    ("row", "options", "hinted", "cut"),
    [
        ({"text": "a b c d"}, (), False, False),  # nothing in it could be wrapped
        (PAIR, ("--mask-prompt",), True, False),  # though it ends in the token that ends a turn of the template
        (PAIR, (), True, False),  # though every token is trained
        (PAIR, ("--use-chat-template",), False, False),
        ({"text": "word " * 20}, ("--max-seq-length", 8), False, True),
    ],
)
def test_what_the_first_row_gives_rise_to(
    row: dict[str, str], options: tuple[object, ...], hinted: bool, cut: bool, tmp_path: Path, mlxlora: Any
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    where = ("--model", starter.model_path(), "--data", tmp_path / "rows.jsonl", "--adapter-path", tmp_path / "run")
    done = mlxlora("sft", *where, "--batch-size", 1, "--num-layers", 1, "--iters", 1, "--dry-run", *options)
    said = " ".join((done.out + done.err).split())
    assert done.code == 0, done.err
    assert (HINT in said) == hinted and ("the first example is cut to --max-seq-length 8" in said) == cut
