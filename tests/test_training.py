"""The sharded optimizer against torch's, the schedule by hand, checkpoints, the log."""

import argparse
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import training
from tests.stages import logged


def arguments(**changed) -> argparse.Namespace:
    options = dict(lr=0.1, batch=2, seed=0, out="x", workers=0, weights="random")
    return argparse.Namespace(**{**options, **changed})


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 1))


def steps(network, optimizer, first, last, rank=0, world=1, lrs=(1e-2,)):
    """Train on a stream of batches of 4, of which each rank sees its part; returns the weights."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(first, last):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))[rank * 4 // world :][
            : 4 // world
        ]
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        training.minimize((network(x) ** 2).mean() * 3, optimizer, scaler)
    return [p.detach().clone() for p in network.parameters()]


def reference(last: int) -> list[torch.Tensor]:
    """Plain torch: AdamW, clip_grad_norm_, one process."""
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-4)
    for step in range(last):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        loss = (network(x) ** 2).mean() * 3
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
    return list(network.parameters())


def new_checkpoint(folder: Path, args, trained: dict, optimizer, scaler) -> training.Checkpoint:
    return training.Checkpoint(
        folder, args, trained, optimizer, scaler, {"data": "data"}, training.MAY_CHANGE
    )


def two_ranks(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    network = model()
    if rank:  # what trains is sent from rank 0
        nn.init.zeros_(network[0].weight)
    wrapped = training.parallel(network, torch.device("cpu"))
    optimizer = training.sharded_adamw([{"params": list(network.parameters())}])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(6):
        weights = steps(wrapped, optimizer, step, step + 1, rank, world)
        others = [torch.empty_like(torch.cat([w.flatten() for w in weights])) for _ in range(world)]
        dist.all_gather(others, torch.cat([w.flatten() for w in weights]))
        assert all(torch.equal(o, others[0]) for o in others)  # after every step
    assert 0 < len(optimizer.optim.state) < 8 // 2 + 3  # each rank keeps a part of the state
    trained = dict(network.named_parameters())
    checkpoint = new_checkpoint(Path(folder), arguments(), trained, optimizer, scaler)
    checkpoint.save(6)
    weights = steps(wrapped, optimizer, 6, 12, rank, world)
    if rank == 0:
        torch.save(weights, f"{folder}/two.pt")
    dist.barrier()
    del wrapped, optimizer, checkpoint
    dist.destroy_process_group()


def test_two_ranks_are_one_process_of_twice_the_batch_and_resume_as_one(tmp_path, group):
    """Against plain AdamW to fp32 rounding, then: saved by two ranks, resumed by one with twice the batch."""
    mp.start_processes(two_ranks, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    expected = reference(12)
    for ours, theirs in zip(torch.load(tmp_path / "two.pt"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)  # fp32 averages of halves
    network = model()
    optimizer = training.sharded_adamw([{"params": list(network.parameters())}])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trained = dict(network.named_parameters())
    checkpoint = new_checkpoint(tmp_path, arguments(batch=4), trained, optimizer, scaler)
    assert checkpoint.load() == 6
    for ours, theirs in zip(steps(network, optimizer, 6, 12), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_sharded_adamw_is_torchs_adamw(group):
    network = model()
    optimizer = training.sharded_adamw([{"params": list(network.parameters())}])
    for ours, theirs in zip(steps(network, optimizer, 0, 20), reference(20), strict=True):
        assert torch.equal(ours, theirs)


def test_the_schedule_by_hand():
    rate = lambda step: training.learning_rate(step, peak=4.0, warmup=4, iters=12)  # noqa: E731
    assert [rate(step) for step in range(4)] == [1.0, 2.0, 3.0, 4.0]
    assert rate(4) == 4.0 and rate(8) == pytest.approx(2.0) and rate(12) == pytest.approx(0.0)
    assert rate(6) == pytest.approx(2 * (1 + math.cos(math.pi / 4)))
    assert training.learning_rate(0, 4.0, 0, 10) == 4.0
    assert training.learning_rate(1, 4.0, 5, 3) == pytest.approx(1.6)  # a run shorter than its warm-up


def trained_checkpoint(folder: Path, step: int, args=None) -> tuple[training.Checkpoint, nn.Module]:
    network = model()
    optimizer = training.sharded_adamw([{"params": list(network.parameters())}])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trained = dict(network.named_parameters())
    checkpoint = new_checkpoint(folder, args or arguments(), trained, optimizer, scaler)
    if step:
        steps(network, optimizer, 0, step)
        checkpoint.save(step)
    return checkpoint, network


def test_a_checkpoint_is_tensors_and_json_and_restores_exactly(group, tmp_path):
    _, network = trained_checkpoint(tmp_path, 3)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3
    checkpoint, restored = trained_checkpoint(tmp_path, 0)
    assert checkpoint.load() == 3
    for a, b in zip(restored.parameters(), network.parameters(), strict=True):
        assert torch.equal(a, b)
    expected = reference(7)
    for ours, theirs in zip(steps(restored, checkpoint.optimizer, 3, 7), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_scale_of_fp16s_gradients_is_part_of_a_checkpoint(group, tmp_path):
    saved, resumed = (trained_checkpoint(tmp_path, 0)[0] for _ in range(2))
    saved.scaler = torch.amp.GradScaler("cpu", init_scale=32.0, growth_interval=7)
    resumed.scaler = torch.amp.GradScaler("cpu")
    saved.save(1)
    assert resumed.load() == 1 and resumed.scaler.get_scale() == 32
    assert resumed.scaler.state_dict() == saved.scaler.state_dict()


@pytest.mark.parametrize("damage", ["truncated", "gone", "leftover"])
def test_a_half_written_checkpoint_leaves_the_one_before(group, tmp_path, damage, capfd):
    checkpoint, network = trained_checkpoint(tmp_path, 2)
    steps(network, checkpoint.optimizer, 2, 4)
    checkpoint.save(4)
    last = tmp_path / "last.pt"
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif damage == "gone":  # killed between the two renames
        last.unlink()
    else:
        (tmp_path / "last.pt.tmp").write_bytes(b"half")
    resumed, _ = trained_checkpoint(tmp_path, 0)
    assert resumed.load() == (4 if damage == "leftover" else 2)
    assert ("cannot be read" in capfd.readouterr().out) == (damage == "truncated")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_unasked(group, tmp_path):
    for damaged in (["last.pt"], ["last.pt", "previous.pt"]):
        for name in damaged:
            (tmp_path / name).write_bytes(b"half")
        with pytest.raises(ValueError, match=f"{damaged[-1]} cannot be read .* Remove what is damaged"):
            trained_checkpoint(tmp_path, 0)[0].load()


def test_resuming_with_other_options_lists_them(group, tmp_path):
    trained_checkpoint(tmp_path, 1)
    changed, _ = trained_checkpoint(tmp_path, 0, arguments(lr=0.2, batch=3, workers=9, out="y"))
    changed.made_of = {"data": "other data"}
    with pytest.raises(
        ValueError, match=r"lr was 0.1, is 0.2; batch was 2, is 3; data was 'data', is 'other data'"
    ):
        changed.load()
    for part in ("workers", "out was"):  # these may change
        with pytest.raises(ValueError) as error:
            changed.load()
        assert part not in str(error.value)


def test_nothing_to_resume_starts_at_zero(group, tmp_path, capfd):
    checkpoint, _ = trained_checkpoint(tmp_path, 0)
    assert checkpoint.load() == 0 and "starting at step 0" in capfd.readouterr().out


def test_the_log_averages_between_lines_and_stops_at_a_nan(group, tmp_path):
    log = training.Log(tmp_path, 0, 10, every=4)
    y = [{"image_id": 7, "skipped": ["a.jpg"]}, {"image_id": 8}]
    for step, (task, loss) in enumerate([("a", 1.0), ("b", 5.0), ("a", 3.0), ("a", 2.0)], 1):
        log.add(step, task, y, torch.tensor(loss), {"part": torch.tensor(loss / 2)}, 0.1, False)
    (line,) = logged(tmp_path)
    assert line == {
        "step": 4, "lr": 0.1, "a/loss": 2.0, "a/part": 1.0, "b/loss": 5.0, "b/part": 2.5, "skipped_images": 4
    }  # fmt: skip
    shown = {"a": 0.98 * (0.98 * 1.0 + 0.02 * 3.0) + 0.02 * 2.0, "b": 5.0}  # moving averages, by hand
    assert log.averages == pytest.approx(shown) and "a=1.059, b=5.000" in str(log.bar)
    log.add(5, "a", y, torch.tensor(1.0), {"part": torch.tensor(math.inf)}, 0.1, False)
    log.add(6, "b", y, torch.tensor(1.0), {"part": torch.tensor(1.0)}, 0.1, False)
    with pytest.raises(FloatingPointError, match=r"step 5, task a, images \[7, 8\]"):
        log.add(7, "b", y, torch.tensor(1.0), {"part": torch.tensor(1.0)}, 0.1, save=True)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 8, "lr": 0.1}\n{"step": 9, "l')  # after the checkpoint; cut short by a kill
    training.Log(tmp_path, 4, 10, every=4)
    assert [json.loads(x)["step"] for x in (tmp_path / "log.jsonl").read_text().splitlines()] == [4]


def test_the_log_says_how_fast_the_steps_were_and_what_they_waited_for(group, tmp_path, monkeypatch):
    """By hand: batches that come after 3 s and after 1 s, steps of 1 s; 2 images a step."""
    now = [100.0]
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def stream(seconds: float):
        while True:
            now[0] += seconds
            yield [{"image_id": 1}, {"image_id": 2}]

    log = training.Log(tmp_path, 0, 8, every=2)
    slow, quick = stream(3.0), stream(1.0)
    for step in range(1, 7):
        y = log.next(slow if step <= 4 else quick)
        now[0] += 1.0
        log.add(step, "a", y, torch.tensor(1.0), {}, 0.1, save=step == 5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5, 6]
    keys = ("seconds", "waiting", "images_per_second")
    speeds = [tuple(line[key] for key in keys) for line in lines]
    assert speeds == [(4.0, 0.75, 0.5), (4.0, 0.75, 0.5), (2.0, 0.5, 1.0), (2.0, 0.5, 1.0)]
    assert "images/s=1" in str(log.bar)


@pytest.mark.parametrize(("size", "equal", "alone"), [(1.0, 0.1, 0.1), (1e-3, 0.1, 2e-3), (0.0, 0.0, 0.0)])
def test_equal_gradients_have_the_norm_that_others_are_clipped_at(group, size, equal, alone):
    """The gradient of `size` times four inputs of 1: of norm 2 `size`."""
    network = torch.nn.Linear(4, 1, bias=False)
    optimizer = training.sharded_adamw([{"params": list(network.parameters())}])
    seen, scaler = [], torch.amp.GradScaler("cpu", enabled=False)
    optimizer.register_step_pre_hook(lambda *_: seen.append(network.weight.grad.norm().item()))
    for wanted, expected in ((True, equal), (False, alone)):
        norm = training.minimize(network(torch.ones(1, 4)).sum() * size, optimizer, scaler, wanted)
        assert norm == pytest.approx(2 * size) and seen.pop() == pytest.approx(expected, rel=1e-3)


def test_an_fp16_overflow_is_not_an_error(group):
    network = model()
    optimizer = training.sharded_adamw([{"params": list(network.parameters())}])
    norm = training.minimize(
        network(torch.ones(1, 6)).sum() * math.inf, optimizer, torch.amp.GradScaler("cpu")
    )
    assert norm == 0
    for ours, theirs in zip(network.parameters(), model().parameters(), strict=True):
        assert torch.equal(ours, theirs)  # the scaler has skipped the step
