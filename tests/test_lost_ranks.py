"""Two machines, and one that is lost."""

import os
import signal

import torch

from tests.stages import stage2
from tests.test_faults import ranks_of, same, started, wait_for


def test_two_machines_are_one_process_of_twice_the_batch(scenes, head, tmp_path, run):
    """Two torchrun agents that meet at an address, as on two machines (here both are this one)."""
    store = tmp_path / "rendezvous"
    agents = []
    for node in (0, 1):
        where = ("--nnodes", 2, "--node-rank", node, "--nproc_per_node", 1)
        meet = ("--rdzv-backend", "c10d", "--rdzv-id", store.name, "--rdzv-conf", "join_timeout=120")
        port = 20_000 + os.getpid() % 10_000
        meet += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1")
        options = stage2(scenes, tmp_path / "two", head, **{"save-every": 4})
        agents.append(started("-m", "torch.distributed.run", *where, *meet, "stage2_lora.py", *options))
    for agent in agents:
        said, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, said
    one = stage2(scenes, tmp_path / "one", head, batch=2, **{"save-every": 4})
    assert run("stage2_lora", *one)[0] == 0
    assert same(tmp_path / "two", tmp_path / "one", 1e-3)  # see test_restarts


def test_a_lost_rank_ends_the_job_and_one_process_goes_on(scenes, head, tmp_path, run):
    """Rank 1 is killed after the first checkpoint; one process with the whole batch takes the run up."""
    options = stage2(scenes, tmp_path / "lost", head, iters=400, **{"save-every": 4})
    agent = started("-m", "torch.distributed.run", "--nproc_per_node", 2, "stage2_lora.py", *options)
    wait_for(tmp_path / "lost" / "last.pt", agent)
    os.kill(ranks_of(agent, "stage2_lora.py")[-1], signal.SIGKILL)
    said, _ = agent.communicate(timeout=120)
    assert agent.returncode != 0 and "SIGKILL" in said
    at = torch.load(tmp_path / "lost" / "last.pt", weights_only=True)["step"]
    assert 4 <= at < 400 and at % 4 == 0

    state = torch.load(tmp_path / "lost" / "last.pt", weights_only=True)
    state["options"]["iters"] = at + 4  # a shorter run, so that the test ends
    torch.save(state, tmp_path / "lost" / "last.pt")
    rest = stage2(scenes, tmp_path / "lost", head, iters=at + 4, batch=2, **{"save-every": 4})
    code, _, err = run("stage2_lora", *rest, "--resume")
    assert code == 0, err
    assert torch.load(tmp_path / "lost" / "last.pt", weights_only=True)["step"] == at + 4
