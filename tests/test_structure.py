"""Who may import whom: scripts never each other, leaves nothing of ours."""

import ast

from tests.stages import ROOT

SOURCES = [p for p in ROOT.rglob("*.py") if not {".venv", "out"} & set(p.relative_to(ROOT).parts)]
OURS = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in SOURCES}
FOLDERS = {"heads", "data", "scores"}
RULES = {  # what each module imports of ours, at most; those of a folder that are not named follow its own
    "weights": (),
    "files": (),
    "ranks": (),
    "heads.matching": (),
    "heads.transformer": (),
    "heads": ("heads", "ranks"),
    "data": ("data", "files"),
    "scores": ("scores",),
    "lora": ("files",),
    "backbone": ("files", "weights", "ranks"),
    "training": ("ranks", "files"),
    "tasks": ("data", "heads", "files"),
    "evaluation": ("ranks", "files", "lora"),
    "feature_cache": ("backbone", "ranks", "files", "data.stream"),
    "clip": ("lora", "files", "backbone", "ranks", "weights"),
    "blip2": ("lora", "files", "backbone", "ranks", "weights"),
    "vlm": ("lora", "files", "blip2"),
    "answers": ("ranks", "blip2", "vlm"),
}


def imports(module: str) -> set[str]:
    """The project's modules that a module imports, anywhere in it."""
    tree, names = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removesuffix(".__init__") for name in names} & (OURS | FOLDERS)


def is_script(module: str) -> bool:
    path = ROOT / f"{module}.py"
    return path.is_file() and '__name__ == "__main__"' in path.read_text()


def within(name: str, allowed: tuple[str, ...]) -> bool:
    """Whether a module is one of those allowed, in one of those folders, or the folder of one."""
    return any(f"{name}.".startswith(f"{one}.") or f"{one}.".startswith(f"{name}.") for one in allowed)


def test_imports_go_one_way():
    scripts = {module for module in OURS if "." not in module and is_script(module)}
    assert {"stage1_heads", "stage2_lora"} <= scripts
    for module in OURS:
        found, folder = imports(module), module.partition(".")[0]
        if module in scripts:
            assert not found & scripts, f"{module} imports the script {found & scripts}"
            wrong = {name for name in found if name.partition(".")[0] in ("tests", "benchmarks", "demo")}
            assert not wrong, f"{module} imports {wrong}"
        elif "." not in module or folder in FOLDERS:
            allowed = RULES[module] if module in RULES else RULES[folder]
            wrong = {name for name in found if not within(name, allowed)}
            assert not wrong, f"{module} imports {wrong}; it may import {allowed or 'nothing of ours'}"
