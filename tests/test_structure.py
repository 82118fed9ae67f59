"""Who may import whom: scripts never each other, leaves nothing of ours."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for p in ROOT.rglob("*.py") if not {".venv", "out"} & set(p.relative_to(ROOT).parts)]
OURS = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in SOURCES}
LEAVES = {"backbone", "lora", "common", "heads.matching", "heads.transformer"}
INNER = {"heads": "heads", "data": "data", "evaluation": ("common", "lora")}  # import only these


def imports(module: str) -> set[str]:
    """The project's modules that a module imports by name."""
    tree, names = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removesuffix(".__init__") for name in names} & (OURS | {"heads", "data"})


def is_script(module: str) -> bool:
    path = ROOT / f"{module}.py"
    return path.is_file() and '__name__ == "__main__"' in path.read_text()


def test_imports_go_one_way():
    scripts = {module for module in OURS if "." not in module and is_script(module)}
    assert {"stage1_heads", "stage2_lora"} <= scripts
    for module in OURS:
        found = imports(module)
        if module in LEAVES:
            assert not found, f"{module} is a leaf, but imports {found}"
        elif inner := INNER.get(module.partition(".")[0]):
            assert all(name.startswith(inner) for name in found), f"{module} imports {found}"
        elif "." not in module:
            assert not found & scripts - {module}, f"{module} imports the script {found & scripts}"


def test_paper_lines_can_be_found():
    """Lines 1-4 of Algorithm 1, 1-5 of 2, 1-4 and 6 of 3: all but `end for`."""
    scripts = [("stage1_heads.py", 1, (1, 2, 3, 4)), ("stage2_lora.py", 2, (1, 2, 3, 4, 5))]
    scripts += [(script, 3, (1, 2, 3, 4, 6)) for script in ("eval_ocr.py", "eval_goi.py")]
    for script, algorithm, lines in scripts:
        text = (ROOT / script).read_text()
        at = [text.index(f"Alg. {algorithm}, line {line}") for line in lines]
        assert at[0] < at[1] and at[2:] == sorted(at[2:])
