"""The benchmark page: made by benchmarks/run.py from stored results; README.md quotes nothing else."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def runner():
    spec = importlib.util.spec_from_file_location("benchmark_runner", ROOT / "benchmarks/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def elsewhere(runner, tmp_path, monkeypatch):
    """The runner with a folder of its own: a good benchmark, one that fails, one without a table."""
    doc = '"""What {0} measures.\n\n    python benchmarks/{0}.py\n\nThe disk limits\nit.\n"""\n'
    scripts = {
        "good": 'import sys\nprint("noise")\nprint("| a |\\n|---|\\n| %s |" % sys.argv[1:])\nprint("{}")\n',
        "fails": "raise SystemExit(3)\n",
        "bare": 'print("{}")\n',
        "chatty": 'print("| a |\\n|---|\\n| 1 |\\nthe end")\n',
    }
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, code in scripts.items():
        (folder / f"{name}.py").write_text(doc.format(name) + code)
    monkeypatch.setattr(runner, "HERE", folder)
    monkeypatch.setattr(runner, "load", lambda: 0.25)
    return runner


def start(runner, monkeypatch, *options) -> str | None:
    """Its exit code or message, None for success."""
    monkeypatch.setattr("sys.argv", ["run.py", *options])
    try:
        return runner.main()
    except SystemExit as stop:
        return stop.code


def test_the_page_is_what_the_runner_writes(runner):
    """So nobody edits it by hand, and a changed docstring is on it."""
    assert (ROOT / "benchmarks/README.md").read_text() == runner.page(runner.stored()), (
        "python benchmarks/run.py --only writes it anew"
    )
    strangers = {p.stem for p in (ROOT / "benchmarks/results").glob("*.json")} - set(runner.names())
    assert not strangers, "results of scripts that are not there"


def test_every_benchmark_can_be_run_by_the_runner(runner):
    """A docstring with a title and its command, a table, JSON last, and no option that must be given."""
    for name in runner.names():
        text = (ROOT / f"benchmarks/{name}.py").read_text()
        doc = ast.get_docstring(ast.parse(text))
        assert doc and f"python benchmarks/{name}.py" in doc and "\n\n" in doc, name
        assert "json.dumps" in text and "|---" in text or "evaluation.table" in text, name
        assert "required=True" not in text, name


def test_runs_store_tables_and_failures_keep_the_old(elsewhere, monkeypatch, capfd):
    told = start(elsewhere, monkeypatch, "--only", "good", "fails", "bare", "chatty")
    assert told == "run.py: failed: fails, bare, chatty; their old results stay"
    said = capfd.readouterr()
    assert "noise" in said.out and "$ python benchmarks/good.py\n" in said.out  # shown as it comes
    assert "fails.py failed with exit code 3" in said.err and "bare.py has printed no markdown" in said.err
    assert "chatty.py: the last line is not JSON: 'the end'" in said.err
    result = json.loads((elsewhere.HERE / "results/good.json").read_text())
    assert result["table"] == "| a |\n|---|\n| [] |" and result["answer"] == {} and result["load"] == 0.25
    page = (elsewhere.HERE / "README.md").read_text()
    assert "## What good measures\n\nThe disk limits\nit.\n\n    python benchmarks/good.py\n" in page
    assert f"{result['date']}; other processes took 25% of the CPU at the start.\n\n| a |" in page
    assert "noise" not in page and "## What bare measures" in page and "Not measured yet." in page
    assert f"{elsewhere.machine()}.\n" in page


def test_a_quick_run_stores_nothing(elsewhere, monkeypatch, capfd):
    monkeypatch.setattr(elsewhere, "QUICK", {"good": ["--rounds", 1]})
    assert start(elsewhere, monkeypatch, "--only", "good", "--quick") is None
    assert "['--rounds', '1']" in capfd.readouterr().out
    assert not (elsewhere.HERE / "results").exists() and not (elsewhere.HERE / "README.md").exists()
    assert start(elsewhere, monkeypatch, "--only", "absent") == 2
    assert "no benchmark absent" in capfd.readouterr().err


def test_figures_in_the_readme_are_on_the_page():
    """Every number in a paragraph of README.md that points to the page, but those in code."""
    number = re.compile(r"\d[\d,]*(?:\.\d+)?")
    page = (ROOT / "benchmarks/README.md").read_text()
    paragraphs = (ROOT / "README.md").read_text().split("\n\n")
    quoting = [re.sub(r"`[^`]*`", "", part) for part in paragraphs if "(benchmarks/README.md)" in part]
    quoted = {figure for part in quoting for figure in number.findall(part)}
    assert quoted, "README.md quotes nothing, or does not say where from"
    assert not quoted - set(number.findall(page))
