"""What commands say about what they wrote has one style: what it is, two spaces, and where."""

import ast
import re

from mlxlora.utils.output import echo_written
from tests.docs.test_readme import ROOT, constants

OTHER_STYLES = re.compile(r"(?i)^(written|wrote|saved)\b.|\b(written|wrote|saved)(( to)?:| to) ?$")
BY_HAND = re.compile(r"^[a-z]+ {2,}$")


def test_nothing_is_written_to_or_saved_to() -> None:
    assert not [text for text in constants() if OTHER_STYLES.search(text)]
    assert all(OTHER_STYLES.search(text) for text in ("written: ", "Saved final weights to ", "the page is saved to ", "Wrote x"))


def test_no_command_writes_the_line_by_hand() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("cli/*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "echo"]
    first = [call.args[0].values[0] for call in calls if call.args and isinstance(call.args[0], ast.JoinedStr)]
    assert not [ast.unparse(part) for part in first if isinstance(part, ast.Constant) and BY_HAND.search(str(part.value))]
    assert calls and echo_written.__module__ == "mlxlora.utils.output"
