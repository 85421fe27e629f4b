"""Makes a model folder with random weights, for training from scratch."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from ..errors import InputError, reason
from ..utils.folders import check_vacant, written_folder
from ..utils.paths import check_links, checked_path
from .config_check import check_tokenizer_config, check_values

_MOST_PARAMETERS = 2**40
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "generation_config.json",
)


def init_model(config_file: str | Path, tokenizer: str | Path, output: str | Path, seed: int = 0, dtype: str = "float32") -> int:
    """Writes config.json, model.safetensors and the tokenizer's files to a new folder that mlx-lm loads.

    Weights of linear layers (of experts too) and embeddings ~ N(0, σ²), σ = `initializer_range` of the configuration or
    0.02; their biases are 0. Every other parameter keeps the initialization of its module (Radford et al., 2019, without their
    scaling of residual layers). Ids of special tokens become those of the tokenizer.

    Args:
        config_file: config.json of an architecture that mlx-lm knows.
        tokenizer: folder of the tokenizer.
        output: the folder to write; it appears complete or not at all.
        seed: of the weights.
        dtype: float32, bfloat16 or float16.

    Returns:
        The number of parameters.

    Raises:
        InputError: unusable configuration, a vocabulary too small for the tokenizer, or an output folder in use.
    """
    config_file, output = checked_path(config_file, "--config-file"), check_vacant(output, "--output", "init", overwrite=None)
    tokenizer = checked_path(tokenizer, "--tokenizer")
    config = _config(config_file, tokenizer, dtype)
    mx.random.seed(seed)
    model = _model(config_file, config)
    _randomize(model, config.get("initializer_range", 0.02), getattr(mx, dtype))
    _write(model, config, tokenizer, output)
    return sum(weight.size for weight in dict(tree_flatten(model.parameters())).values())


def _config(path: Path, tokenizer: Path, dtype: str) -> dict[str, Any]:
    """The configuration with the tokenizer's special tokens, after a check that its vocabulary fits."""
    config = _read_config(path)
    words = _tokenizer(tokenizer)
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    needed = max(words.get_vocab().values()) + 1
    if size is not None and size < needed:
        raise InputError(f"{path}: vocab_size {size} is too small for --tokenizer {tokenizer}; it needs at least {needed}")
    special = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kept = {name: value for name, value in config.items() if name not in ("quantization", "quantization_config", "dtype")}
    return kept | {name: value for name, value in special.items() if value is not None} | {"torch_dtype": dtype}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --config-file takes a model's config.json") from None
    except (UnicodeDecodeError, RecursionError):
        raise InputError(f"{path}: not UTF-8 text, or nested too deeply; --config-file takes a model's config.json") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise InputError(f"{path}: no model_type; --config-file takes a model's config.json")
    check_values(config, f"--config-file {path}", path.name)
    return config


def _tokenizer(folder: Path) -> Any:
    import mlx_lm  # noqa: F401 - first, so that transformers does not warn about a missing PyTorch
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise InputError(f"--tokenizer {folder} is not a folder")
    check_links(folder, f"--tokenizer {folder}")
    check_tokenizer_config(folder / "tokenizer_config.json", f"--tokenizer {folder}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {folder}: {reason(error, 1000)}") from None


def _model(path: Path, config: dict[str, Any]) -> nn.Module:
    from mlx_lm.utils import _get_classes

    try:
        model_class, arguments = _get_classes(config)
        model = model_class(arguments.from_dict(config))
    except Exception as error:  # architectures compute with any of these values
        raise InputError(f"{path}: mlx-lm cannot build this model: {reason(error)}") from None
    if (count := sum(weight.size for _, weight in tree_flatten(model.parameters()))) > _MOST_PARAMETERS:  # type: ignore[union-attr]
        raise InputError(f"{path}: a model of {count:,} parameters; {_MOST_PARAMETERS:,} are the limit")
    return model


def _randomize(model: nn.Module, std: float, dtype: mx.Dtype) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | SwitchLinear):
            module["weight"] = std * mx.random.normal(module["weight"].shape)
            if "bias" in module:
                module["bias"] = mx.zeros_like(module["bias"])
    in_dtype = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, weight: mx.array) -> mx.array:
        return weight.astype(dtype) if in_dtype(name) and mx.issubdtype(weight.dtype, mx.floating) else weight

    model.update(tree_map_with_path(cast, model.parameters()))


def _write(model: nn.Module, config: dict[str, Any], tokenizer: Path, output: Path) -> None:
    with written_folder(output, "--output", "init") as folder:
        for file in {file for pattern in TOKENIZER_FILES for file in tokenizer.glob(pattern) if file.is_file()}:
            shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
