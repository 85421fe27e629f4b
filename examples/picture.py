"""Draws README's picture of a run: `python examples/picture.py` trains the starter in a terminal and saves what it shows."""

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 80
PICTURE = Path(__file__).parent / "starter" / "run.svg"
_CONTROL = re.compile(r"(\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh]|\r|\n)")


def main() -> None:
    """Trains, and writes starter/run.svg."""
    with tempfile.TemporaryDirectory() as folder:
        output = terminal([str(Path(sys.executable).parent / "mlxlora"), "sft"], folder)
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text("$ mlxlora sft", style="bold"))
    for line in screen(output):
        console.print(Text.from_ansi(line))
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="mlxlora sft"), flags=re.DOTALL)  # fetched fonts
    PICTURE.write_text(drawing, encoding="utf-8")


def terminal(command: list[str], folder: str) -> str:
    """What a command writes to a terminal."""
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(WIDTH), "LINES": "50"}
    with subprocess.Popen(command, cwd=folder, stdout=child, stderr=child, env=environment):
        os.close(child)
        parts = []
        try:
            while part := os.read(parent, 65536):
                parts.append(part)
        except OSError:  # Linux's end of a pseudo-terminal
            pass
    return b"".join(parts).decode()


def screen(output: str) -> list[str]:
    """The lines that stay, with their colors: what a progress bar drew and erased is gone."""
    lines, row = [""], 0
    for part in _CONTROL.split(output):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.endswith("A") and part.startswith("\x1b["):
            row = max(0, row - int(part[2:-1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not _CONTROL.fullmatch(part):
            lines[row] += part
    return lines[: max((i + 1 for i, line in enumerate(lines) if line.strip()), default=0)]


if __name__ == "__main__":
    main()
