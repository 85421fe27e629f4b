"""Tokenizers for chat templates: one token a byte, and one for each tag that a template writes."""

import re
from functools import cache

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TAGS = re.compile(
    r"<[|｜][^<>|｜\s'\"]{1,40}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|</?s>|<end_of_utterance>|</?think>|</?tool_call>"
    r"|</?tool_response>|\[gMASK\]|<sop>"
)


@cache
def chat_tokenizer(template: str | None, extra: tuple[str, ...] = (), eos: str | None = "<eos>") -> TokenizerWrapper:
    """A tokenizer with a template, whose tags are special tokens.

    Args:
        template: Jinja source.
        extra: more special tokens.
        eos: the end of a sequence.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tags = sorted({*_TAGS.findall(template or ""), *extra, "<bos>", "<eos>"})
    core.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in tags])
    inner = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token=eos)
    inner.chat_template = template
    return TokenizerWrapper(inner)


def trained_texts(ids: list[int], mask: list[bool], tokenizer: TokenizerWrapper) -> list[str]:
    """The texts of the runs of trained tokens, in order."""
    runs: list[list[int]] = []
    for t, (token, chosen) in enumerate(zip(ids, mask, strict=True)):
        if chosen and (t == 0 or not mask[t - 1]):
            runs.append([])
        if chosen:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]
