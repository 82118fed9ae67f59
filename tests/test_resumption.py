"""What a resumption compares and keeps; options without effect; room that is asked for first."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import feature_cache
import files
import training
from data.pose import Pose
from demo import world
from tests.stages import MINI, stage1, stage2
from tests.test_eval_ocr import command, sets  # noqa: F401  a fixture


@pytest.fixture
def backbone_file(tmp_path):
    from backbone import load

    path = tmp_path / "M.safetensors"
    files.save(load("eva_mini", "random").vit.state_dict(), path)
    return path


def changed(path, name: str) -> None:
    """Overwrite a file of tensors with others under the same names; M's patches stay: heads know them."""
    state = load_file(path)
    header = {kind: files.read_header(path, kind) for kind in ("head",)} if name == "head" else {}
    state = {k: v if k.startswith("patch_embed.") else v + 0.25 for k, v in state.items()}
    files.save(state, path, **header)


@pytest.mark.parametrize("what", ["head", "M"])
def test_another_head_or_M_under_the_same_name_is_not_gone_on_with(
    scenes, head, tmp_path, run, backbone_file, what
):
    shutil.copy(head / "detection.safetensors", tmp_path)
    options = stage2(scenes, tmp_path / "out", tmp_path, iters=4, **{"save-every": 2})
    options[options.index("random")] = backbone_file
    assert run("stage2_lora", *options)[0] == 0
    assert run("stage2_lora", *options, "--resume")[0] == 0
    changed(tmp_path / "detection.safetensors" if what == "head" else backbone_file, what)
    code, _, err = run("stage2_lora", *options, "--resume")
    assert code == 2 and f"{what} was" in err and err.count("\n") == 1


def test_M_is_told_apart_by_pieces_of_its_file(tmp_path):
    """A changed piece, a changed size, and for a folder each of its files."""
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        save_file({"w": torch.arange(1_000_000.0)}, path)
    one, folder = files.fingerprint(paths[0]), files.fingerprint(tmp_path)
    assert one == files.fingerprint(paths[1]) and files.fingerprint("random") == "random"
    changed(paths[1], "")
    assert files.fingerprint(paths[1]) != one and files.fingerprint(tmp_path) != folder
    with open(paths[0], "ab") as file:
        file.write(b"x")
    assert files.fingerprint(paths[0]) != one


@pytest.mark.parametrize("name", training.CHECKPOINTS)
def test_any_checkpoint_is_a_run(scenes, tmp_path, run, name):
    """A crash between the two renames of a save leaves previous.pt alone."""
    options = stage1(scenes, tmp_path)
    assert run("stage1_heads", *options)[0] == 0
    weights = (tmp_path / "detection.safetensors").read_bytes()
    (tmp_path / "last.pt").rename(tmp_path / "kept")
    (tmp_path / "previous.pt").unlink(missing_ok=True)
    (tmp_path / "kept").rename(tmp_path / name)
    code, _, err = run("stage1_heads", *options)
    assert code == 2 and "holds a run" in err
    assert run("stage1_heads", *options, "--resume")[0] == 0
    assert (tmp_path / "detection.safetensors").read_bytes() == weights


def test_a_kill_between_head_and_checkpoint_loses_nothing(sets, tmp_path, run, monkeypatch):  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        options = command(sets, out, iters=4)
        if out is parts:
            with monkeypatch.context() as patch:
                patch.setattr(
                    training.Checkpoint, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
                )
                assert run("eval_ocr", *options)[0] == 130
            assert files.read_header(out / "before" / "ocr.safetensors", "head")["step"] == 4
            assert not (out / "before" / "last.pt").exists()
        assert run("eval_ocr", *options, "--resume")[0] == 0
    a, b = (load_file(out / "before" / "ocr.safetensors") for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_full_trains_fp32_whatever_M_is_stored_in(scenes, head, tmp_path, run):
    """With bf16 products; 16-bit weights would be rounded back to where they were."""
    options = stage2(scenes, tmp_path / "out", head, iters=2, lr=1e-4)
    at = options.index("--rank")
    del options[at : at + 2]
    assert run("stage2_lora", *options, "--full", "--backbone-dtype", "bf16")[0] == 0
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["trained"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    M = load_file(tmp_path / "out" / "M.safetensors")
    weight = M["blocks.3.mlp.fc1.weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


def test_heads_that_train_along_are_in_train_mode(scenes, head, tmp_path, run, monkeypatch):
    """Table 11, as in stage 1: dropout; frozen heads have none."""
    from heads.detr import Detr

    seen, loss = [], Detr.loss
    monkeypatch.setattr(Detr, "loss", lambda self, *given: seen.append(self.training) or loss(self, *given))
    for ratio in (0, 0.1):
        options = stage2(scenes, tmp_path / str(ratio), head, iters=1, **{"head-lr-ratio": ratio})
        assert run("stage2_lora", *options)[0] == 0
    assert seen == [False, True]


@pytest.mark.parametrize(
    "script, options, name",
    [
        ("stage2_lora", ["--full", "--rank", 8], "--rank"),
        ("stage2_lora", ["--full", "--lora-alpha", 8], "--lora-alpha"),
        ("eval_ocr", ["--head", "h", "--test", "t", "--cache", "c"], "--cache"),
        ("eval_ocr", ["--head", "h", "--test", "t", "--iters", 5], "--iters"),
        ("eval_ocr", ["--head", "h", "--test", "t", "--lr", 1], "--lr"),
        ("eval_zeroshot", ["retrieval", "--captions", "c", "--images", "i", "--rerank", 9], "--rerank"),
        ("eval_zeroshot", ["retrieval", "--blip2", "b", "--captions", "c", "--images", "i"]
         + ["--text-cache", "t"], "--text-cache"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_refused(script, options, name, run, monkeypatch):
    import eval_ocr

    monkeypatch.setattr(eval_ocr, "check_heads", lambda *_: None)
    monkeypatch.setattr(files, "read_header", lambda *_: {"size": [56, 112]})
    weights = [] if script == "eval_zeroshot" else MINI
    code, _, err = run(script, *options, *weights)
    assert code == 2 and f"{name} has no effect with" in err and err.count("\n") == 1


def test_a_part_of_poses_data_is_a_part_of_the_images(tmp_path):
    """Table 10 counts images; an image has a row for each of its persons."""
    world.write(tmp_path, "train2017", 24, 112, seed=0)
    whole, part = (Pose(tmp_path, "train2017", seed=1, fraction=fraction) for fraction in (1.0, 0.5))
    images, chosen = set(whole.ids.tolist()), set(part.ids[part.rows].tolist())
    assert len(whole.ids) > len(images) and len(chosen) == round(0.5 * len(images))
    assert set(np.flatnonzero(np.isin(whole.ids, list(chosen)))) == set(part.rows.tolist())


def test_a_cache_that_has_no_room_is_refused_with_its_size(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    with pytest.raises(OSError, match=r"features \(4000, 65, 1408\) take 1.5 GB, the disk has 1.0 GB"):
        feature_cache.reserve(tmp_path / "f.npy", (4000, 65, 1408))
    monkeypatch.setattr(
        feature_cache.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="no room"):
        feature_cache.reserve(tmp_path / "f.npy", (4, 65, 192))
    assert not list(tmp_path.iterdir())


def test_a_cache_has_its_place_on_the_disk(tmp_path):
    feature_cache.reserve(tmp_path / "f.npy", (64, 65, 192))
    stat = (tmp_path / "f.npy").stat()
    assert 512 * stat.st_blocks >= 4 * 64 * 65 * 192  # not a sparse file
    assert np.load(tmp_path / "f.npy", mmap_mode="r").shape == (64, 65, 192)


def test_a_large_file_is_hashed_once(tmp_path, monkeypatch):
    path, opened = tmp_path / "clip.bin", []
    path.write_bytes(b"1" * 1000)
    first = files.sha256(path)
    monkeypatch.setattr("builtins.open", lambda *given: opened.append(given))
    assert files.sha256(path) == first and not opened
    monkeypatch.undo()
    path.write_bytes(b"2" * 1000)
    assert files.sha256(path) != first


def telling_what_is_gathered() -> None:
    gather = dist.gather_object
    dist.all_gather_object = lambda *_: pytest.fail("to every rank")
    dist.gather_object = lambda *given: print("to the first") or gather(*given)


def test_masks_are_gathered_on_the_first_rank_alone(scenes, head, tmp_path, run_ranks):
    """Half a GB for each of eight ranks, at COCO's size."""
    options = [*MINI, "--task", "detection", "--head", head, "--coco", scenes, "--image-scale", 0.2]
    codes, said = run_ranks(2, "eval_heads", *options, "--out", tmp_path, prepare=telling_what_is_gathered)
    assert codes == [0, 0] and all("to the first" in text for text in said), said
    assert json.loads((tmp_path / "result.json").read_text())["rows"][0]["n"] == 4
