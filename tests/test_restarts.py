"""Both stages in processes of their own: two ranks are one, a killed run goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import training
from tests.stages import ROOT, logged, losses, stage1, stage2


def launched(*command, **options) -> subprocess.CompletedProcess:
    """In a process of its own, under torchrun if --nproc_per_node is given."""
    start = ["-m", "torch.distributed.run"] if "--nproc_per_node" in command else []
    command = [sys.executable, *start, *map(str, command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, **options)


def test_torchrun_with_two_processes_is_one_with_twice_the_batch(scenes, head, tmp_path, run):
    """To 1e-3 of the weights' norm: fp32 sums in another order, enlarged by Adam's tiny divisors."""
    options = stage2(scenes, tmp_path / "two", head, **{"save-every": 4})
    result = launched("--nproc_per_node", 2, "stage2_lora.py", *options)
    assert result.returncode == 0, result.stderr
    assert "terminate called" not in result.stderr and "Warning" not in result.stderr.replace("OMP_NUM", "")
    code, *_ = run("stage2_lora", *stage2(scenes, tmp_path / "one", head, batch=2, **{"save-every": 4}))
    assert code == 0
    two, one = (load_file(tmp_path / n / "lora.safetensors") for n in ("two", "one"))
    for part in ("lora_A", "lora_B"):
        pairs = [(two[n], one[n]) for n in one if n.endswith(part)]
        difference = sum((a - b).square().sum() for a, b in pairs).sqrt()
        assert difference < 1e-3 * sum(b.square().sum() for _, b in pairs).sqrt()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    written = {"lora.safetensors", "lora_000004.safetensors", "lora_000008.safetensors"}
    assert written < {path.name for path in (tmp_path / "two").iterdir()}
    for out in ("two", "one"):
        for line in map(json.loads, (tmp_path / out / "log.jsonl").read_text().splitlines()):
            assert 0 <= line["waiting"] <= 1 and line["seconds"] > 0
            images = line["images_per_second"] * line["seconds"]  # of both ranks
            assert images == pytest.approx(2, rel=0.05)  # both are rounded


def killed_at_its_second_checkpoint() -> None:
    save = training.Checkpoint.save

    def once(self, step: int) -> None:
        if step > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, step)

    training.Checkpoint.save = once


@pytest.mark.parametrize("stage", ["stage1_heads", "stage2_lora"])
def test_killed_and_resumed_is_bit_identical_to_uninterrupted(scenes, head, tmp_path, run, run_ranks, stage):
    """Killed at step 6 of 8, the last checkpoint at 3; resumed with other workers; with dropout."""
    options = stage1(scenes, "OUT", iters=8) if stage == "stage1_heads" else stage2(scenes, "OUT", head)
    options += ["--save-every", 3]

    def at(out):
        return [out if x == "OUT" else x for x in options]

    code, *_ = run(stage, *at(tmp_path / "whole"))
    assert code == 0
    options_of_parts = [*at(tmp_path / "parts"), "--workers", 1]
    codes, outs = run_ranks(1, stage, *options_of_parts, prepare=killed_at_its_second_checkpoint)
    assert codes == [-signal.SIGKILL], outs
    assert torch.load(tmp_path / "parts" / "last.pt")["step"] == 3
    code, *_ = run(stage, *at(tmp_path / "parts"), "--resume", "--workers", 2)
    assert code == 0
    name = "detection.safetensors" if stage == "stage1_heads" else "lora.safetensors"
    whole, parts = (load_file(tmp_path / n / name) for n in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(v, parts[k]) for k, v in whole.items())
    assert json.dumps(logged(tmp_path / "whole")) == json.dumps(logged(tmp_path / "parts"))
    code, _, err = run(stage, *at(tmp_path / "parts"), "--resume", "--lr", 1)
    assert code == 2 and "lr was" in err
