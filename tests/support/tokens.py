"""Tokenizers of bytes with special tokens, and the texts that an example trains."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlxlora.data.tokenize import Example

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|endoftext|>")


@cache
def merging_tokenizer(template: str | None = None, bos: bool = False, eos: str | None = "<|im_end|>") -> TokenizerWrapper:
    """One token per byte, but 'le' and '00', so that boundaries can merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "le", "00"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("l", "e"), ("0", "0")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    inner = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>" if bos else None, eos_token=eos)
    inner.chat_template = template
    return TokenizerWrapper(inner)


def trained_spans(example: Example | None, tokenizer: TokenizerWrapper) -> list[str]:
    """The texts of the runs of trained tokens, in order."""
    assert example is not None
    runs = np.split(np.arange(len(example.tokens)), np.flatnonzero(np.diff(example.loss_mask.astype(int))) + 1)
    return [tokenizer.decode(example.tokens[run]) for run in runs if example.loss_mask[run[0]]]


def copy_with_token(model: Path, folder: Path, token: str, template: str, size: int = 289) -> Path:
    """A copy of a model of 288 tokens whose tokenizer has a chat template and `size` tokens, the last of which is `token`."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|filler {i}|>" for i in range(size - 1 - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
