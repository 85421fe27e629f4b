"""Shows rows before training: their tokens, which of them are trained, and how many rows are cut or dropped."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from attrs import evolve, frozen
from rich.console import Console
from rich.text import Text

from ..data import formats, sources
from ..data.rows import Row
from ..data.sources import Source, Split
from ..data.tokenize import Counts, Example
from ..errors import printable
from ..utils.console import safe_console
from ..utils.integers import ceil_div
from .text import runs_of_text, shorten

Parse = Callable[[Row, Mapping[str, str]], Any]
BINS, BAR, SHOWN = 10, 40, 600
_STYLES = {(True, True): "bold green underline", (True, False): "bold green", (False, True): "magenta", (False, False): ""}


@frozen
class Preview:
    """The rows and items that a run would train.

    Attributes:
        source: turns rows into batches.
        rows: the rows of each split, as read.
        splits: the items of each split.
        tokenizer: the model's.
        parse: turns a row into its record, as the method does.
        lengths: tokens of every row of all splits before truncation; of a pair, those of its longer side.
    """

    source: Source
    rows: Mapping[str, Sequence[Row]]
    splits: Mapping[str, Split]
    tokenizer: Any
    parse: Callable[[Row], Any]
    lengths: Sequence[int]


def read_preview(source: Source, parse: Parse, tokenizer: Any) -> Preview:
    """Reads the rows that a run would train.

    Args:
        source: turns rows into batches.
        parse: turns a row into its record; gets the names of the fields, too.
        tokenizer: the model's.

    Raises:
        InputError: bad data.
    """
    source = evolve(source, live=False)  # there is no policy to measure with
    data = source.data
    whole, lengths = evolve(source, data=evolve(data, max_seq_length=2**31 - 1)), []

    def encode(row: Row, _: Any) -> Any:
        """The item of a row. Records its whole length; only a row that is too long is encoded twice."""
        item = whole.prepare(row, tokenizer)
        if item is not None:
            lengths.append(max(map(whole.length, whole.arrange([item]))))
        return source.prepare(row, tokenizer) if item is not None and lengths[-1] > data.max_seq_length else item

    rows = sources.load_rows(data, 0)
    splits = sources.tokenize(source, rows, tokenizer, encoder=encode)
    return Preview(source, rows, splits, tokenizer, lambda row: parse(row, formats.field_names(data)), lengths)


def show_preview(preview: Preview, count: int = 3, console: Console | None = None) -> None:
    """Prints counts, lengths and the first rows of what a run would train.

    Args:
        preview: rows, items and tokenizer.
        count: how many rows of the training split to show.
        console: where to print; trained tokens are green in a terminal, and stand between [[ ]] elsewhere.
    """
    console = console or safe_console()
    items = preview.splits["train"].items
    _print(console, "template", _template(preview))
    _print(console, "trained", _trained(preview.source, items))
    for name, split in preview.splits.items():
        if split.counts.rows:
            _print(console, name, _counted(preview, name, split.counts))
    for line in _lengths(preview.lengths, preview.source.data.max_seq_length, "█" if _unicode(console) else "#"):
        console.print(line, soft_wrap=True)
    for item in items[:count]:
        for text in _shown(preview, item, console):
            console.print(text, soft_wrap=True)
    if console.is_terminal:
        console.print(Text("\ngreen: trained; underlined or violet: special tokens", style="dim"))


def _lengths(lengths: Sequence[int], limit: int, block: str) -> Iterator[str]:
    """The lengths of the rows, the share that fits, and the limits that would keep 95% or all of them whole."""
    ordered = sorted(lengths)
    fit, most = bisect_right(ordered, limit) / len(ordered), ordered[-(len(ordered) // 20) - 1]
    yield f"\ntokens in a row: {ordered[0]:,} to {ordered[-1]:,}, median {median(ordered):,.0f}"
    yield from (f"  {line}" for line in histogram(ordered, block, limit=limit))
    kept = "all rows" if fit == 1 else f"{fit:.1%} of the rows"
    yield f"--max-seq-length {limit} keeps {kept} whole; {most} would keep 95% of them, {ordered[-1]} all"


def histogram(lengths: Sequence[int], block: str = "#", bins: int = BINS, width: int = BAR, limit: int | None = None) -> list[str]:
    """Bars for the numbers of rows by tokens, and a line at the limit if some rows are longer.

    >>> histogram([1, 2, 2, 9], bins=2, width=6)
    ['1-5  ###### 3', '6-9  ## 1']
    >>> histogram([1, 2, 9], bins=1, width=2, limit=4)
    ['1-4  ## 2', '---  --max-seq-length 4', '5-9  # 1']
    """
    ordered = sorted(lengths)
    low, high = ordered[0], ordered[-1]
    cut = high if limit is None else min(max(limit, low - 1), high)  # the greatest length that fits
    starts = {*range(low, high + 1, ceil_div(high - low + 1, bins)), *([cut + 1] if cut < high else [])}
    ranges = [(a, b - 1) for a, b in pairwise([*sorted(starts), high + 1])]
    counts = [bisect_right(ordered, b) - bisect_left(ordered, a) for a, b in ranges]
    labels = [f"{a:,}-{b:,}" if a != b else f"{a:,}" for a, b in ranges]
    wide = max(map(len, labels))
    lines = [f"{label:>{wide}}  {block * ceil_div(n * width, max(counts))} {n:,}" for label, n in zip(labels, counts, strict=True)]
    if cut < high:
        lines.insert(sum(b <= cut for _, b in ranges), f"{'-' * wide}  --max-seq-length {limit}")
    return lines


def row_objects(preview: Preview, count: int) -> Iterator[dict[str, Any]]:
    """The first items of the training split as JSON objects, for programs and tests.

    Each has `file`, `line`, `tokens` (ids), `text`, `trained` (the texts of the trained spans, in order) and `counts`. A pair
    has `file` and `line`, and the rest under `chosen` and `rejected`. A labeled completion has a `label` too. Dropped rows are
    left out.
    """
    for item in preview.splits["train"].items[:count]:
        examples = preview.source.examples(item)
        file, _, line = examples[0].location.rpartition(":")
        parts = [_object(example, preview.tokenizer) for example in examples]
        label = {"label": item.label} if isinstance(getattr(item, "label", None), bool) else {}
        sides = dict(zip(_sides(item), parts, strict=True)) if len(parts) == 2 else parts[0]
        yield {"file": file, "line": int(line), **label, **sides}


def _object(example: Example, tokenizer: Any) -> dict[str, Any]:
    tokens, loss_mask = example.tokens.tolist(), example.loss_mask.tolist()
    trained = [text for text, is_trained in runs_of_text(tokens, loss_mask, tokenizer.decode) if is_trained]
    counts = {"tokens": len(tokens), "trained": sum(loss_mask), "truncated": example.truncated}
    return {"tokens": tokens, "text": tokenizer.decode(tokens), "trained": trained, "counts": counts}


def _print(console: Console, name: str, text: str) -> None:
    console.print(Text(f"{name:<9} {text}"), soft_wrap=True)


def _unicode(console: Console) -> bool:
    return console.encoding.startswith("utf")


def _template(preview: Preview) -> str:
    """How many rows of each kind there are, and what happens to them."""
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


def _trained(source: Source, items: Sequence[Any]) -> str:
    examples = [example for item in items for example in source.examples(item)]
    loss_mask, tokens = sum(int(e.loss_mask.sum()) for e in examples), sum(len(e.tokens) for e in examples)
    if source.online or not loss_mask:
        return "the completions, which the run samples"
    masked = getattr(source.data, "mask_prompt", None)
    which = {True: "completions and assistant turns (--mask-prompt)", False: "every token; --mask-prompt trains answers only"}
    prompts = "prompts and completions" if any(e.prompt is not None for e in examples) else "completions"
    return f"{prompts if masked is None else which[masked]}: {loss_mask:,} of {tokens:,} tokens ({loss_mask / tokens:.1%})"


def _counted(preview: Preview, name: str, counts: Counts) -> str:
    """The number of rows, how many of them are cut and dropped, and which ones are dropped."""
    kept = {preview.source.examples(item)[0].location for item in preview.splits[name].items}
    lost = [row.location for row in preview.rows[name] if row.location not in kept]
    more = f" and {len(lost) - 3:,} more" if len(lost) > 3 else ""
    limit = f"--max-seq-length {preview.source.data.max_seq_length}"
    cut = f", {counts.truncated:,} cut to {limit} ({counts.truncated / counts.rows:.1%})" if counts.truncated else ", none cut"
    dropped = f", {counts.dropped:,} dropped ({counts.dropped / counts.rows:.1%}): {', '.join(lost[:3])}{more}"
    return f"{counts.rows:,} rows{cut}{dropped if counts.dropped else ', none dropped'}"


def _shown(preview: Preview, item: Any, console: Console) -> Iterator[Text]:
    """The sequences of an item, each under a line with its file, line and counts."""
    for side, example in zip(_sides(item), preview.source.examples(item), strict=True):
        cut = ", cut" if example.truncated else ""
        about = f"{len(example.tokens):,} tokens, {int(example.loss_mask.sum()):,} trained{cut}"
        yield Text(f"\n{example.location}  {side}  {about}".replace("    ", "  "), style="dim")
        yield highlighted(example, preview.tokenizer, plain=not console.is_terminal, newline="⏎" if _unicode(console) else "\\n")


def _sides(item: Any) -> tuple[str, ...]:
    if hasattr(item, "chosen"):
        return "chosen", "rejected"
    return ({True: "desirable", False: "undesirable"}.get(getattr(item, "label", None), ""),)  # type: ignore[arg-type]


def highlighted(example: Example, tokenizer: Any, *, plain: bool, newline: str = "⏎") -> Text:
    """A row as the model reads it, with trained tokens marked, and special tokens and line ends visible.

    Args:
        example: the row.
        tokenizer: the model's.
        plain: mark trained text by [[ ]] instead of color.
        newline: the sign for the end of a line.
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
