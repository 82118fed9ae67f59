"""Streams of any task: a sample depends on its position alone, batches say what is padding, bad images."""

import shutil

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from data.detection import Detection
from data.stream import collate
from files import BadImage
from tests.streams import same, take


def test_a_sample_depends_on_its_position_alone(scenes):
    stream = Detection(scenes, "train2017", seed=5, scale=0.2)
    plain = take(stream, 30)
    assert all(map(same, plain, take(stream, 30, workers=2)))
    assert all(map(same, plain[7:], take(stream, 23, start=7)))
    state = torch.get_rng_state()
    stream[3, 14]
    assert torch.equal(torch.get_rng_state(), state)
    for rank in range(2):  # two ranks read what one process reads, in turn
        assert all(map(same, plain[rank::2], take(stream, 15, rank=rank, world=2)))
    assert [y["image_id"] for *_, (y,) in plain[:12]] != [y["image_id"] for *_, (y,) in plain[12:24]]
    for epoch in (plain[:12], plain[12:24]):  # every image once an epoch
        assert sorted(y["image_id"] for *_, (y,) in epoch) == list(range(1, 13))
    other = Detection(scenes, "train2017", seed=6, scale=0.2)
    assert not all(map(same, plain, take(other, 30)))


def test_batches_are_padded_and_say_so(scenes):
    stream = Detection(scenes, "train2017", scale=0.2)
    for (images, valid, y), singles in zip(take(stream, 4, batch=3), range(4), strict=True):
        assert images.shape[2] % 14 == 0 and images.shape[3] % 14 == 0
        for i, target in enumerate(y):
            h, w = target["size"]
            ((alone, _, _),) = take(stream, 1, start=3 * singles + i)
            assert torch.equal(images[i, :, :h, :w], alone[0, :, :h, :w])
            assert valid[i].sum() == h * w and valid[i, :h, :w].all()
            assert not images[i][:, ~valid[i]].any()
    assert take(stream, 1, batch=1)[0][1] is None  # nothing to mask


def test_images_are_normalized_as_by_torchvision(scenes):
    """Bit for bit."""
    stream, mean, std = Detection(scenes, "train2017", scale=0.2), (0.48, 0.45, 0.4), (0.26, 0.26, 0.27)
    samples = [stream[p, 14] for p in range(3)]
    images, _, _ = collate(samples, 14, mean, std)
    for image, (pixels, _) in zip(images, samples, strict=True):
        expected = TF.normalize(TF.to_dtype(pixels, scale=True), mean, std)
        assert torch.equal(image[:, : pixels.shape[1], : pixels.shape[2]], expected)


def test_fraction_and_exclusion(scenes):
    ids = lambda **options: Detection(scenes, "train2017", **options)  # noqa: E731
    half, all_of_it = ids(fraction=0.5), ids()
    assert len(half.rows) == 6 and set(half.rows) < set(all_of_it.rows)
    assert set(ids(fraction=0.25).rows) < set(half.rows)  # Table 10's parts are nested
    assert half.fingerprint != all_of_it.fingerprint
    assert len(ids(fraction=0.3).rows) == 4  # of 3.6
    assert any(set(ids(fraction=0.5, seed=seed).rows) != set(half.rows) for seed in (1, 2))
    left = ids(exclude={1, 2, 999})
    assert left.ids[left.rows].tolist() == list(range(3, 13)) and "2 images excluded" in left.notes[-1]
    with pytest.raises(ValueError, match="no image left"):
        ids(exclude=set(range(13)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "not a picture", "another size"])
def test_bad_images_are_named_or_passed_over(broken, damage, workers):
    folder = broken()
    path = folder / "train2017" / f"{3:012d}.jpg"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-900])
    elif damage == "not a picture":
        path.write_text("hello")
    else:
        shutil.copy(folder / "train2017" / f"{4:012d}.jpg", path)
    with pytest.raises(BadImage, match="000000000003.jpg"):
        take(Detection(folder, "train2017", scale=0.2), 12, workers=workers)
    got = take(Detection(folder, "train2017", scale=0.2, skip_bad=True), 12, workers=workers)
    ids = [t["image_id"] for *_, y in got for t in y]
    skipped = [name for *_, y in got for t in y for name in t["skipped"]]
    assert 3 not in ids and len(ids) == 12 and skipped == ["000000000003.jpg"]
