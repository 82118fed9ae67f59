"""A run on eight processes: what each sees, the sharded state, 8 -> 3 -> 8 ranks, a rank that fails."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import training
from data.stream import batches
from files import BadImage
from ranks import Ranks, add_process_options, start

TOTAL, WIDTH = 24, 16  # images a step, over all ranks; features of an image


class Numbers(torch.utils.data.Dataset):
    """A stream whose images are whole numbers: sums of them are exact in any order."""

    def __getitem__(self, index: tuple[int, int]):
        position, _ = index
        x = torch.randint(0, 8, (3, 1, WIDTH), generator=torch.Generator().manual_seed(position))
        return x.to(torch.uint8), {"image_id": position, "size": (1, WIDTH)}


class Linear(nn.Module):
    """Some tensors to spread over the ranks, and a loss with whole gradients."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.zeros(WIDTH)) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        x = (x * 255).round()  # as the stream had it
        products = sum((k + 1) * (x[:, 0, 0] @ w) for k, w in enumerate(self.w))  # (b,)
        return products.sum() * dist.get_world_size()  # DDP divides by it


class Pixels:
    patch, mean, std = 1, (0.0,) * 3, (1.0,) * 3


def main() -> None:
    """Trains to --iters, resuming if there is something; writes what each rank saw, and what came out."""
    p = argparse.ArgumentParser()
    p.add_argument("--iters", type=int)
    p.add_argument("--stop", type=int)
    p.add_argument("--fail", type=int, default=-1)
    p.add_argument("--out")
    p.add_argument("--resume", action="store_true")
    p.add_argument("--away", action="store_true")
    add_process_options(p)
    args = p.parse_args()
    ranks, out = start(args, p), Path(args.out)
    if args.away:
        return save_from_another_device(args)
    torch.set_num_threads(1)
    args.batch = TOTAL // ranks.world
    model = Linear()
    trained = dict(model.named_parameters())
    T = training.parallel(model, ranks.device)
    optimizer = training.sharded_adamw([{"params": list(trained.values())}])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    may_change = {"out", "resume", "stop", "fail", "workers"}
    run = training.Checkpoint(out, args, trained, optimizer, scaler, {"data": "numbers"}, may_change)
    first = run.load() if args.resume else 0
    log = training.Log(out, first, args.iters, 1)
    stream = batches(Numbers(), args.batch, Pixels, ranks, first)
    for step in range(first, args.stop):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, 2**-6, 2, args.iters)
        images, _, y = log.next(stream)
        if ranks.rank == args.fail:
            raise BadImage("the picture of this rank is broken")
        with open(out / f"seen_{step}_{ranks.world}_{ranks.rank}.json", "w") as file:
            json.dump([t["image_id"] for t in y], file)
        norm = training.minimize(T(images), optimizer, scaler)
        log.add(step + 1, "numbers", y, norm, {}, 0.0, True)
        run.save(step + 1)
    mine = sum(len(state) for state in optimizer.optim.state.values())
    (out / f"held_{ranks.world}_{ranks.rank}.json").write_text(json.dumps(mine))


def trained(out: Path) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def test_resumed_on_three_ranks_and_on_eight_again_it_is_the_same_run(run_ranks, tmp_path):
    """Bit for bit; at every step the ranks together see the next images, each once."""
    here, there = tmp_path / "whole", tmp_path / "parts"
    for folder in (here, there):
        folder.mkdir()
    module = "tests.test_eight_ranks"
    codes, said = run_ranks(8, module, "--iters", 6, "--stop", 6, "--out", here)
    assert codes == [0] * 8, said
    for world, stop in ((8, 2), (3, 4), (8, 6)):
        options = ["--iters", 6, "--stop", stop, "--out", there, "--resume"]
        codes, said = run_ranks(world, module, *options)
        assert codes == [0] * world, said
    whole, parts = trained(here), trained(there)
    assert whole["step"] == parts["step"] == 6 and whole["trained"]["w.3"].abs().sum() > 0
    for name, value in whole["trained"].items():
        assert torch.equal(value, parts["trained"][name]), name
    for key, moments in whole["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, parts["optimizer"]["state"][key][name]), (key, name)

    for step in range(6):
        world = 3 if step in (2, 3) else 8
        for folder, n in ((here, 8), (there, world)):
            shares = [json.loads((folder / f"seen_{step}_{n}_{rank}.json").read_text()) for rank in range(n)]
            assert sum(shares, []) == list(range(TOTAL * step, TOTAL * (step + 1)))  # rank by rank
    held = [json.loads((here / f"held_8_{rank}.json").read_text()) for rank in range(8)]
    assert max(held) <= 2 * 3 and sum(held) == 10 * 3  # two of the ten tensors' step, m and v at most


def test_a_rank_that_fails_ends_all_of_them(run_ranks, tmp_path):
    """Rank 2 raises while the others wait for it in an all_reduce: in seconds, with its line and code 2."""
    options = ["--iters", 3, "--stop", 3, "--out", tmp_path, "--fail", 2]
    codes, said = run_ranks(4, "tests.test_eight_ranks", *options, seconds=60)  # not until a time-out
    assert codes == [2] * 4, said
    assert "the picture of this rank is broken" in said[2]
    others = [said[rank] for rank in (0, 1, 3)]
    assert all("another rank has ended" in text and "Traceback" not in text for text in others), others


class OnAnotherDevice(torch.Tensor):
    """Stands for a CUDA tensor: to pickle it would bring it back on the GPU that it is on."""

    def __reduce_ex__(self, protocol):
        raise AssertionError("a tensor of this rank's device was pickled")

    def to(self, *args, **kwargs):
        return self.as_subclass(torch.Tensor).clone()


def save_from_another_device(args: argparse.Namespace) -> None:
    args.batch = 1
    weights = [nn.Parameter(torch.ones(4)) for _ in range(4)]
    optimizer = training.sharded_adamw([{"params": weights}])
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for k, weight in enumerate(weights):
        weight.grad = torch.full((4,), 1.0 + k)
    optimizer.step()
    for moments in optimizer.optim.state.values():
        moments["exp_avg"] = moments["exp_avg"].as_subclass(OnAnotherDevice)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    named = {str(k): weight for k, weight in enumerate(weights)}
    training.Checkpoint(Path(args.out), args, named, optimizer, scaler, {}, {"out"}).save(1)


def test_no_tensor_of_another_ranks_device_is_unpickled(run_ranks, tmp_path):
    codes, said = run_ranks(2, "tests.test_eight_ranks", "--out", tmp_path, "--away")
    assert codes == [0, 0], said
    state = trained(tmp_path)["optimizer"]["state"]
    means = [state[k]["exp_avg"] for k in sorted(state)]
    assert all(type(m) is torch.Tensor for m in means)
    assert torch.allclose(torch.stack(means)[:, 0], 0.1 * torch.arange(1.0, 5.0))


@pytest.mark.parametrize("seed", [0, 2**24, 2**40 + 3, 2**63 - 1])
def test_any_seed_draws_numbers_of_its_own(seed):
    """torch's generator on a CPU looks at the last 32 bits only."""

    def draw(seed: int, step: int, rank: int = 1) -> Tensor:
        Ranks(rank, 2, torch.device("cpu"), torch.float32).seed(seed, step)
        return torch.rand(4)

    assert torch.equal(draw(seed, 5), draw(seed, 5))
    others = [draw((seed + 1) % 2**63, 5), draw(seed, 6), draw(seed, 5, rank=0), draw(seed ^ 2**40, 5)]
    assert not any(torch.equal(draw(seed, 5), other) for other in others)
