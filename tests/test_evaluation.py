"""The shared parts of the evaluations: paired differences, shares of the ranks, options, result files."""

import argparse
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.stats import bootstrap
from torch import nn

import evaluation
import files
import lora
import tasks
from backbone import add_backbone_options, load
from data.coco import read_instances
from data.pose import read_persons
from files import BadImage
from ranks import Ranks, gather


def options(*words) -> argparse.Namespace:
    p = argparse.ArgumentParser()
    evaluation.add_options(p, "out/x", 8)
    add_backbone_options(p)
    return p.parse_args(list(map(str, words)))


def test_paired_difference_by_hand():
    """Of 10 items 3 are gained and 1 is lost: McNemar's exact p is that of 1 or 3 heads in 4: 10/16."""
    before = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    after = np.array([0, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    found = evaluation.paired(before, after)
    assert found["before"] == 0.4 and found["after"] == 0.6
    assert found["difference"] == pytest.approx(0.2) and found["p"] == pytest.approx(10 / 16)
    assert found["low"] < 0 < found["high"]


def test_paired_interval_is_scipys_bootstrap():
    rng = np.random.default_rng(0)
    before = rng.normal(size=200)
    after = before + rng.normal(0.2, 1, size=200)
    found = evaluation.paired(before, after)
    theirs = bootstrap((after - before,), np.mean, method="percentile", rng=rng).confidence_interval
    # the ends' own bootstrap error at 10,000 resamples is about 0.0015
    assert found["low"] == pytest.approx(theirs.low, abs=0.006)
    assert found["high"] == pytest.approx(theirs.high, abs=0.006)
    assert found["p"] is None


def test_equal_scores_differ_by_exactly_nothing():
    found = evaluation.paired([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert (found["difference"], found["low"], found["high"], found["p"]) == (0, 0, 0, 1)


def test_unlike_items_are_refused():
    with pytest.raises(ValueError, match="not the same items"):
        evaluation.paired([1.0, 0.0], [1.0])


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, i):
        return i


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_cover_every_item_once(world):
    args, seen = options("--workers", 0, "--batch", 2), []
    for rank in range(world):
        ranks = Ranks(rank, world, torch.device("cpu"), torch.float32)
        seen += [int(i) for batch in evaluation.loader(Numbers(), args, ranks) for i in batch]
    assert sorted(seen) == list(range(7))


def test_a_batch_comes_again_until_all_of_it_is_done():
    """With the items that are done, as the batches must be those of a run that was not interrupted."""
    args, ranks = options("--workers", 0, "--batch", 2), Ranks(0, 1, torch.device("cpu"), torch.float32)
    left = [batch.tolist() for batch in evaluation.loader(Numbers(), args, ranks, done={0, 1, 3, 6})]
    assert left == [[2, 3], [4, 5]]


class Broken(Numbers):
    def __getitem__(self, i):
        return BadImage(f"picture {i}") if i == 5 else i


def first_error(items: list):
    return next((item for item in items if isinstance(item, Exception)), items)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_that_an_item_is_ends_the_loop_where_it_comes(workers):
    """As it is, from a worker too; what was before it has been seen."""
    args, ranks = options("--workers", workers, "--batch", 2), Ranks(0, 1, torch.device("cpu"), torch.float32)
    loader, seen = evaluation.loader(Broken(), args, ranks, first_error), []
    with pytest.raises(BadImage, match="^picture 5$"):
        for batch in loader:
            seen.append(batch)
    assert seen == [[0, 1], [2, 3]] and len(loader) == 4


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gather_and_result(group, tmp_path):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"abc")
    assert list(gather({2: "b", 1: "a"}).items()) == [(1, "a"), (2, "b")]
    args = options("--out", tmp_path, "--limit", 3)
    evaluation.write_result(args, {"accuracy": 0.5}, [str(weights), "random", None])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["partial"] is True and result["accuracy"] == 0.5 and result["options"]["limit"] == 3
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256's published example
    assert result["sha256"] == {str(weights): abc} and result["versions"]["torch"] == torch.__version__


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return self.qkv(x)


def test_variants_and_lora_of_another_backbone(tmp_path):
    tuned, file = lora.attach(Attention(), rank=2), tmp_path / "lora.safetensors"
    for p in lora.parameters(tuned).values():
        nn.init.normal_(p)
    lora.save(tuned, file, backbone="eva_mini")
    common_options = ("--weights", "random", "--model", "eva_mini")
    assert evaluation.check_options(options(*common_options)) == ["before"]
    assert evaluation.check_options(options(*common_options, "--lora", file)) == ["after"]
    args = options(*common_options, "--compare", file)
    assert evaluation.check_options(args) == ["before", "after"]
    model, x = Attention(), torch.randn(1, 8)
    plain = model(x)
    become = evaluation.attach(model, args)
    become("before")
    assert torch.equal(model(x), plain)
    become("after")
    assert not torch.equal(model(x), plain)
    with pytest.raises(ValueError, match="was tuned on eva_mini, not on --model eva_g"):
        evaluation.check_options(options("--weights", "random", "--lora", file))
    with pytest.raises(FileNotFoundError, match="no LoRA file"):
        evaluation.check_options(options(*common_options, "--compare", tmp_path / "absent"))
    with pytest.raises(ValueError, match="--limit must be at least 1"):
        evaluation.check_options(options(*common_options, "--limit", 0))


def test_table_is_markdown():
    expected = "| set | acc |\n| --- | --- |\n| a | 12.35 |\n| b | - |"
    assert evaluation.table(["set", "acc"], [["a", 12.345], ["b", None]]) == expected


def test_row_is_in_percent_points():
    before, after = np.array([0.0, 0, 1, 1, 0]), np.array([1.0, 0, 1, 1, 0])
    row = evaluation.result_row("s", "acc1", {"before": before, "after": after})
    assert row["before"] == pytest.approx(40) and row["after"] == pytest.approx(60) and row["p"] == 1
    assert row["difference"] == pytest.approx(20) and row["low"] <= 20 <= row["high"] <= 100 and row["n"] == 5
    alone = evaluation.result_row("s", "acc1", {"after": after}, 9)
    assert [alone[k] for k in ("before", "after", "low", "n")] == [None, pytest.approx(60), None, 9]
    one = evaluation.result_row("s", "bleu", {"before": 0.25, "after": 0.5}, 7)
    assert [one[k] for k in ("before", "after", "difference", "low", "p", "n")] == [25, 50, 25, None, None, 7]


def test_a_table_has_no_minus_before_a_zero():
    assert evaluation.table(["a"], [[-0.001], [-0.006], [None], [3]]).splitlines()[2:] == [
        "| 0.00 |", "| -0.01 |", "| - |", "| 3 |",
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["detection", "pose"])
def test_features_that_overflow_are_refused_not_scored(scenes, tmp_path, run, task):
    """A backbone whose last block leaves fp16's range, in fp16: it once had box AP 26.93, AR 100, exit 0."""
    state = load("eva_mini", "random", seed=0).vit.state_dict()
    state["blocks.5.mlp.fc2.weight"] = state["blocks.5.mlp.fc2.weight"] * 3e6
    files.save(state, tmp_path / "M.safetensors")
    read = {"detection": read_instances, "pose": read_persons}[task]
    categories = read(scenes, "val2017").categories
    head = tasks.find(task).Head(192, categories)
    tasks.save_head(head, tmp_path / f"{task}.safetensors", task)
    options = ["--model", "eva_mini", "--weights", tmp_path / "M.safetensors", "--head", tmp_path]
    options += ["--coco", scenes, "--task", task, "--image-scale", 0.2, "--workers", 0, "--out", tmp_path]
    code, _, err = run("eval_heads", *options, "--backbone-dtype", "fp16")
    assert code == 2 and "not finite in torch.float16" in err and "--backbone-dtype bf16" in err
    assert not (tmp_path / "result.json").exists()


def test_params_are_those_of_the_model_without_lora(tmp_path):
    args, backbone = options("--model", "eva_mini"), load("eva_mini", "random")
    plain = sum(p.numel() for p in backbone.parameters())
    lora.attach(backbone.vit, rank=64)
    assert evaluation.model_columns(args, "before", backbone.vit) == ["eva_mini", f"{plain / 1e6:.1f}M", 0]
    lora.save(backbone.vit, tmp_path / "lora.safetensors", step=7)
    args.lora = tmp_path / "lora.safetensors"
    columns = evaluation.model_columns(args, "after", backbone.vit)
    assert columns == ["eva_mini ViSFT", f"{plain / 1e6:.1f}M", 7]
