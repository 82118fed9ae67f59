"""Fixtures: the real data where they are, a made-up world and its head, scripts run here and on ranks."""

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from demo import world
from ranks import launch
from tests.stages import ROOT, stage1

SHARED = Path(os.environ.get("VISFT_DATA") or ROOT.parent / "shared" / "data")  # the real data
needs_real_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"needs the real data, which is not in {SHARED}: set VISFT_DATA"
)
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.conftest", "fairscale.optim.oss", "torchvision", "transformers"])


def pytest_collection_finish():
    """launch() collects garbage after every run: spare it what is imported, half a million objects."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(scope="session")
def real_data():
    """real_data("ocr") -> that folder or file of the real data; the test is skipped where it is not."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs {name} of the real data, which is not in {SHARED}: set VISFT_DATA")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def real_coco(real_data) -> Path:
    """50 + 50 real COCO images with their annotations."""
    return real_data("coco")


@pytest.fixture(scope="session")
def real_ocr(real_data) -> Path:
    """284 real word crops with a gt.txt."""
    return real_data("ocr")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """12 + 4 made-up scenes in COCO's layout."""
    out = tmp_path_factory.mktemp("scenes")
    world.write(out, "train2017", 12, 112, seed=0)
    world.write(out, "val2017", 4, 112, seed=1)
    return out


@pytest.fixture
def broken(scenes, tmp_path):
    """broken(change) -> a copy of the made-up world whose instances JSON went through change(content).

    A text that `change` returns is written in its place. kind: of the annotation file
    """

    def copy(change=lambda content: None, kind: str = "instances") -> Path:
        folder = tmp_path / "coco"
        shutil.copytree(scenes, folder)
        path = folder / "annotations" / f"{kind}_train2017.json"
        content = json.loads(path.read_text())
        text = change(content)
        path.write_text(text if isinstance(text, str) else json.dumps(content))
        return folder

    return copy


@pytest.fixture(scope="session")
def head(scenes, tmp_path_factory) -> Path:
    """The folder of a detection head of the made-up world, hardly trained."""
    out = tmp_path_factory.mktemp("head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stage1_heads.py", *map(str, stage1(scenes, out))])
        with pytest.raises(SystemExit, match="0"):
            launch(importlib.import_module("stage1_heads").main)
    return out


@pytest.fixture
def run(monkeypatch, capfd):
    """run("stage1_heads", "--task", ...) -> exit code, stdout, stderr, of main() as a script runs it."""

    def run_script(script: str, *options) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            launch(importlib.import_module(script).main)
        out, err = capfd.readouterr()
        return stop.value.code, out, err

    return run_script


def _rank(rank: int, env: dict, script: str, options: tuple, said: Path, prepare: Callable | None) -> None:
    """One rank of a script, in a process of its own; what it prints goes to the file `said`."""
    sys.stdout = sys.stderr = open(said, "w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = [f"{script}.py", *map(str, options)]
    module = importlib.import_module(script)
    if prepare:
        prepare()
    launch(module.main)


@pytest.fixture
def run_ranks(tmp_path_factory):
    """run_ranks(2, "eval_goi", "--train", ...) -> exit codes and outputs of the ranks, as under torchrun.

    They are forked from a server that has imported the libraries, seconds each, and has no threads: what a
    thread of this process has locked would be locked in a rank for ever. `prepare` patches a rank. If they
    are not done in time, the test fails with the places where they hang.
    """

    def run_script(
        world: int, script: str, *options, seconds: int = 300, prepare: Callable | None = None
    ) -> tuple[list, list[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        files = [tmp_path_factory.mktemp("said") / f"rank{rank}" for rank in range(world)]
        arguments = [(rank, env, script, options, files[rank], prepare) for rank in range(world)]
        ranks = [FORKSERVER.Process(target=_rank, args=each) for each in arguments]
        for process in ranks:
            process.start()
        end = time.monotonic() + seconds
        for process in ranks:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in ranks]
        hanging = [rank for rank, code in enumerate(codes) if code is None]
        for rank in hanging:
            os.kill(ranks[rank].pid, signal.SIGUSR1)
        time.sleep(5 if hanging else 0)
        for rank in hanging:
            ranks[rank].kill()
            ranks[rank].join()
        said = [file.read_text() for file in files]
        if hanging:
            where = "\n".join(
                f"-- rank {rank}, exit code {codes[rank]}: {said[rank]}" for rank in range(world)
            )
            pytest.fail(f"ranks {hanging} of {world} were not done in {seconds} s\n{where}", pytrace=False)
        return codes, said

    return run_script
