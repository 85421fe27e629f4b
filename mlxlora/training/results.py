"""What a run returns: its results as a mapping, and the trained model with what one does next with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from ..adapters.files import save
from ..adapters.fuse import fuse
from ..adapters.prepare import base_of
from ..config.given import Data, PathOrName
from ..config.options import ModelOptions
from ..data.own_template import stored_template
from ..data.prompts import question
from ..data.rows import Row
from ..errors import InputError
from ..models.modes import evaluating, vocabulary
from ..reporting.ending import Improvement
from ..reporting.history import Record, read_record
from ..reporting.notebook import framed
from ..reporting.reporter import Values
from .evaluate_rows import evaluate_rows
from .inputs import Run

_DIGITS = {"seconds": 1}


def displayed(results: Values) -> dict[str, Any]:
    """Results as people read them: names with spaces, numbers rounded.

    >>> displayed({"steps": 3, "best_valid_loss": 1.234567})
    {'steps': 3, 'best valid loss': 1.2346}
    """
    return {
        name.replace("_", " "): round(value, _DIGITS.get(name, 4)) if isinstance(value, float) else value
        for name, value in results.items()
    }


def frame_of(rows: Sequence[Values], otherwise: str) -> Any:
    """A frame of pandas, a line for each row.

    Args:
        rows: values by the name of their column.
        otherwise: where else the rows are, for the message.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"to_frame needs pandas: pip install 'mlxlora[pandas]'; {otherwise}") from None
    return pandas.DataFrame(rows)


class RunResult(Mapping[str, Any]):
    """The results of a run by name, such as `result["steps"]` and `result["best_valid_loss"]`, and the model that it trained.

    Args:
        results: steps, losses, where the adapters are; of a dry run, what the run would need.
        run: its inputs, with the trained model; None: a dry run, which trains nothing.
        again: changed options -> the results of the run that continues this one.
    """

    def __init__(self, results: Values, run: Run | None = None, again: "Callable[..., RunResult] | None" = None) -> None:
        self._results, self._trained, self._again = dict(results), run, again

    def __getitem__(self, name: str) -> Any:
        return self._results[name.replace(" ", "_")]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"RunResult({self._results})"

    def _repr_html_(self) -> str:
        return framed(self._record, displayed(self._results)) if self._trained else ""

    # --- what was trained -----------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The trained model, in evaluation mode; with `keep_best` that of the best validation."""
        return self._run.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._run.tokenizer

    @property
    def adapter_path(self) -> str:
        """The folder of the run."""
        return str(self._run.options.directory)

    # --- how it went ----------------------------------------------------------------------------

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every record of the run: training reports, validations and the test, each with its step and split."""
        return [dict(row) for row in self._record.metrics]

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the best validation after step 0, by its reward if it has one; None without validation."""
        seen = Improvement()
        for row in self.history:
            if row["split"] == "valid":
                seen.add(row)
        return dict(seen.best) if seen.best else None

    def to_frame(self) -> Any:
        """The history as a frame of pandas, a line for each record.

        Raises:
            InputError: pandas is not installed.
        """
        return frame_of(self.history, ".history has the same as a list")

    # --- what comes next ------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[Mapping[str, Any]], *, max_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0
    ) -> str:
        """The model's answer to a prompt, in the chat template if the tokenizer has one.

        Args:
            prompt: a text, or messages.
            max_tokens: the most tokens of the answer.
            temperature: of sampling; 0 = always the likeliest token.
            top_p: sample among the likeliest tokens that together have this probability.

        Raises:
            InputError: the prompt is empty, or the chat template rejects it.
        """
        run = self._run
        asked = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
        system = getattr(run.source.data, "system", None)
        row = Row({"prompt": asked}, "prompt", 0)
        tokens = question(row, run.tokenizer, system=system, vocabulary=vocabulary(run.model)).tokens
        sampler = make_sampler(temperature, top_p)
        with evaluating(run.model):
            parts = stream_generate(run.model, run.tokenizer, tokens, max_tokens, sampler=sampler)
            return "".join(part.text for part in parts)

    def evaluate(self, data: Data) -> dict[str, float]:
        """The means of the run's loss and metrics over rows: those of the test split, else of the validation or training rows.

        Args:
            data: as the run takes it.

        Raises:
            InputError: there are no such rows, or the loss needs a reference that is gone.
        """
        return evaluate_rows(self._run, data)

    def save(self, path: PathOrName | None = None) -> str:
        """Writes the adapters, or the trained weights, to a folder; default: that of the run. Returns the folder."""
        run, folder = self._run, str(path or self.adapter_path)
        options = run.options
        Path(folder).mkdir(parents=True, exist_ok=True)
        more = stored_template(options.template, Path(folder))
        save(run.model, folder, options.adapter, options.model_name, options.config.get("quantize"), more)
        return folder

    def fuse(self, path: PathOrName, **options: Any) -> str:
        """Adds the saved adapters to the weights of their model and writes a model folder, which is returned.

        Args:
            path: the folder to write.
            options: of `mlxlora.fuse`, such as `dequantize=True`.

        Raises:
            InputError: the run does not know where its model came from, or the folder is in use.
        """
        fuse(base_of(ModelOptions(), self.adapter_path), self.adapter_path, str(path), **options)
        return str(path)

    def resume(self, **options: Any) -> "RunResult":
        """Continues the run exactly, such as `run.resume(iters=200)`, which are steps in all.

        Args:
            options: those that change.

        Raises:
            InputError: an option that a run cannot change.
        """
        if self._again is None:
            raise InputError("a dry run trains nothing, so there is nothing to resume")
        return self._again(**options)

    @property
    def _run(self) -> Run:
        if self._trained is None:
            raise InputError("a dry run trains nothing; leave dry_run out")
        return self._trained

    @property
    def _record(self) -> Record:
        return read_record(self.adapter_path)
