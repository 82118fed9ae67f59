"""The fault drill: what goes wrong on long runs. It is said, and nothing is lost but what no checkpoint has.

The disk is full, the last checkpoint or images are damaged, a loader is lost. Ranks: test_lost_ranks.py
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.detection import Detection
from demo import world
from tests.stages import ROOT, losses, stage1, stage2


def started(*command) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, **pipes)


def wait_for(path: Path, process: subprocess.Popen, seconds: int = 120) -> None:
    """Until the file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes started by `pid`, and by those."""
    direct = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return direct + [c for child in direct for c in children(child)]


def ranks_of(agent: subprocess.Popen, script: str) -> list[int]:
    """The processes that torchrun started, rank 0 first."""
    command = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children(agent.pid)}
    return sorted(pid for pid, line in command.items() if script in line)


def same(one: Path, two: Path, tolerance: float) -> bool:
    """LoRA files equal within `tolerance` of the weights' norm."""
    a, b = (load_file(out / "lora.safetensors") for out in (one, two))
    a, b = (torch.cat([state[name].flatten() for name in sorted(state)]) for state in (a, b))
    return bool((a - b).norm() <= tolerance * b.norm())


def test_a_full_disk_at_a_checkpoint_is_one_line_and_the_last_one_is_kept(scenes, head, tmp_path, run):
    """The limit on a file's size stands in for the disk's."""
    assert run("stage2_lora", *stage2(scenes, tmp_path, head, iters=4))[0] == 0
    last = tmp_path / "last.pt"
    state = torch.load(last, weights_only=True)
    state["options"]["iters"] = 8  # as if it had been stopped half-way
    torch.save(state, last)
    kept = last.read_bytes()

    options = stage2(scenes, tmp_path, head, iters=8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, hard))
    try:
        code, _, err = run("stage2_lora", *options, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "Traceback" not in err
    assert f"{last}: not written: [Errno 27] File too large, at step 8. The last checkpoint is good" in err
    assert "--resume" in err
    assert last.read_bytes() == kept and not (tmp_path / "last.pt.tmp").exists()
    assert run("stage2_lora", *options, "--resume")[0] == 0


def test_a_damaged_last_checkpoint_falls_back_on_the_one_before(scenes, head, tmp_path, run):
    """Cut short, or with bytes flipped, which torch.load does not notice: the same end, bit for bit."""
    whole = tmp_path / "whole"
    options = {"save-every": 4, "log-every": 1}
    assert run("stage2_lora", *stage2(scenes, whole, head, **options))[0] == 0  # 8 steps
    good = (whole / "last.pt").read_bytes()
    weights = torch.load(whole / "last.pt", weights_only=True)["trained"]["blocks.0.attn.qkv.lora_B"]
    at = good.index(weights.numpy().tobytes())
    flipped = bytes(255 - byte for byte in good[at : at + 8])
    damaged = {"cut": good[: len(good) // 2], "flipped": good[:at] + flipped + good[at + 8 :]}
    for damage, content in damaged.items():
        out = tmp_path / damage
        shutil.copytree(whole, out)
        (out / "last.pt").write_bytes(content)
        code, said, err = run("stage2_lora", *stage2(scenes, out, head, **options), "--resume")
        assert code == 0, err
        assert f"{out / 'last.pt'} cannot be read (BadZipFile): going on from the one before it" in said
        assert same(out, whole, 0) and len(losses(out)) == 8 and losses(out) == losses(whole)
        states = (torch.load(folder / "last.pt", weights_only=True) for folder in (out, whole))
        ours, uninterrupted = (state["optimizer"]["state"] for state in states)
        assert all(torch.equal(m["exp_avg"], uninterrupted[k]["exp_avg"]) for k, m in ours.items())


def test_one_percent_of_the_images_damaged_is_refused_or_counted(tmp_path, run):
    """100 images, one of them cut short; the run that it stopped goes on from its checkpoint."""
    folder, out = tmp_path / "coco", tmp_path / "out"
    world.write(folder, "train2017", 100, 48, seed=0)
    stream = Detection(folder, "train2017")
    picture = folder / "train2017" / stream.names[stream.row_at(57)]  # its turn comes in the sixth step of 10
    picture.write_bytes(picture.read_bytes()[:400])
    options = stage1(folder, out, iters=10, batch=10, **{"save-every": 4})
    code, _, err = run("stage1_heads", *options)
    assert code == 2 and f"{picture} cannot be decoded" in err and "--skip-bad-images" in err
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    code, _, err = run("stage1_heads", *options, "--resume", "--skip-bad-images")
    assert code == 0, err
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("skipped_images")) for line in lines[2:]] == [(6, 1), (8, 1), (10, 1)]
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 10


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the worker")
def test_a_lost_loader_worker_is_said_and_the_run_resumes(scenes, head, tmp_path):
    options = stage2(scenes, tmp_path, head, iters=400, workers=1, **{"save-every": 2})
    process = started("stage2_lora.py", *options)
    wait_for(tmp_path / "last.pt", process)
    workers = [
        pid for pid in children(process.pid) if "stage2_lora" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in said, said[-3000:]
    assert "a loader process died" in said and "--workers" in said
    at = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert 2 <= at < 400
