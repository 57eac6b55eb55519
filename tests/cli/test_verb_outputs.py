"""Verbs find out whether their outputs can be written before they work, and lose no result at the end."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hf_sparse_attn.cli import options as cli_options
from hf_sparse_attn.cli.bench_output import beside
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.cli.options import emit
from hf_sparse_attn.experiments import steps
from hf_sparse_attn.system.locks import FolderInUseError, sole_use
from hf_sparse_attn.system.outputs import OutputError
from hf_sparse_attn.system.terminal import Terminal


def call(*arguments):
    CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


VERBS = {
    "run": ["run", "recipe.yaml"],
    "ablate": ["ablate", "recipe.yaml"],
    "distill": ["distill", "model", "out", "--text", "t"],
    "eval": ["eval", "model", "--text", "t"],
    "lm-eval": ["lm-eval", "model", "--tasks", "t"],
    "calibrate": ["calibrate", "model", "--text", "t", "--held-out", "u"],
    "synth": ["synth", "out", "--learn"],
    "card": ["card", "model", "--results", "r.json"],
    "architectures": ["architectures"],
    "doctor": ["doctor"],
    **{f"bench {name}": ["bench", name, "model", "--text", "t"][: 5 if name in ("model", "training") else 2] for name in
       ("attention", "backward", "decode", "router", "model", "training")},
}  # fmt: skip
OTHERS = {
    "eval": "--report",
    "lm-eval": "--report",
    "calibrate": "--report",
    "synth": "--report",
    "architectures": "--markdown",
}
OTHERS |= dict.fromkeys(("bench attention", "bench backward", "bench decode", "bench training"), "--plot")


@pytest.mark.parametrize(("verb", "option"), [*((verb, "--json") for verb in VERBS), *OTHERS.items()])
def test_every_output_of_every_verb_is_tried_first(verb, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for name in ("folder", "file/below.json"):
        with pytest.raises(OutputError, match=f"cannot write {name}: "):
            call(*VERBS[verb], option, name)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder"]


def test_two_outputs_of_one_name_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("a.html")
    with pytest.raises(ValueError, match=r"--(json|report) and --(json|report) both name"):
        call("eval", "model", "--text", "t", "--json", tmp_path / "a.html", "--report", tmp_path / "link")


@pytest.mark.parametrize("arguments", [["distill", "model", "OUT", "--text", "t"], ["synth", "OUT"]])
def test_a_folder_that_cannot_be_saved_into_is_said_first(arguments, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write into .*out: .*out is a file"):
        call(*(tmp_path / "out" if a == "OUT" else a for a in arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ["distill", "model", "OUT", "--text", "t"],
        ["synth", "OUT"],
        ["calibrate", "OUT", "--text", "t", "--held-out", "u"],
    ],
)
def test_a_folder_in_use_is_refused(arguments, tmp_path):
    with sole_use(tmp_path / "out"), pytest.raises(FolderInUseError, match="in use by process"):
        call(*(tmp_path / "out" if a == "OUT" else a for a in arguments))


def test_distill_needs_room_for_the_model(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sparse_attn.data.sources.free_bytes", lambda path: 1000)
    with pytest.raises(ValueError, match="MB free, the model needs"):
        call("distill", llama_folder, tmp_path / "out", "--text", "t")


# -- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["a.json", "-"])
def test_what_json_cannot_hold_is_named_and_the_rest_is_written(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = {"rows": [{"loss": 1.5}, {"loss": math.nan}], "worst": -math.inf}
    reports = []
    with pytest.raises(ValueError, match=r"not whole: rows\[1\]\.loss is nan; worst is -inf\."):
        emit(result, target, lambda: reports.append(1))
    written = json.loads(capsys.readouterr().out if target == "-" else Path(target).read_text())
    assert written["rows"] == [{"loss": 1.5}, {"loss": None}] and written["worst"] is None and reports == [1]
    assert written["not_finite"] == ["rows[1].loss is nan", "worst is -inf"]


def test_a_result_that_cannot_be_written_at_the_end_is_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(cli_options.tempfile, "tempdir", None)
    (tmp_path / "gone").write_text("what was a folder at the start")
    with pytest.raises(OutputError, match="the result is in ") as raised:
        emit({"a": 1}, str(tmp_path / "gone" / "a.json"))
    assert json.loads(Path(str(raised.value).rpartition(" ")[2]).read_text()) == {"a": 1}


def test_a_plot_goes_beside_a_file_only(tmp_path):
    assert beside(str(tmp_path / "a.json")) == tmp_path / "a.svg"
    assert beside(str(tmp_path / "a.svg")) == tmp_path / "a.svg.svg"  # not over the JSON
    assert [beside(path) for path in (None, "-", "/dev/stdout", "/dev/null")] == [None] * 4


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two steps; (its class, its folder, what it printed, which steps ran)."""
    monkeypatch.setattr(steps, "LEAST_FREE_BYTES", 0)
    out, ran = io.StringIO(), []

    class Two(steps.Run):
        loss = math.nan

        def steps(self):
            return [steps.Step("one", self.one), steps.Step("two", self.two)]

        def one(self):
            ran.append("one")
            return {"windows": [{"loss": self.loss}]}

        def two(self):
            ran.append("two")
            return {}

        def finish(self, results):
            ran.append(results["one"]["windows"][0]["loss"])

    recipe = SimpleNamespace(raw={"name": "x"}, seed=0, smoke_run=False, model={"dtype": "float32"})
    created = lambda: Two(recipe, tmp_path / "run", Terminal(out))  # noqa: E731
    return SimpleNamespace(make=created, folder=tmp_path / "run", out=out, ran=ran)


def test_a_step_with_a_nan_is_named_and_not_lost(run):
    for _ in range(2):
        results = run.make().main()
        assert math.isnan(results["one"]["windows"][0]["loss"])
        written = json.loads((run.folder / "results.json").read_text())
        assert written["one"]["windows"] == [{"loss": None}] and written["not_finite"] == ["one.windows[0].loss is nan"]
    assert "step one: windows[0].loss is nan" in run.out.getvalue() and run.ran.count("one") == 1


def test_a_report_that_fails_does_not_cost_the_results(run, monkeypatch):
    created = run.make()
    monkeypatch.setattr(type(created), "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        created.main()
    assert json.loads((run.folder / "results.json").read_text())["two"]["seconds"] >= 0


def test_a_run_in_a_folder_in_use_is_refused(run):
    with sole_use(run.folder), pytest.raises(FolderInUseError, match=r"in use by process .*, or give another --out"):
        run.make().main()
    assert not run.ran
    run.make().main()
    assert run.ran[:2] == ["one", "two"]


@pytest.mark.parametrize("name", ["results.json", "report.html", "model"])
def test_a_run_that_could_not_write_its_results_does_not_begin(run, name):
    run.folder.mkdir()
    (run.folder / name).mkdir() if "." in name else (run.folder / name).write_text("a file")
    with pytest.raises(OutputError, match=f"cannot write .*{re.escape(name)}"):
        run.make().main()
    assert not run.ran
