"""Rows before they are trained on: as the model will see them, how long they are, what is cut, dropped and scored."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from attrs import frozen
from rich.console import Console
from rich.text import Text

from ..data import formats
from ..data.rows import Row
from ..data.sources import Source, Split
from ..data.tokenize import Counts, Example
from .text import printable, runs_of_text, shorten

Parse = Callable[[Row, Mapping[str, str]], Any]
BINS, BAR, SHOWN = 10, 40, 600
_STYLES = {(True, True): "bold green underline", (True, False): "bold green", (False, True): "magenta", (False, False): ""}


@frozen
class Preview:
    """What will be trained on, before there is a model.

    Attributes:
        source: how rows become batches.
        rows: of each split, as they were read.
        splits: their items.
        tokenizer: the model's.
        parse: a row to its record, as the method reads it.
        lengths: tokens of every row of all splits, as they were before anything was cut or dropped; of a pair, of the longer side.
    """

    source: Source
    rows: Mapping[str, Sequence[Row]]
    splits: Mapping[str, Split]
    tokenizer: Any
    parse: Callable[[Row], Any]
    lengths: Sequence[int]


def show_preview(preview: Preview, count: int = 3, console: Console | None = None) -> None:
    """Prints what a run would train on.

    Args:
        preview: rows, items and tokenizer.
        count: rows of the training split to show.
        console: where to print; scored tokens are green in a terminal and between [[ ]] elsewhere.
    """
    console = console or Console(highlight=False)
    items = preview.splits["train"].items
    _print(console, "template", _template(preview))
    _print(console, "scored", _scored(preview.source, items))
    for name, split in preview.splits.items():
        if split.counts.rows:
            _print(console, name, _counted(preview, name, split.counts))
    for line in _lengths(preview.lengths, preview.source.data.max_seq_length, "█" if _unicode(console) else "#"):
        console.print(line, soft_wrap=True)
    for item in items[:count]:
        for text in _shown(preview, item, console):
            console.print(text, soft_wrap=True)
    if console.is_terminal:
        console.print(Text("\ngreen: scored; underlined or violet: special tokens", style="dim"))


def _lengths(lengths: Sequence[int], limit: int, block: str) -> Iterator[str]:
    """How long rows are, how many of them fit, and which limits would keep them whole."""
    ordered = sorted(lengths)
    fit, most = bisect_right(ordered, limit) / len(ordered), ordered[-(len(ordered) // 20) - 1]
    yield f"\ntokens in a row: {ordered[0]:,} to {ordered[-1]:,}, median {median(ordered):,.0f}"
    yield from (f"  {line}" for line in histogram(ordered, block, limit=limit))
    kept = "all rows" if fit == 1 else f"{fit:.1%} of the rows"
    yield f"--max-seq-length {limit} keeps {kept} whole; {most} would keep 95% of them, {ordered[-1]} all"


def histogram(lengths: Sequence[int], block: str = "#", bins: int = BINS, width: int = BAR, limit: int | None = None) -> list[str]:
    """Bars of how many rows have how many tokens; one line more where the limit is, if some rows are longer.

    >>> histogram([1, 2, 2, 9], bins=2, width=6)
    ['1-5  ###### 3', '6-9  ## 1']
    >>> histogram([1, 2, 9], bins=1, width=2, limit=4)
    ['1-4  ## 2', '---  --max-seq-length 4', '5-9  # 1']
    """
    ordered = sorted(lengths)
    low, high = ordered[0], ordered[-1]
    cut = high if limit is None else min(max(limit, low - 1), high)  # the last length that fits
    starts = {*range(low, high + 1, -(-(high - low + 1) // bins)), *([cut + 1] if cut < high else [])}
    ranges = [(a, b - 1) for a, b in pairwise([*sorted(starts), high + 1])]
    counts = [bisect_right(ordered, b) - bisect_left(ordered, a) for a, b in ranges]
    labels = [f"{a:,}-{b:,}" if a != b else f"{a:,}" for a, b in ranges]
    wide = max(map(len, labels))
    lines = [f"{label:>{wide}}  {block * -(-n * width // max(counts))} {n:,}" for label, n in zip(labels, counts, strict=True)]
    if cut < high:
        lines.insert(sum(b <= cut for _, b in ranges), f"{'-' * wide}  --max-seq-length {limit}")
    return lines


def _print(console: Console, name: str, text: str) -> None:
    console.print(Text(f"{name:<9} {text}"), soft_wrap=True)


def _unicode(console: Console) -> bool:
    return console.encoding.startswith("utf")


def _template(preview: Preview) -> str:
    """What becomes of each kind of row."""
    kinds = Counter(_kind(preview.parse(row)) for row in preview.rows["train"])
    wrapped = preview.source.data.use_chat_template
    ways = {
        "conversations": "rendered by the chat template",
        "strings": "wrapped in the chat template (--use-chat-template)" if wrapped else "joined as they are, no chat template",
        "plain texts": "as they are",
    }
    unused = preview.tokenizer.has_chat_template and kinds["strings"] and not wrapped
    hint = "; the model has a chat template: --use-chat-template" if unused else ""
    return ", ".join(f"{kinds[kind]:,} {kind} {way}" for kind, way in ways.items() if kinds[kind]) + hint


def _kind(record: Any) -> str:
    if isinstance(record, formats.TextRecord):
        return "plain texts"
    return "conversations" if isinstance(record, formats.ChatRecord) or isinstance(record.prompt, list) else "strings"


def _scored(source: Source, items: Sequence[Any]) -> str:
    if source.online:
        return "the completions, which are sampled during the run"
    examples = [example for item in items for example in source.examples(item)]
    loss_mask, tokens = sum(int(e.loss_mask.sum()) for e in examples), sum(len(e.tokens) for e in examples)
    masked = getattr(source.data, "mask_prompt", None)
    which = {True: "completions and assistant turns (--mask-prompt)", False: "every token; --mask-prompt scores answers only"}
    prompts = "prompts and completions" if any(e.prompt is not None for e in examples) else "completions"
    return f"{prompts if masked is None else which[masked]}: {loss_mask:,} of {tokens:,} tokens ({loss_mask / tokens:.1%})"


def _counted(preview: Preview, name: str, counts: Counts) -> str:
    """Rows, shares cut and dropped, and where those that were dropped are."""
    kept = {preview.source.examples(item)[0].location for item in preview.splits[name].items}
    lost = [row.location for row in preview.rows[name] if row.location not in kept]
    more = f" and {len(lost) - 3:,} more" if len(lost) > 3 else ""
    limit = f"--max-seq-length {preview.source.data.max_seq_length}"
    cut = f", {counts.truncated:,} cut to {limit} ({counts.truncated / counts.rows:.1%})" if counts.truncated else ", none cut"
    dropped = f", {counts.dropped:,} dropped ({counts.dropped / counts.rows:.1%}): {', '.join(lost[:3])}{more}"
    return f"{counts.rows:,} rows{cut}{dropped if counts.dropped else ', none dropped'}"


def _shown(preview: Preview, item: Any, console: Console) -> Iterator[Text]:
    """The sequences of an item, each under a line that says where it is from."""
    for side, example in zip(_sides(item), preview.source.examples(item), strict=True):
        cut = ", cut" if example.truncated else ""
        about = f"{len(example.tokens):,} tokens, {int(example.loss_mask.sum()):,} scored{cut}"
        yield Text(f"\n{example.location}  {side}  {about}".replace("    ", "  "), style="dim")
        yield marked(example, preview.tokenizer, plain=not console.is_terminal, newline="⏎" if _unicode(console) else "\\n")


def _sides(item: Any) -> tuple[str, ...]:
    if hasattr(item, "chosen"):
        return "chosen", "rejected"
    return ({True: "desirable", False: "undesirable"}.get(getattr(item, "label", None), ""),)  # type: ignore[arg-type]


def marked(example: Example, tokenizer: Any, *, plain: bool, newline: str = "⏎") -> Text:
    """A row as the model reads it: scored tokens marked, special tokens and line ends visible.

    Args:
        example: the row.
        tokenizer: the model's.
        plain: marks scored text by [[ ]], else by colour.
        newline: what shows the end of a line.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    tokens, loss_mask = example.tokens.tolist(), example.loss_mask.tolist()
    kinds = [(s, t in special) for t, s in zip(tokens, loss_mask, strict=True)]
    text, before = Text(), False
    for part, kind in runs_of_text(tokens, kinds, tokenizer.decode):
        if plain and kind[0] != before:
            text.append("[[" if kind[0] else "]]")
        before = kind[0]
        text.append(shorten(printable(part), SHOWN).replace("\n", f"{newline}\n"), style="" if plain else _STYLES[kind])
    text.append("]]" if plain and before else "")
    text.rstrip()
    return text
