"""Fixtures: the real COCO sample where it is present, a made-up world, scripts run here and on ranks."""

import gc
import importlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

import ranks
from demo import world

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def pytest_collection_finish():
    """launch() collects garbage after every run: spare it what is imported, half a million objects."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


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
            ranks.launch(importlib.import_module(script).main)
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    return run_script


def _rank(rank: int, env: dict, script: str, options: tuple, said: Path) -> None:
    """One rank of a script, in a process of its own; what it prints goes to the file `said`."""
    sys.stdout = sys.stderr = open(said, "w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = [f"{script}.py", *map(str, options)]
    ranks.launch(importlib.import_module(script).main)


@pytest.fixture
def run_ranks(tmp_path_factory):
    """run_ranks(2, "eval_goi", "--train", ...) -> exit codes and outputs of the ranks, as under torchrun.

    They are forked: torch and the models' libraries, seconds to import, are there already.
    """

    def run_script(world: int, script: str, *options, seconds: int = 300) -> tuple[list, list[str]]:
        importlib.import_module(script)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        files = [tmp_path_factory.mktemp("said") / f"rank{rank}" for rank in range(world)]
        fork = multiprocessing.get_context("fork").Process
        ranks = [fork(target=_rank, args=(i, env, script, options, files[i])) for i in range(world)]
        for process in ranks:
            process.start()
        end = time.monotonic() + seconds
        for process in ranks:
            process.join(max(0, end - time.monotonic()))
        for process in ranks:
            process.kill()  # if it hangs
            process.join()
        return [process.exitcode for process in ranks], [file.read_text() for file in files]

    return run_script
