"""Fixtures: the real COCO sample where it is present, a made-up world, and scripts run in this process."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import common
from demo import world

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def real_coco() -> Path:
    """50 + 50 real COCO images with their annotations."""
    if not (SHARED / "coco").is_dir():
        pytest.skip("needs ../shared/data/coco, which is not here")
    return SHARED / "coco"


@pytest.fixture(scope="session")
def real_ocr() -> Path:
    """284 real word crops with a gt.txt."""
    if not (SHARED / "ocr").is_dir():
        pytest.skip("needs ../shared/data/ocr, which is not here")
    return SHARED / "ocr"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """12 + 4 made-up scenes in COCO's layout."""
    out = tmp_path_factory.mktemp("scenes")
    world.write(out, "train2017", 12, 112, seed=0)
    world.write(out, "val2017", 4, 112, seed=1)
    return out


@pytest.fixture
def run(monkeypatch, capfd):
    """run("stage1_heads", "--task", ...) -> exit code, stdout, stderr, of main() as a script runs it."""

    def run_script(script: str, *options) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            common.launch(importlib.import_module(script).main)
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    return run_script
