"""What a run says before its first step."""

import yaml

from .data import Counts
from .report import Terminal
from .runs import Run
from .sources import Split


def introduce(run: Run) -> None:
    """What will be trained on: counts, what was cut, the first example with its scored part marked."""
    if run.output.show_config:
        run.tell("note", yaml.safe_dump(dict(run.config), sort_keys=False).rstrip())
    for name in ("reward_file", "objective"):
        if file := run.config.get(name):
            run.tell("note", f"runs your Python code: {file} (--{name.replace('_', '-')})")
    for name, split in run.splits.items():
        _count(run, name, split)
    if not run.splits["valid"].items:
        run.tell("note", "no validation split: --valid-fraction 0.1 would make one")
    if run.tokenizer.has_chat_template and not run.source.data.use_chat_template and _plain(run):
        run.tell(
            "note",
            "rows are plain text; the model has a chat template: --use-chat-template would wrap prompts and completions in it",
        )
    first = run.source.examples(run.splits["train"].items[0])[0]
    for reporter in run.reporters:
        if isinstance(reporter, Terminal):
            reporter.example(first.tokens.tolist(), first.scored.tolist(), run.tokenizer.decode)


def _count(run: Run, name: str, split: Split) -> None:
    counts: Counts = split.counts
    if not counts.rows:
        return
    run.tell("note", f"{name}: {counts.rows} rows")
    limit = f"--max-seq-length {run.source.data.max_seq_length}"
    if counts.truncated:
        run.tell("note", f"{name}: {counts.truncated} rows were cut to {limit}", warning=True)
    if counts.dropped:
        run.tell("note", f"{name}: {counts.dropped} rows dropped: too long for {limit}", warning=True)


def _plain(run: Run) -> bool:
    """Whether the first row, which stands for all, was not rendered by the template."""
    first = run.source.examples(run.splits["train"].items[0])[0]
    return "<|" not in run.tokenizer.decode(first.tokens.tolist()[:8])
