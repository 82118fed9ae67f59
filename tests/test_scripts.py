"""Every script: what --help needs, options that torchrun lets through, the paper's lines in their order."""

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys

import pytest
from torch.distributed.run import get_args_parser

from tests.stages import ROOT

SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if "    launch(main)" in path.read_text()]
LINES = {  # of the algorithms, all but `end for`
    "stage1_heads": (1, "1234"),
    "stage2_lora": (2, "12345"),
    "eval_ocr": (3, "12346"),
    "eval_goi": (3, "12346"),
    "eval_zeroshot": (3, "12346"),
    "eval_vqa": (3, "12346"),
    "eval_caption": (3, "12346"),
}
SLOW = ["timm", "torchvision", "transformers", "open_clip", "matplotlib"]  # seconds to import
HELP = """
import contextlib, io, json, runpy, sys

scripts, slow = map(json.loads, sys.argv[1:])
for script in scripts:
    sys.argv, said, code = [f"{script}.py", "--help"], io.StringIO(), None
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(f"{script}.py", run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    print(json.dumps([script, code, said.getvalue()[:6], [name for name in slow if name in sys.modules]]))
"""


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """With those of its subcommands."""
    found = {o for action in parser._actions for o in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(options_of, action.choices.values()))
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_torchrun_take_every_option(script, run, monkeypatch):
    """torchrun refuses an option that begins several of its own, even where it is the script's."""
    code, shown, _ = run(script, "--help")
    assert code == 0 and importlib.import_module(script).__doc__.splitlines()[0] in shown
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda p: parsers.append(p) or sys.exit(0))
    assert run(script)[0] == 0
    options = options_of(parsers[0]) - {"-h", "--help"}
    own = options_of(get_args_parser())
    assert options & {"--out", "--to"} and "--nproc-per-node" in own
    assert not [(o, t) for o in options for t in own if t.startswith(o) or t.replace("_", "-").startswith(o)]


def test_help_imports_nothing_slow():
    """All scripts in one process, as a user would call them one by one."""
    command = [sys.executable, "-c", HELP, json.dumps(SCRIPTS), json.dumps(SLOW)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        [script, 0, "usage:", []] for script in SCRIPTS
    ], result.stdout


def functions(script: str) -> dict[str, str]:
    """The source of each function of a script, in their order."""
    text = (ROOT / f"{script}.py").read_text()
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(text, node) for node in found}


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_comes_first(script):
    assert next(iter(functions(script))) == "main"


@pytest.mark.parametrize("script", LINES)
def test_the_papers_lines_are_there_in_their_order(script):
    """In every function the last mention of a line follows those of the lines before it."""
    algorithm, lines = LINES[script]
    mentioned = set()
    for name, source in functions(script).items():
        assert not re.search(rf"Alg\. [^{algorithm}\W], line", source), "another algorithm's line"
        last = {m[1]: m.start() for m in re.finditer(rf"Alg\. {algorithm}, line (\d)", source)}
        assert sorted(last, key=last.get) == sorted(last), f"{name}: lines {sorted(last, key=last.get)}"
        mentioned |= last.keys()
    assert mentioned == set(lines)
