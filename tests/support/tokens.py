"""A tokenizer of bytes with merges and special tokens, and the texts that an example trains."""

from functools import cache

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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
