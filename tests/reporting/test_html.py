"""report.html and `mlxlora report`: self-contained, whole, and true to the files of the runs."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlxlora as ml
from mlxlora import starter
from mlxlora.reporting.charts import metric_chart
from mlxlora.reporting.history import Record, compact, curves, differing, outcome, past_run, read_record
from mlxlora.reporting.html import Page, PageParts, comparison_page, figures, reached, run_page
from mlxlora.reporting.plot import Plot
from mlxlora.reporting.reporter import MetricsFile, numbers
from mlxlora.reporting.svg import Line, chart, thinned, ticks
from mlxlora.utils.marker import MARKER

OPTIONS = {"model": str(starter.model_path()), "data": str(starter.data_path("sft")), "mask_prompt": True}
OPTIONS |= {"iters": 4, "num_layers": 1, "batch_size": 4, "val_batches": 1, "steps_per_report": 2}
NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)


class Tags(HTMLParser):
    """Every element that opens is closed, and nothing points outside."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(text):
    """The page, parsed; it needs nothing but itself."""
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not {"link", "img", "iframe"} & {tag for tag, _ in tags.seen}
    assert not any({"href", "src"} & attrs.keys() for _, attrs in tags.seen)
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text, "no other script runs"
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return tags


def record(name="run", steps=3, **config):
    metrics = [{"step": 0, "split": "valid", "loss": 2.0}]
    metrics += [{"step": i, "split": "train", "loss": 2.0 / i, "grad_norm": 0.5} for i in range(1, steps + 1)]
    metrics += [{"step": steps, "split": "valid", "loss": 1.0}]
    return Record(name, {"iters": steps, "seed": 0, **config}, metrics)


def test_a_run_leaves_its_page(tmp_path, eager):
    folder = tmp_path / "adapters"
    results = ml.sft(**OPTIONS, adapter_path=str(folder))
    text = (folder / "report.html").read_text(encoding="utf-8")
    tags = check(text)
    charts = [attrs["data-metric"] for tag, attrs in tags.seen if tag == "svg"]
    assert charts[0] == "loss" and {"grad_norm", "perplexity", "tokens"} <= set(charts) and len(set(charts)) == len(charts)
    assert "learning_rate" not in charts and "equals tokens" in text, "constant and equal metrics have no chart"
    assert "prefers-color-scheme: dark" in text and results["report"] == str(folder / "report.html")
    for title in ("Results", "Before and after", "Configuration", "Environment"):
        assert f"<h2>{title}</h2>" in text
    assert "num_layers" in text and "<td>mlx</td>" in text and "<td>shapes compiled</td>" in text
    assert str(starter.model_path()) not in text and str(tmp_path) not in text
    assert sorted(file.name for file in folder.iterdir() if file.name.startswith(".")) == [MARKER]


def test_a_stopped_run_leaves_its_page(tmp_path, eager, monkeypatch):
    def stop(self, step, total):
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("mlxlora.reporting.terminal.Terminal.progress", stop)
    with pytest.raises(KeyboardInterrupt):
        ml.sft(**OPTIONS, adapter_path=str(tmp_path / "adapters"))
    text = (tmp_path / "adapters" / "report.html").read_text()
    check(text)
    assert "Stopped after step 3" in text
    assert "The run was stopped after step 3." in (tmp_path / "adapters" / "README.md").read_text()


def test_a_resumed_run_is_shown_whole(tmp_path, eager):
    ml.sft(**OPTIONS, adapter_path=str(tmp_path))
    ml.sft(**OPTIONS | {"iters": 6}, adapter_path=str(tmp_path), resume=True)
    found = read_record(tmp_path).curves()["loss"]["train"]
    assert [step for step, _ in found] == [2, 4, 6]
    assert "train, step 2: " in (tmp_path / "report.html").read_text()


def test_answers_at_the_validations_between(tmp_path, eager, capsys):
    """As samples; those of the first and the last step are the answers before and after."""
    options = OPTIONS | {"iters": 6, "steps_per_eval": 2, "answers": 2}
    ml.sft(**options, adapter_path=str(tmp_path / "asked"))
    ml.sft(**options | {"answers": 0}, adapter_path=str(tmp_path / "not"))
    samples = read_record(tmp_path / "asked").samples
    assert [(row["step"], row["prompt"]) for row in samples] == [(s, p) for s in (2, 4) for p in ("add 5 and 3.", "add 21 and 34.")]
    assert all(row["completion"] and row["expected"] and "reward" not in row for row in samples)
    assert f"    'add 5 and 3.' -> {samples[0]['completion']!r}" in capsys.readouterr().out.splitlines()
    text = (tmp_path / "asked" / "report.html").read_text()
    assert "Completions, first and last" in text and "<th>expected</th><th>completion</th></tr>" in text
    assert not (tmp_path / "not" / "samples.jsonl").exists()
    losses = [[row["loss"] for row in read_record(tmp_path / name).metrics] for name in ("asked", "not")]
    assert losses[0] == losses[1]


def test_a_model_that_does_not_generate_is_asked_no_more(tmp_path, eager, capsys, monkeypatch):
    def fails(*_, **__):
        raise ValueError("no cache")

    monkeypatch.setattr("mlxlora.training.answers.generate", fails)
    ml.sft(**OPTIONS | {"steps_per_eval": 2}, adapter_path=str(tmp_path))
    assert capsys.readouterr().out.count("this model does not generate (no cache)") == 1
    assert "Before and after" not in (tmp_path / "report.html").read_text()


def test_no_answers(tmp_path, eager, monkeypatch):
    monkeypatch.setattr("mlx_lm.generate", None)
    ml.sft(**OPTIONS, answers=0, adapter_path=str(tmp_path))
    assert "Before and after" not in (tmp_path / "report.html").read_text()


def test_before_anything_was_reported(tmp_path):
    Page(tmp_path).finish({"stopped": "after step 0"})
    check((tmp_path / "report.html").read_text())


def test_the_datas_markup_is_text():
    bad = "<script>alert(1)</script>&\"'"
    samples = [{"step": 1, "prompt": [{"role": "user", "content": bad}], "completion": bad, "reward": None}]
    found = Record(bad, {"model": bad, "data": bad}, [{"step": 1, "split": "train", "loss": 1.0, bad: 1.0}], samples)
    check(run_page(found, more=PageParts({bad: bad}, [{"prompt": bad, "before": bad, "after": bad}], {bad: bad})))
    check(comparison_page([found, Record(bad + "2", {"model": "m"}, found.metrics)]))


@given(st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), max_size=60))
@settings(deadline=None, max_examples=60)
def test_every_curve_can_be_drawn(points):
    svg = chart("metric", [Line("train", sorted(points))])
    for value in re.findall(r' (?:x|y|x1|y1|cx|cy)="(.*?)"', svg):
        assert -1 <= float(value) <= 500
    if svg:
        ElementTree.fromstring(svg)
    assert bool(svg) == any(abs(value) < float("inf") for _, value in points)


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6))
@settings(deadline=None)
def test_ticks_lie_within_and_are_few(low, span):
    found = ticks(low, low + span)
    assert len(found) <= 6 and all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) + 1e-9 for tick in found)


def test_long_curves_are_thinned():
    points = thinned([(i, 1.0) for i in range(5000)])
    assert len(points) <= 400 and all(value == 1.0 for _, value in points)


def test_help_imports_neither_templates_nor_the_hub():
    code = "import sys; sys.argv[1:] = ['--help']\nfrom mlxlora_cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "sys.exit(bool({'jinja2', 'huggingface_hub', 'mlx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_page_plot_and_trackers_read_the_same_numbers():
    row = {"step": 1, "split": "train", "loss": 1.0, "note": "text", "kl": None, "reward": 2}
    assert numbers(row) == {"loss": 1.0, "reward": 2}
    assert {name: splits["train"] for name, splits in curves([row]).items()} == {"loss": [(1, 1.0)], "reward": [(1, 2)]}


def test_outcome_and_difference():
    a, b = record("a"), record("b", steps=5, beta=0.1)
    assert outcome(a) == {"valid loss, best": "1 (step 3)", "valid loss": "1", "train grad_norm": "0.5"}
    assert differing([a, b]) == {"iters": [3, 5]}
    assert compact(float("1e6")) == "1.0e+06"


def test_losses_of_different_methods_stay_apart():
    """A policy's loss near 0 is no better than a cross entropy; rewards and speed compare."""
    rows = {"step": 1, "split": "train", "tokens_per_second": 5.0}
    sampled = [rows | {"step": i, "reward": i / 4, "loss": -0.25} for i in (1, 2)] + [{"step": 1, "split": "valid", "loss": -0.5}]
    runs = [record("a", method="sft"), Record("b", {"method": "grpo"}, sampled), Record("c", {"method": None}, [rows])]
    found = reached(runs)
    assert found["valid loss, best (sft)"] == ["1 (step 3)", "", ""] and found["valid loss (grpo)"] == ["", "-0.5", ""]
    assert found["train tokens_per_second"] == ["", "5", "5"]
    page = comparison_page(runs)
    assert "Loss (sft), train" in page and "Loss (grpo), train" in page and 'data-metric="train tokens_per_second"' in page
    assert page.index("Reward, mean, train") < page.index("Loss (sft), train") < page.index("Other curves")
    assert page.index("Other curves") < page.index('data-metric="train tokens_per_second"')
    legend = page[page.index('<p class="legend">') :].partition("</p>")[0]
    assert [name in legend for name in ("a</span>", "b</span>", "c</span>")] == [True] * 3, "all runs, however long their names are"
    assert list(reached(runs[:1] * 2)) == ["valid loss, best", "valid loss", "train grad_norm"]


def test_half_a_line_is_left_out(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").record({"step": 1, "split": "train", "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sp')
    assert len(past_run(tmp_path).metrics) == 1


def runs(tmp_path):
    for name, rate in (("one", 1e-4), ("two", 2e-4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"model: m\niters: 3\nlearning_rate: {rate}\n")
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in record().metrics))
    return tmp_path / "one", tmp_path / "two"


def test_the_command(tmp_path, mlxlora):
    one, two = runs(tmp_path)
    done = mlxlora("report", one, two, "--output", tmp_path / "both.html")
    assert done.code == 0, done.err
    assert "valid loss, best" in done.out and "learning_rate" in done.out and "iters" not in done.out
    text = (tmp_path / "both.html").read_text()
    check(text)
    assert text.count("<polyline") == 6 and "valid loss" in text
    assert mlxlora("report", one, "--output", tmp_path / "one.html").code == 0
    check((tmp_path / "one.html").read_text())


def test_no_run_there(tmp_path, mlxlora):
    done = mlxlora("report", tmp_path)
    assert done.code == 2 and done.err == f"mlxlora: error: {tmp_path}: no metrics.jsonl there; name the --adapter-path of a run\n"


def test_folders_of_runs_and_others(tmp_path, mlxlora):
    _, two = runs(tmp_path)
    (tmp_path / "empty").mkdir()
    lower = (two / "metrics.jsonl").read_text().replace('"loss": 1.0}', '"loss": 0.5}')
    (two / "metrics.jsonl").write_text(lower)
    done = mlxlora("report", tmp_path, tmp_path / "empty", "--output", tmp_path / "page.html")
    assert done.code == 0 and f"note: {tmp_path / 'empty'} is not a run" in done.out
    assert done.out.index("learning_rate") < done.out.index("valid loss") and "0.5 (step 3) *" in done.out
    text = (tmp_path / "page.html").read_text()
    assert 'class="best">0.5 (step 3)<' in text and text.index("Options that differ") < text.index("Results")


def test_the_page_of_a_run_that_goes_on(tmp_path):
    times = iter([0.0, 5.0, 20.0, 20.5, 21.0, 60.0, 61.0])
    page = Page(tmp_path, clock=lambda: next(times))
    page.overview({"trained": "LoRA of rank 8, 2.88M parameters (0.48%)", "data": "12,000 rows, 2M tokens"})
    file = tmp_path / "report.html"
    MetricsFile(tmp_path / "metrics.jsonl").record({"step": 5, "split": "train", "loss": 1.0})
    seen = []
    for _ in range(4):
        page.record({"step": 5, "split": "train"})
        seen.append(file.exists() and file.stat().st_mtime_ns)
    assert not seen[0] and seen[1] and seen[1] == seen[2] < seen[3]
    text = file.read_text()
    check(text)
    assert "<b>2.88M</b><span>parameters trained (0.48%)</span>" in text and "<b>12,000</b>" in text


def test_figures_of_a_sampled_run_lead_with_its_reward():
    rows = [{"step": s, "split": "valid", "loss": -r, "reward": r} for s, r in ((0, 0.1), (5, 0.5))]
    told = [what for _, what in figures(Record("run", {"method": "grpo"}, rows))]
    assert told[0] == "best validation, reward (step 5)" and not any("loss" in what for what in told)


def test_a_validation_that_never_moves_is_not_drawn_beside_training():
    train, valid = [(1, 0.5), (2, 0.25)], [(0, 1.0), (2, 1.0)]
    svg = metric_chart("frac_reward_zero_std", {"train": train, "valid": valid})
    assert "train 0.25" in svg and "valid" not in svg
    assert "valid 1" in metric_chart("frac_reward_zero_std", {"train": train, "valid": valid[:1]})
    assert "valid 1" in metric_chart("frac_reward_zero_std", {"valid": valid}), "all that there is"


def test_a_chart_is_drawn_so_that_its_course_is_seen():
    noisy = [(i, 1.0 + (i % 2) + i / 100) for i in range(1, 80)]
    svg = chart("Loss", [Line("train", noisy), Line("valid", [(0, 90.0), (40, 1.5), (79, 1.2)], 1, dotted=True)], "loss")
    assert 'class="line raw line0"' in svg and svg.count("dotted") == 1 and "outside" in svg
    assert ">step<" in svg and 'data-metric="loss"' in svg and "log axis" not in svg
    assert "log axis" in chart("Perplexity", [Line("valid", [(1, 900.0), (2, 30.0), (3, 3.0)])])


class Axes:
    def __init__(self):
        self.drawn = {}

    def plot(self, steps, values, label, **_):
        self.drawn[label] = list(zip(steps, values, strict=True))

    def __getattr__(self, name):
        return lambda *_, **__: None


def test_plot_with_a_stand_in(tmp_path, monkeypatch):
    axes = [Axes() for _ in range(3)]

    class Figure:
        def __init__(self, **_):
            self.flat = iter(axes)

        def subplots(self, *_, **__):
            return self

        def savefig(self, file, **_):
            file.write_bytes(b"png")

    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    folder, _ = runs(tmp_path)
    Plot(folder).finish({})
    assert (folder / "metrics.png").read_bytes() == b"png"
    assert axes[0].drawn["valid"] == [(0, 2.0), (3, 1.0)] and set(axes[0].drawn) == {"train", "valid"}
    assert set(axes[1].drawn) == {"train"} and not axes[2].drawn


def test_plot_without_metrics(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=None))
    Plot(tmp_path).finish({})
    assert not list(tmp_path.iterdir())


def test_plot_needs_its_package(tmp_path, mlxlora, monkeypatch):
    monkeypatch.setattr("mlxlora.training.startup.find_spec", lambda name: None)
    monkeypatch.setattr("mlxlora.adapters.prepare.load", None)
    done = mlxlora("sft", "--plot", "--adapter-path", tmp_path / "a")
    assert done.code == 2 and done.err == "mlxlora: error: --plot needs matplotlib: pip install 'mlxlora[plot]'\n"
    assert not (tmp_path / "a").exists()


def test_a_negative_log_likelihood_that_is_the_loss_is_not_drawn_twice():
    rows = [{"step": 1, "split": "train", "loss": 2.0, "nll": 2.0}, {"step": 2, "split": "train", "loss": 1.0, "nll": 1.0}]
    assert list(Record("run", metrics=rows).curves()) == ["loss"]
    rows[1]["nll"] = 0.5
    assert list(Record("run", metrics=rows).curves()) == ["loss", "nll"]


def test_answers_are_of_prompts_as_a_person_reads_them(tmp_path, eager, capsys):
    rows = [{"question": "add 2 and 2.", "answered": "4"}, {"text": "words"}, {"question": "add 2 and 3.", "answered": "5"}]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = OPTIONS | {"data": str(tmp_path), "batch_size": 2, "mask_prompt": False, "answers": 3}
    keys = {"prompt_key": "question", "completion_key": "answered"}
    ml.sft(**options, **keys, use_chat_template=True, adapter_path=str(tmp_path / "adapters"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1].strip() for line in lines if line.startswith(("prompt", "expected"))] == [
        *("add 2 and 2.", "4"),
        *("add 2 and 3.", "5"),
    ]
    assert sum(line.startswith(("before", "after")) for line in lines) == 4
