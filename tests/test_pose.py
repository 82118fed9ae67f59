"""Pose head and person crops against transformers' ViTPose, literal transcriptions, and values by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import VitPoseConfig
from transformers.models.vitpose import image_processing_vitpose as hf_images
from transformers.models.vitpose import modeling_vitpose as hf

import heads.pose as pose_head
from backbone import Features
from data import pose
from data.persons import PersonBoxes
from heads.coco_results import Params, keypoint_results, oks_nms
from scores.average_precision import average_precision
from tests.streams import take

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["nose"] + [
    f"{side}_{part}"
    for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    for side in ("left", "right")
]
CATEGORIES = [{"id": 1, "name": "person", "keypoints": NAMES, "mirror": pose.mirror(NAMES)}]
D = 24


def features(grid: torch.Tensor) -> Features:
    return Features(None, grid, None)


@pytest.fixture(scope="session")
def people(tmp_path_factory) -> Path:
    """5 made-up images of noise with 1-3 persons each, one of them a crowd, in COCO's layout."""
    out, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    (out / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (out / split).mkdir()
        images, annotations = [], []
        for i in range(1, 6):
            Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(out / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 90, "width": 120})
            for _ in range(rng.integers(1, 4)):
                (x, y), (w, h) = rng.uniform(0, 50, 2), rng.uniform(30, 60, 2)
                at = np.stack(
                    [rng.uniform(x, x + w, 17), rng.uniform(y, y + h, 17), rng.integers(0, 3, 17)], 1
                )
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": [x, y, w, h],
                    "area": w * h, "iscrowd": int(len(annotations) == 3), "keypoints": at.flatten().tolist(),
                    "num_keypoints": int((at[:, 2] > 0).sum()),
                })  # fmt: skip
        categories = [{"id": 1, "name": "person", "keypoints": NAMES, "skeleton": []}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(content))
    return out


# --- head


def vitpose() -> tuple[nn.Module, pose_head.Pose]:
    """transformers' decoder and ours with its weights, every parameter and buffer random."""
    torch.manual_seed(0)
    backbone = dict(model_type="vitpose_backbone", hidden_size=D)
    config = VitPoseConfig(backbone_config=backbone, num_labels=17, use_simple_decoder=False)
    theirs = hf.VitPoseClassicDecoder(config)
    for value in theirs.state_dict().values():
        value.copy_(torch.rand_like(value) + 0.1) if value.is_floating_point() else None
    ours = pose_head.Pose(D, CATEGORIES)
    ours.decoder.load_state_dict(
        dict(zip(ours.decoder.state_dict(), theirs.state_dict().values(), strict=True))
    )
    return theirs.eval(), ours.eval()


def test_decoder_equals_transformers():
    theirs, ours = vitpose()
    x = torch.randn(2, D, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours.decoder(x), theirs(x))
        assert ours.decoder(x).shape == (2, 17, 64, 48)
        torch.testing.assert_close(ours.train().decoder(x), theirs.train()(x))  # the batch's statistics


def test_config_rebuilds_the_head():
    head = pose_head.Pose(D, CATEGORIES)
    again = pose_head.Pose(**json.loads(json.dumps(head.config)))
    assert again.state_dict().keys() == head.state_dict().keys() and "mirror" not in head.state_dict()


def gaussians(xy: torch.Tensor, sigma: float = 2.0, noise: float = 0.0) -> torch.Tensor:
    """(B, K, 64, 48) around xy (B, K, 2)."""
    x, y = torch.arange(48), torch.arange(64)[:, None]
    squares = (x - xy[..., 0, None, None]) ** 2 + (y - xy[..., 1, None, None]) ** 2
    return (-squares / (2 * sigma**2)).exp() * 0.8 + noise * torch.rand(*xy.shape[:2], 64, 48)


def test_reading_a_heat_map_equals_transformers():
    """With its smoothing, which is narrower; peaks inside, as at the border the two pad otherwise."""
    torch.manual_seed(0)
    heat = gaussians(torch.rand(3, 17, 2) * torch.tensor([29.0, 45]) + 9, noise=0.02)
    ours, scores = pose_head.read(heat, 11, sigma=0.8)
    coords, best = hf_images.get_keypoint_predictions(heat.numpy())
    theirs = hf_images.post_dark_unbiased_data_processing(coords.copy(), heat.numpy(), kernel=11)
    assert np.abs(theirs - coords).max() > 0.3  # there was something to refine
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # 1e-4 in the log's second difference of about 0.2
    np.testing.assert_array_equal(scores, best[..., 0])


def test_reading_finds_peaks_to_a_fraction_of_a_pixel():
    torch.manual_seed(0)
    xy = torch.rand(4, 17, 2) * torch.tensor([47.0, 63])
    found, scores = pose_head.read(gaussians(xy), 11)
    inside = ((xy > 6) & (xy < torch.tensor([41.0, 57]))).all(-1)
    assert (found - xy).norm(dim=-1)[inside].max() < 0.02
    assert (found - xy).norm(dim=-1).max() < 2  # at the border the smoothing sees a reflection (so ViTPose's)
    flat, _ = pose_head.read(torch.zeros(1, 17, 8, 6), 11)
    assert flat.isfinite().all()


def literal_targets(keypoints, size, crop):
    """ViTPose's unbiased targets, one keypoint at a time."""
    (h, w), target, weight = size, np.zeros((len(keypoints), *size)), np.zeros(len(keypoints))
    for k, (x, y, v) in enumerate(keypoints.tolist()):
        mx, my = x * (w - 1) / (crop[1] - 1), y * (h - 1) / (crop[0] - 1)
        cx, cy = int(mx + 0.5), int(my + 0.5)
        if v == 0 or cx - 6 >= w or cy - 6 >= h or cx + 6 < 0 or cy + 6 < 0:
            continue
        weight[k] = 1
        for j in range(max(0, cy - 6), min(h, cy + 7)):
            for i in range(max(0, cx - 6), min(w, cx + 7)):
                target[k, j, i] = np.exp(-((i - mx) ** 2 + (j - my) ** 2) / 8)
    return target, weight


def test_targets_and_loss_are_vitposes():
    torch.manual_seed(0)
    head, crop = pose_head.Pose(D, CATEGORIES), (224, 168)
    keypoints = torch.rand(2, 17, 3) * torch.tensor([208.0, 264, 1]) - torch.tensor([0.0, 0, 0])
    keypoints[..., 2] = torch.randint(3, (2, 17))
    target, weight = head.targets(keypoints, (64, 48), crop)
    expected, expected_weight = zip(*(literal_targets(k, (64, 48), crop) for k in keypoints), strict=True)
    np.testing.assert_array_equal(weight, expected_weight)
    assert 0 < weight.mean() < 0.7
    seen = weight.bool()
    np.testing.assert_allclose(target[seen], np.stack(expected)[seen.numpy()], atol=1e-6)

    heat = torch.randn(2, 17, 64, 48)
    head.decoder = nn.Identity()
    loss, parts = head(features(heat[:, :, ::1]), [{"keypoints": k, "padded_size": crop} for k in keypoints])
    squares = [((heat[b, k] - target[b, k]) ** 2).mean() for b in range(2) for k in range(17) if seen[b, k]]
    assert loss.item() == pytest.approx(float(sum(squares)) / 34, rel=1e-5)  # mean over joints and batch
    assert parts["labelled"].item() == pytest.approx(float(sum(squares)) / len(squares), rel=1e-5)


def test_flip_test_averages_what_the_mirror_sees():
    """Ours of f with the mirrored crops behind, against transformers' flip_back and a mean."""
    theirs, ours = vitpose()
    torch.manual_seed(1)
    plain, mirrored = torch.randn(2, 2, D, 16, 12)
    pairs = torch.tensor([[i, i + 1] for i in range(1, 17, 2)])
    heat = (theirs(plain) + theirs(mirrored, flip_pairs=pairs)) / 2
    y = [{"image_id": i, "crop_cxcywh": torch.tensor([40.0, 50, 30, 40]), "score": 0.5} for i in range(2)]
    got = ours.predict(features(torch.cat([plain, mirrored])), y)
    at, scores = pose_head.read(heat, 11)
    expected = at / torch.tensor([47.0, 63]) * torch.tensor([30.0, 40]) + torch.tensor([25.0, 30])
    for b in range(2):
        torch.testing.assert_close(got[b]["keypoints"][:, :2], expected[b], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(got[b]["keypoints"][:, 2], scores[b])


def test_persons_are_scored_by_their_sure_keypoints():
    """0.5 times the mean of 0.8 (15 keypoints); 0.15 and 0.2 are not above 0.2."""
    head = pose_head.Pose(D, CATEGORIES)
    head.decoder = nn.Identity()
    heat = gaussians(torch.full((1, 17, 2), 20.0))
    heat[0, 3] *= 0.15 / 0.8
    heat[0, 4] *= 0.2 / 0.8
    y = [{"image_id": 1, "crop_cxcywh": torch.tensor([40.0, 50, 30, 40]), "score": 0.5}]
    (person,) = head.predict(features(heat), y)
    assert person["score"] == pytest.approx(0.4) and person["area"] == 1200
    (person,) = head.predict(features(heat * 0), y)
    assert person["score"] == 0


def test_the_same_person_twice_is_reported_once():
    """exp(-d^2 / (8 area sigma^2)) is the OKS if all keypoints move by d, in proportion to their sigma."""
    sigmas = Params(iouType="keypoints").kpt_oks_sigmas

    def person(image_id: int, score: float, oks: float) -> dict:
        x = 100 + sigmas * np.sqrt(-np.log(oks) * 8 * 400)
        keypoints = np.stack([x, np.full(17, 50.0), np.full(17, 0.9)], 1)
        return {"image_id": image_id, "keypoints": keypoints, "score": score, "area": 400.0}

    persons = [person(1, 0.3, 0.89), person(1, 0.9, 1.0), person(1, 0.5, 0.91), person(2, 0.1, 0.95)]
    results = keypoint_results(persons, CATEGORIES)
    assert [(r["image_id"], r["score"]) for r in results] == [(1, 0.9), (1, 0.3), (2, 0.1)]
    assert results[0]["category_id"] == 1 and len(json.loads(json.dumps(results))[0]["keypoints"]) == 51


def test_the_size_of_two_persons_is_their_mean():
    """All keypoints d = 10 px apart: the OKS is the mean of exp(-d^2 / (8 sigma^2 area))."""
    sigmas = Params(iouType="keypoints").kpt_oks_sigmas
    areas = np.linspace(1e3, 1e5, 10_000)
    oks = np.exp(-100 / (8 * sigmas**2 * areas[:, None])).mean(1)
    enough = areas[oks > 0.9][0]
    assert oks[0] < 0.9

    def left(one: float, two: float) -> int:
        pair = (20.0, 0.9, one * enough), (20 + 50**0.5, 0.5, two * enough)
        persons = [{"keypoints": np.full((17, 3), x), "score": s, "area": area} for x, s, area in pair]
        return len(oks_nms(persons))

    for sizes, count in (((1.5, 0.4), 2), ((0.4, 1.5), 2), ((1.5, 0.6), 1), ((0.6, 1.5), 1)):
        assert left(*sizes) == count, sizes


# --- crops


def test_regions_and_warps_equal_transformers():
    box = [45.0, 35.0, 25.0, 20.0]
    centre, scale = hf_images.box_to_center_and_scale(box, 168, 224)
    crop = pose.region(box, 168 / 224)
    np.testing.assert_allclose(crop, [*centre, *scale * 200], rtol=1e-6)
    image = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)))
    image = np.asarray(Image.fromarray(image).resize((120, 90), Image.Resampling.BICUBIC))
    for degrees in (0, 25):
        size, whole = np.array([168, 224]), np.array(crop[2:])
        matrix = hf_images.get_warp_matrix(degrees, np.array(crop[:2]) * 2, size - 1, whole)
        ours = pose.warp(
            torch.from_numpy(image.copy()).permute(2, 0, 1), crop, (224, 168), np.deg2rad(degrees)
        )
        theirs = hf_images.scipy_warp_affine(image.astype(np.float64), matrix, (224, 168))
        # 0.25 is rounding; the region lies within the image, at whose border scipy does not fade to black
        assert np.abs(ours.permute(1, 2, 0).numpy() - theirs).mean() < 0.35
        points = np.array([[33.0, 41, 2], [70, 22, 1]], np.float32)
        mapped = points[:, :2] @ matrix[:, :2].T + matrix[:, 2]
        np.testing.assert_allclose(
            pose.to_crop(points, crop, (224, 168), np.deg2rad(degrees))[:, :2], mapped, atol=1e-3
        )


def test_mirrored_crops_fit_to_the_pixel():
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    crop = pose.region([30.3, 20.2, 31.7, 50.5], 0.75)
    mirrored = crop * np.float32([-1, 1, 1, 1]) + np.float32([119, 0, 0, 0])
    a, b = pose.warp(image, crop, (224, 168)).flip(2), pose.warp(image.flip(2), mirrored, (224, 168))
    assert (a.int() - b.int()).abs().max() <= 1  # rounding


def test_a_mirrored_sample_is_the_mirror_of_the_sample(people, monkeypatch):
    """To the pixel, where neither size nor angle is drawn; a region one pixel off would not be."""
    stream, flip = pose.Pose(people, "train2017"), []
    monkeypatch.setattr(torch, "randn", lambda *_: torch.zeros(()))
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(flip.pop(0)))
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    (plain, y), (mirrored, t) = (
        (flip.extend((0.9, draw, 0.9)), stream.sample(image, 0, 14))[1] for draw in (0.9, 0.1)
    )
    assert (plain.flip(2).int() - mirrored.int()).abs().max() <= 1  # rounding
    last, swapped = plain.shape[2] - 1, y["keypoints"][CATEGORIES[0]["mirror"]]
    expected = swapped * torch.tensor([-1, 1, 1]) + torch.tensor([last, 0, 0])
    torch.testing.assert_close(t["keypoints"], expected, atol=1e-3, rtol=0)


def normalize_on_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    norm, x = pose_head.BatchNorm(3), torch.load(f"{folder}/x.pt")[2 * rank : 2 * rank + 2]
    y = norm(x)
    state = {k: v for k, v in norm.state_dict().items() if "running" in k}
    torch.save({**state, "y": y.detach()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_normalize_and_remember_as_one(tmp_path):
    """Of four crops with few pixels, where n / (n - 1) of the running variance shows."""
    torch.manual_seed(0)
    x, norm = torch.randn(4, 3, 2, 2) * 3 + 1, nn.BatchNorm2d(3)
    torch.save(x, tmp_path / "x.pt")
    mp.start_processes(normalize_on_two, (str(tmp_path),), nprocs=2, start_method="forkserver")
    y, parts = norm(x), [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y)
    for part in parts:
        torch.testing.assert_close(part["running_mean"], norm.running_mean)
        torch.testing.assert_close(part["running_var"], norm.running_var)


def test_keypoints_follow_the_pixels(people, tmp_path):
    """In an image whose colours are its coordinates the colour under a keypoint is where it was annotated,
    whatever the augmentation, and mirrored crops have left and right exchanged."""
    shutil.copytree(people, tmp_path / "coco")
    x, y = np.meshgrid(np.arange(120), np.arange(90))
    for path in (tmp_path / "coco" / "train2017").iterdir():
        Image.fromarray(np.stack([x, y, x * 0 + 200], -1).astype(np.uint8)).save(path)
    stream = pose.Pose(tmp_path / "coco", "train2017", seed=3)
    checked = mirrored = 0
    for position in range(60):
        crop, target = stream[position, 14]
        assert crop.shape == (3, 224, 168) and crop.dtype == torch.uint8
        known = stream.data.keypoints[stream.row_at(position)]
        colours = {}
        for k, (px, py, v) in enumerate(target["keypoints"].tolist()):
            px, py = round(px), round(py)
            if v and 1 <= px < 167 and 1 <= py < 223 and crop[2, py, px] == 200:
                colours[k] = crop[:2, py, px].float().numpy()
        if not colours:
            continue
        straight = max(np.abs(colours[k] - known[k, :2]).max() for k in colours)
        other = {k: known[CATEGORIES[0]["mirror"][k], :2] for k in colours}
        flipped = max(np.abs(colours[k] - other[k]).max() for k in colours)
        assert min(straight, flipped) < 1.6  # rounding, in image pixels
        checked, mirrored = checked + 1, mirrored + (flipped < straight)
    assert checked > 40 and 0.25 * checked < mirrored < 0.75 * checked


def test_augmentation_is_vitposes(people):
    """Half are mirrored (above), 0.6 turned, sizes 0.5..1.5 of the box's region, 0.3 of persons halved."""
    stream, seen = pose.Pose(people, "train2017"), []
    keep = pose.warp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pose,
            "warp",
            lambda image, crop, size, turn: seen.append((crop.copy(), turn)) or keep(image, crop, size, turn),
        )
        for position in range(300):
            stream[position, 2]
    regions = [pose.region(stream.data.boxes_xywh[stream.row_at(p)], 0.75) for p in range(300)]
    turned = np.array([turn for _, turn in seen])
    ratio = np.array([crop[2] / region[2] for (crop, _), region in zip(seen, regions, strict=True)])
    moved = np.array(
        [abs(crop[1] - region[1]) > 1e-3 for (crop, _), region in zip(seen, regions, strict=True)]
    )
    many = np.array([(stream.data.keypoints[stream.row_at(p)][:, 2] > 0).sum() > 8 for p in range(300)])
    assert (
        np.mean(turned != 0) == pytest.approx(0.6, abs=0.1) and np.abs(turned).max() <= np.deg2rad(80) + 1e-6
    )
    assert ratio[~moved].min() >= 0.499 and ratio[~moved].max() <= 1.501
    # Of a normal deviation of 0.5, cut at one deviation, and of 40 degrees, cut at two
    assert ratio[~moved].std() == pytest.approx(0.36, abs=0.04)
    assert turned[turned != 0].std() == pytest.approx(np.deg2rad(38.4), abs=0.08)
    assert np.mean(moved[many]) == pytest.approx(0.3, abs=0.1) and not moved[~many].any() and many.any()


def test_half_of_a_person_is_centred_on_its_keypoints(people):
    """1.5 times the extent of its keypoints; 3 in 10 persons; the lower half: hips and below."""
    stream, rng = pose.Pose(people, "train2017"), np.random.default_rng(0)
    points = np.concatenate([rng.uniform(0, 90, (17, 2)), np.full((17, 1), 2)], 1).astype(np.float32)
    expected = []
    for part in (points[:11, :2], points[11:, :2]):  # the lower: hips, knees, ankles
        (w, h), centre = part.max(0) - part.min(0), part.mean(0)
        expected.append([*centre, 1.5 * max(w, 0.75 * h), 1.5 * max(h, w / 0.75)])
    torch.manual_seed(0)
    crops = [crop for _ in range(200) if (crop := stream.half_body(points, 0.75)) is not None]
    which = [int(np.abs(crop - expected[1]).max() < 1e-3) for crop in crops]
    for crop, k in zip(crops, which, strict=True):
        np.testing.assert_allclose(crop, expected[k], rtol=1e-5)
    assert 40 < len(crops) < 80 and 0.3 < np.mean(which) < 0.7


def test_real_keypoints_come_back_from_their_own_heat_maps(real_coco, real_data):
    """To half a heat-map pixel, and with OKS AP 1, through the boxes of two real annotation files."""
    head, crop = pose_head.Pose(D, CATEGORIES), (224, 168)
    head.decoder = nn.Identity()
    for folder in (real_coco, real_data("keypoint_topdown")):
        items = PersonBoxes(folder, "val2017")
        items.patch, kept, count = 14, [], torch.zeros(2)
        for i in range(len(items)):
            person, target = items[i]
            known = items.data.keypoints[items.rows[i]]
            inside = torch.from_numpy(pose.to_crop(known, target["crop_cxcywh"].numpy(), crop))
            heat, weight = head.targets(inside[None], (64, 48), crop)
            both = torch.cat(
                [heat, heat.flip(3)[:, items.categories[0]["mirror"]]]
            )  # what a mirror would show
            (answer,) = head.predict(features(both), [target])
            # where the smoothing does not reach over the edge of the crop; few annotations lie beyond
            at = inside[:, :2] / 3.5
            seen = (weight[0] > 0) & (at > 5).all(1) & (at < torch.tensor([42, 58])).all(1)
            count += torch.tensor([seen.sum(), (weight > 0).sum()])
            seen = seen.numpy()
            pixel = (target["crop_cxcywh"][2:] / torch.tensor([47.0, 63])).numpy()
            error = np.abs(answer["keypoints"][:, :2].numpy() - known[:, :2]) / pixel
            assert error[seen].max() < 0.5
            kept.append(answer)
        results = keypoint_results(kept, items.categories)
        assert len(results) == len(items) and count[0] > 0.9 * count[1]
        scores = average_precision(items.truth, results, "keypoints", items.image_ids)
        assert scores["keypoint AP"] == pytest.approx(100, abs=1e-9)


# --- data


def detections(path: Path, *boxes) -> Path:
    keys = ("image_id", "category_id", "bbox", "score")
    path.write_text(json.dumps([dict(zip(keys, box, strict=True)) for box in boxes]))
    return path


def test_every_person_is_evaluated_once(people, tmp_path):
    items = PersonBoxes(people, "val2017")
    content = json.loads((people / "annotations" / "person_keypoints_val2017.json").read_text())
    whole = [a for a in content["annotations"] if not a["iscrowd"]]
    assert [t["item"] for _, t in (items[i] for i in range(len(items)))] == list(range(len(whole)))
    assert items.image_ids == [1, 2, 3, 4, 5]
    assert len(PersonBoxes(people, "val2017", limit=2)) == sum(a["image_id"] <= 2 for a in whole)
    boxes = detections(
        tmp_path / "boxes.json",
        (3, 1, [1, 2, 30, 40], 0.5),
        (1, 1, [5, 6, 20, 30], 0.25),
        (1, 2, [5, 6, 9, 9], 1),
    )
    items = PersonBoxes(people, "val2017", boxes=boxes)
    known = [(items[i][1]["image_id"], items[i][1]["score"]) for i in range(len(items))]
    assert known == [(1, 0.25), (3, 0.5)]
    images, valid, y = PersonBoxes.collate([items[0], items[1]], 1, (0.5,) * 3, (0.5,) * 3)
    assert valid is None and len(y) == 2 and torch.equal(images[2:], images[:2].flip(3))


@pytest.mark.parametrize(
    "text, says",
    [
        ("[]", "has no box of a person"),
        ('[{"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 1}]', "has no box of a person"),
        (
            '[{"image_id": 77, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 1}]',
            "not in the annotations: 77",
        ),
        ('[{"image_id": 1}]', r"results\[0\] of 1 .image_id 1.: no field bbox"),
        ("{", "is not JSON"),
    ],
)
def test_bad_detections_are_named(people, tmp_path, text, says):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        PersonBoxes(people, "val2017", boxes=tmp_path / "boxes.json")
    assert str(tmp_path / "boxes.json") in str(error.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c["annotations"][0].update(image_id=77), r"annotations\[0\] of .*: unknown image id 77"),
        (
            lambda c: c["annotations"][0].update(keypoints=[1, 2, 2]),
            r"annotations\[0\] of .*: 3 numbers in keypoints, not 3 x 17",
        ),
        (lambda c: c["categories"].clear(), "0 categories have keypoints"),
        (lambda c: c["annotations"][0].pop("bbox"), r"annotations\[0\] of .*: no field bbox"),
    ],
)
def test_bad_annotations_are_named(people, tmp_path, change, says):
    shutil.copytree(people, tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "person_keypoints_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        pose.read_persons(tmp_path / "coco", "val2017")


# --- stages


def small(people, out, **changed) -> list:
    options = {
        "iters": 4,
        "batch": 2,
        "lr": 1e-3,
        "warmup": 1,
        "image-scale": 0.2,
        "save-every": 2,
        **changed,
    }
    fixed = ["--model", "eva_mini", "--weights", "random", "--workers", 0, "--coco", people, "--out", out]
    return [*fixed, *(x for k, v in options.items() for x in (f"--{k}", v))]


def test_stages_train_resume_and_agree_over_ranks(people, tmp_path, run, run_ranks):
    """BatchNorm's running means are part of the run: resumed is uninterrupted, two ranks are one process."""
    one = small(people, tmp_path / "one")
    assert run("stage1_heads", "--task", "pose", *one)[0] == 0
    whole = load_file(tmp_path / "one" / "pose.safetensors")
    assert whole["decoder.1.num_batches_tracked"] == 4 and whole["decoder.1.running_mean"].abs().max() > 0
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "one" / "previous.pt", tmp_path / "again" / "last.pt")  # as if killed after step 2
    assert run("stage1_heads", "--task", "pose", *small(people, tmp_path / "again"), "--resume")[0] == 0
    parts = load_file(tmp_path / "again" / "pose.safetensors")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())

    options = small(people, tmp_path / "two", batch=1)
    codes, outs = run_ranks(2, "stage1_heads", "--task", "pose", *options)
    assert codes == [0, 0], outs
    two = load_file(tmp_path / "two" / "pose.safetensors")
    for name, value in whole.items():  # Adam's first steps have the size of the rate whatever the gradient's
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4)

    options = small(people, tmp_path / "tuned", lr=1e-2, rank=4)
    assert run("stage2_lora", "--tasks", "pose", "--heads", tmp_path / "one", *options)[0] == 0
    tuned = load_file(tmp_path / "tuned" / "lora.safetensors")
    assert all(value.abs().max() > 0 for value in tuned.values())


def test_the_loss_falls(people):
    """On four crops of noise, from which the head can tell what to draw."""
    torch.manual_seed(0)
    head, grid = pose_head.Pose(D, CATEGORIES).train(), torch.randn(4, D, 4, 3)
    keypoints = torch.rand(4, 17, 3) * torch.tensor([42.0, 56, 1])
    keypoints[..., 2] = 2
    y = [{"keypoints": k, "padded_size": (56, 42)} for k in keypoints]
    optimizer, losses = torch.optim.AdamW(head.parameters(), 5e-3), []
    for _ in range(80):
        loss, _ = head(features(grid), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_sample_depends_on_its_position_alone(people):
    first, second = (pose.Pose(people, "train2017", seed=1) for _ in range(2))
    samples = {p: first[p, 14] for p in (0, 5, 9)}
    for p in (9, 0, 5):
        crop, target = second[p, 14]
        assert torch.equal(crop, samples[p][0]) and torch.equal(
            target["keypoints"], samples[p][1]["keypoints"]
        )
    ((images, valid, y),) = take(first, 1, batch=3)
    assert images.shape == (3, 3, 224, 168) and valid is None and len(y) == 3


def test_images_without_persons_are_refused_by_name(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    names = ["nose", "left_eye", "right_eye"]
    person = {"id": 1, "name": "person", "keypoints": names, "sigmas": [0.1, 0.1, 0.1]}
    content = {"images": [], "annotations": [], "categories": [person]}
    (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
    assert pose.read_persons(tmp_path, "val2017").keypoints.shape == (0, 3, 3)
    with pytest.raises(ValueError, match="no person with keypoints in 0 images"):
        PersonBoxes(tmp_path, "val2017")
