"""What a run is given; nothing here changes while it trains."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn
from attrs import field, frozen

from ..config.options import AdapterOptions, BaseOptions, Output, Training
from ..data.sources import Source, Split
from ..distributed.ranks import Ranks, current_ranks
from ..models.logprobs import Scorer
from ..objectives.objective import Objective
from ..reporting.callbacks import Callbacks
from ..reporting.card import CUSTOM, MethodInfo


@frozen
class RunOptions:
    """The options of a run.

    Attributes:
        training: how to optimize.
        adapter: which parameters to train.
        output: which files and reports to write.
        config: every option by name; saved in the folder of the run.
        method: what reports say of the method.
        template: the chat template of the run, as text, and its variables, where they are not the model's.
    """

    training: Training = Training()
    adapter: AdapterOptions = AdapterOptions()
    output: Output = Output()
    config: Mapping[str, Any] = field(factory=dict)
    method: MethodInfo = CUSTOM
    template: BaseOptions = BaseOptions()

    @property
    def directory(self) -> Path:
        """The folder of the run."""
        return Path(self.output.adapter_path)

    @property
    def model_name(self) -> str:
        """The folder or hub name of the model; empty if the caller loaded it."""
        return self.config.get("model") or ""


@frozen
class ReferenceOptions:
    """Where the reference's log-probabilities come from.

    Attributes:
        load: tokenizer -> another model; None: the reference is the policy as training starts.
        cache: file that keeps them between runs; None keeps none.
    """

    load: Callable[[Any], nn.Module] | None = None
    cache: Path | None = None


@frozen(eq=False)
class Run:
    """The inputs of a run.

    Attributes:
        model: an mlx-lm model.
        tokenizer: its tokenizer.
        objective: what to minimize.
        source: how rows become batches.
        splits: the items of train, valid and test.
        options: of the optimization, the adapters and the files.
        reference: of objectives that compare the policy with a reference.
        noise: NEFTune's α, the scale of the noise on the embeddings of training tokens; 0 = off.
        extend: (scorer, tokenizer) -> a scorer that adds columns to a batch, such as the divergence from a teacher.
        ranks: the processes that train together.
        callbacks: the user's.
    """

    model: nn.Module
    tokenizer: Any
    objective: Objective
    source: Source
    splits: Mapping[str, Split]
    options: RunOptions = RunOptions()
    reference: ReferenceOptions = ReferenceOptions()
    noise: float = 0.0
    extend: Callable[[Scorer, Any], Scorer] | None = None
    ranks: Ranks = field(factory=current_ranks)
    callbacks: Callbacks = field(factory=Callbacks)
