"""What a run writes into its folder to be resumed: adapters, checkpoints, its options."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.nn as nn
import mlx.optimizers as optim
import yaml
from attrs import frozen

from ..adapters.files import WEIGHTS, own_arrays, save, save_arrays
from ..data.own_template import stored_template
from ..distributed.ranks import Ranks
from ..distributed.sharded_files import stored
from ..distributed.watchdog import nothing
from ..errors import InputError, LostError, RunError, SharedError, listed
from ..reporting.callbacks import STOPPED
from ..reporting.history import METRICS, SAMPLES, SETTINGS
from ..reporting.reporter import Reporter, drop_record, truncate_after
from ..utils.files import atomic_file
from .checkpoint import checkpoints, load_checkpoint, newest, read_origin, save_checkpoint
from .hooks import VALIDATION
from .inputs import RunOptions
from .loop import Abandoned
from .origin import UNKNOWN_ORIGIN, RunOrigin, check_origin
from .progress import Progress
from .rank_sync import on_rank0, repair
from .reference import START, starts_trained
from .run_files import clean, mark_run
from .run_folder import check_no_adapters, check_same


@frozen(eq=False)
class Saver:
    """Writes the adapters and the checkpoints of a run; all ranks call it, rank 0 writes.

    Attributes:
        model: what is trained.
        optimizer: its state is part of a checkpoint.
        options: of the run.
        ranks: the processes that train together.
        origin: what the run is made of; checkpoints have it.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    options: RunOptions
    ranks: Ranks
    origin: RunOrigin = UNKNOWN_ORIGIN

    @property
    def directory(self) -> Path:
        """The folder of the run."""
        return self.options.directory

    def start(self, reporter: Reporter, fixed: Collection[str] = ()) -> Progress:
        """Prepares the folder and reads the newest good checkpoint; without one the progress is that of a new run.

        Args:
            reporter: gets notes.
            fixed: options that must not differ from those of the run that is resumed, besides those that never may.

        Raises:
            InputError: --resume, and there is nothing to resume from, or the run has other options.
            LostError: rank 0 failed; the other ranks raise it.
        """
        return on_rank0(self.ranks, self.model, partial(self._start, reporter, fixed), self.optimizer) or Progress()

    def adapters(self) -> None:
        """Writes the adapters as they are in the model."""
        on_rank0(self.ranks, self.model, self._adapters)

    def checkpoint(self, progress: Progress) -> None:
        """Writes a checkpoint, and the adapters unless those of the best validation stay."""
        on_rank0(self.ranks, self.model, partial(self._checkpoint, progress), self.optimizer)

    def repair(self, progress: Progress, reporter: Reporter) -> None:
        """Writes missing or damaged adapters of a finished run again.

        Raises:
            InputError: no checkpoint has them.
        """
        best = progress.best if self.options.output.keep_best else None
        repair(self.ranks, self.model, self.directory, best, self._adapters, partial(reporter.note, warning=True))

    @contextmanager
    def saved_on_exit(self, progress: Progress, reporter: Reporter) -> Iterator[None]:
        """Training that ends early, by a signal, by an error or because another rank is gone, leaves a checkpoint.

        Bad input before the first step leaves none, so that the command can be given again.
        """
        watch, began = self.ranks.watch, progress.step

        def rescue() -> None:
            self.checkpoint(progress)
            reporter.finish({"stopped": f"after step {progress.step}", "to resume": "the same command with --resume"})

        def leave() -> None:
            reporter.finish({"stopped": f"after step {progress.step}", **self._last_checkpoint()})

        if watch:
            watch.rescue = leave if self.ranks.sharded else rescue
        try:
            yield
        except Abandoned:
            raise
        except KeyboardInterrupt:
            rescue()
            raise
        except (InputError, RunError) as error:
            if isinstance(error, InputError) and progress.step == began:
                raise
            if self.ranks.sharded and (isinstance(error, LostError) or not isinstance(error, SharedError)):
                leave()  # the other ranks do not help to save
                raise
            self.checkpoint(progress)
            again = {"to resume": "the same command with --resume"} if isinstance(error, InputError) else {}
            reporter.finish({"stopped": f"after step {progress.step}", "last good state": str(self.directory), **again})
            raise
        finally:
            if watch:
                watch.rescue = nothing

    # --- at rank 0 ----------------------------------------------------------------------------

    def _start(self, reporter: Reporter, fixed: Collection[str]) -> Progress:
        output, config = self.options.output, self.options.config
        path, problems = newest(self.directory) if output.resume else (None, [])
        if problems and path is None:
            raise InputError(f"--resume: {'; '.join(problems)}; no earlier one is good: start again with --overwrite")
        for problem in problems:
            reporter.note(f"{problem}; an earlier one is used", warning=True)
        if output.resume:
            check_same(self.directory, config, fixed)
        if path and (changed := check_origin(path, read_origin(path), self.origin, allowed=output.allow_changed)):
            reporter.note(f"--allow-changed: {listed(changed)} changed since {path} was written", warning=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        mark_run(self.directory)
        progress = self._new_run(reporter) if path is None else self._resumed(path, reporter)
        if path is None and fixed and starts_trained(self.model, self.options.adapter):  # the objective has a reference
            with atomic_file(self.directory / START) as file:
                save_arrays(file, stored(self.model, own_arrays(self.model)), checked=True)
        with atomic_file(self.directory / SETTINGS) as file:
            file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        return progress

    def _new_run(self, reporter: Reporter) -> Progress:
        output = self.options.output
        if output.resume:
            check_no_adapters(self.directory, WEIGHTS, output.save_every if output.keep_best else 0)
            reporter.note(f"no checkpoint in {self.directory}: starting from the beginning", warning=True)
        clean(self.directory)
        return Progress()

    def _resumed(self, path: Path, reporter: Reporter) -> Progress:
        progress = load_checkpoint(path, self.model, self.optimizer)
        for name in (METRICS, SAMPLES):
            truncate_after(self.directory / name, progress.step or -1)  # the validation of step 0 is repeated
        if progress.stop.startswith(STOPPED):
            progress.stop = ""
        for split, again in (("train", bool(progress.window)), ("valid", VALIDATION in progress.owed)):
            if again:
                drop_record(self.directory / METRICS, progress.step, split)
        reporter.note(f"resuming {path} after step {progress.step}")
        return progress

    def _adapters(self) -> None:
        options = self.options
        more = stored_template(options.template, self.directory)
        save(self.model, self.directory, options.adapter, options.model_name, options.config.get("quantize"), more)

    def _checkpoint(self, progress: Progress) -> None:
        output = self.options.output
        keep = 0 if progress.skipped else output.save_total_limit  # an unproved checkpoint replaces no good one
        stays, begun = output.keep_best and progress.best is not None, bool(checkpoints(self.directory))
        if begun and not stays:  # before the checkpoint: nothing is saved after the last one
            self._adapters()
        save_checkpoint(self.directory, self.model, self.optimizer, progress, self.options.adapter, self.origin, keep=keep)
        if not (begun or stays):  # after the first checkpoint: a run cannot resume from adapters alone
            self._adapters()

    def _last_checkpoint(self) -> dict[str, str]:
        path, _ = newest(self.directory)
        return {} if path is None else {"last checkpoint": str(path), "to resume": "the same command with --resume"}
