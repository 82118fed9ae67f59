"""Processes: what a script's end looks like from outside, what is said at the start, sums over the ranks."""

import argparse
import os
import sys
from pathlib import Path

import fairscale
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision

import ranks


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, says",
    [
        (ValueError("--lr must be positive"), 2, "script.py: --lr must be positive\n"),
        (FileNotFoundError("no such file"), 2, "script.py: no such file\n"),
        (FloatingPointError("not finite at step 5"), 2, "script.py: not finite at step 5\n"),
        (KeyboardInterrupt(), 130, "script.py: interrupted; if the script has --resume, that goes on "),
        (
            RuntimeError("DataLoader worker (pid 7) is killed"),
            2,
            "script.py: a loader process died, for lack of memory, or",
        ),
    ],
)
def test_the_users_errors_are_one_line_and_an_exit_code(error, code, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/script.py", "--lr", "0"])
    with pytest.raises(SystemExit) as stop:
        ranks.launch(raising(error))
    err = capsys.readouterr().err
    assert stop.value.code == code and err.startswith(says) and err.count("\n") == 1
    assert not dist.is_initialized()


def test_other_errors_keep_their_traceback(monkeypatch):
    """Those of a library, whatever their type, and those that no user can mend."""
    monkeypatch.setattr(ranks, "__file__", str(Path(__file__).parent / "elsewhere" / "ranks.py"))
    with pytest.raises(ValueError, match="a library's"):
        ranks.launch(raising(ValueError("a library's")))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ranks.launch(raising(RuntimeError("mat1 and mat2")))


def test_what_runs_is_said_first_one_line_for_each_group_of_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--lr", "a b"])
    p = argparse.ArgumentParser()
    p.add_argument("--lr")
    p.add_argument_group("data").add_argument("--coco", default="coco")
    ranks.add_process_options(p)
    args = p.parse_args(["--lr", "a b"])
    args.tasks = ["detection"]  # no option
    try:
        one = ranks.start(args, p)
        assert (one.rank, one.world, one.device.type, one.dtype) == (0, 1, "cpu", torch.float32)
    finally:
        dist.destroy_process_group()
    command, versions, device, *options = capsys.readouterr().out.splitlines()
    assert command.startswith("script.py --lr 'a b' | commit ")
    for module in (torch, torchvision, timm, fairscale):
        assert f"{module.__name__} {module.__version__.partition('+')[0]}" in versions
    assert device == "1 x cpu, backbone in fp32"
    assert options == [
        "options: lr=a b",
        "data: coco=coco",
        "processes: backbone_dtype=auto workers=None seed=0",
        "also: tasks=['detection']",
    ]


def test_loader_processes_are_two_a_task_or_as_the_cores_allow(monkeypatch):
    for cores, world, tasks, expected in (
        (16, 1, 1, 2),
        (16, 1, 3, 2),
        (16, 8, 1, 2),
        (16, 8, 3, 1),
        (3, 1, 3, 1),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
        assert ranks.loader_processes(tasks) == expected


def test_the_draws_of_a_step_and_rank_are_its_own():
    drawn = {}
    for rank in range(2):
        one = ranks.Ranks(rank, 2, torch.device("cpu"), torch.float32)
        for step in range(3):
            one.seed(5, step)
            drawn[rank, step] = float(torch.rand(()))
    assert len(set(drawn.values())) == 6
    one.seed(5, 0)
    assert float(torch.rand(())) == drawn[1, 0]


def test_tensors_are_moved_wherever_they_are():
    moved = ranks.to_device([{"a": torch.ones(2)}, (torch.ones(3), None, "name", 5)], torch.device("meta"))
    assert moved[0]["a"].is_meta and moved[1][0].is_meta and moved[1][1:] == (None, "name", 5)
    assert isinstance(moved, list) and isinstance(moved[1], tuple)


def two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mine = {1: "b", 3: "d"} if rank else {0: "a", 2: "c"}
    everyones = ranks.gather(mine)
    assert list(everyones.items()) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    assert ranks.mean_over_ranks([rank, 3.0], torch.device("cpu")).tolist() == [0.5, 3.0]
    try:
        ranks.gather({0: "twice"})
    except AssertionError as error:
        assert "answered on two ranks" in str(error)
    else:
        raise SystemExit("the same item on two ranks was not noticed")
    dist.destroy_process_group()


def test_answers_and_means_of_two_ranks(tmp_path):
    mp.start_processes(two_ranks, (str(tmp_path),), nprocs=2, start_method="forkserver")
    alone = ranks.mean_over_ranks([2.0], torch.device("cpu"))  # no group: as in a test, or a notebook
    assert alone.tolist() == [2.0]


def test_only_the_first_rank_speaks(capsys):
    for rank in (0, 1):
        one = ranks.Ranks(rank, 2, torch.device("cpu"), torch.float32)
        one.say(f"rank {rank}", "done")
        one.say()
    assert capsys.readouterr().out == "rank 0\ndone\n"


def test_without_git_the_commit_is_unknown(monkeypatch):
    """As in slim containers."""
    monkeypatch.setenv("PATH", "")
    assert ranks.provenance()["commit"] == "unknown"


@pytest.mark.parametrize("seed, good", [(0, True), (2**63 - 1, True), (2**63, False), (-1, False)])
def test_seeds_are_those_that_torch_takes(seed, good):
    args = argparse.Namespace(workers=0, seed=seed)
    if good:
        ranks.check_process_options(args)
        torch.Generator().manual_seed(seed)
    else:
        with pytest.raises(ValueError, match=f"--seed must be at least 0 and below 2.63, got {seed}"):
            ranks.check_process_options(args)
