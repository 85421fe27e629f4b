"""What was cached for one tokenizer or one model is never used for another."""

import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxlora import starter
from mlxlora.config.options import ModelOptions
from mlxlora.data.token_cache import tokenizer_identity
from mlxlora.models.loading import load_tokenizer
from mlxlora.training.reference import reference_cache_file, sampled_digest

CHANGES = {
    "split_special_tokens": True,
    "add_prefix_space": True,
    "clean_up_tokenization_spaces": True,
    "padding_side": "left",
    "truncation_side": "left",
    "model_max_length": 77,
    "_add_bos_token": True,
    "_add_eos_token": True,
    "chat_template": "{{ messages }}",
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelOptions(model=str(starter.model_path())))


def test_equal_tokenizers_have_one_identity(tokenizer, tmp_path):
    """Also in another folder, and after use."""
    shutil.copytree(starter.model_path(), tmp_path / "elsewhere")
    tokenizer.encode("1 + 1 = 2")
    other = load_tokenizer(ModelOptions(model=str(tmp_path / "elsewhere")))
    assert tokenizer_identity(tokenizer) == tokenizer_identity(other) == tokenizer_identity(tokenizer)


@pytest.mark.parametrize("name", CHANGES)
def test_all_of_a_tokenizers_behavior_is_in_the_key(name, tokenizer, monkeypatch):
    before, inner = tokenizer_identity(tokenizer), tokenizer._tokenizer
    assert getattr(inner, name) != CHANGES[name]
    monkeypatch.setattr(inner, name, CHANGES[name])
    assert tokenizer_identity(tokenizer) != before


def test_special_tokens_that_are_split_are_other_tokens(tokenizer, monkeypatch):
    """The case that was missed: the same text, other ids."""
    before = tokenizer.encode("<|im_start|>user")
    key = tokenizer_identity(tokenizer)
    monkeypatch.setattr(tokenizer._tokenizer, "split_special_tokens", True)
    assert tokenizer.encode("<|im_start|>user") != before and tokenizer_identity(tokenizer) != key


def test_other_weights_of_the_same_date_and_size_are_another_reference(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(starter.model_path(), folder)
    file, before = folder / "model.safetensors", reference_cache_file(str(folder), "")
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert reference_cache_file(str(folder), "") != before


def test_the_revision_of_a_hub_model_is_in_the_key(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository, keys = tmp_path / "models--org--name", {reference_cache_file("org/name", "")}
    (repository / "refs").mkdir(parents=True)
    for revision in ("0123", "4567"):
        (repository / "snapshots" / revision).mkdir(parents=True)
        (repository / "snapshots" / revision / "config.json").write_text("{}")
        (repository / "refs" / "main").write_text(revision)
        keys.add(reference_cache_file("org/name", ""))
    assert len(keys) == 3


@given(size=st.integers(1, 300_000), data=st.data())
def test_a_large_change_of_a_file_is_seen(size, data, tmp_path_factory):
    """Weights that were exchanged differ everywhere, so that a sample is enough."""
    file = tmp_path_factory.getbasetemp() / "weights"
    file.write_bytes(bytes(size))
    before = sampled_digest(file)
    start = data.draw(st.integers(0, size - 1))
    file.write_bytes(bytes(start) + b"\1" * (size - start))
    assert (sampled_digest(file) != before) or size - start < 1
