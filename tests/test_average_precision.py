"""COCO's AP: published figures, and results that do not belong."""

import json
from pathlib import Path

import pytest

from scores.average_precision import average_precision
from tests.conftest import SHARED, needs_real_data


def read(*parts: str):
    return json.loads((SHARED / Path(*parts)).read_text())


@needs_real_data
def test_published_box_figures_come_out():
    results = read("detection_eval", "results", "instances_val2014_fakebbox100_results.json")
    expected = read("detection_eval", "expected.json")["instances_val2014_fakebbox100_results.json"]
    annotations = SHARED / "detection_eval" / "annotations" / "instances_val2014_100.json"
    ids = [image["id"] for image in json.loads(annotations.read_text())["images"]]
    scores = average_precision(json.loads(annotations.read_text()), results, "bbox", ids)
    assert list(scores.values()) == pytest.approx([100 * v for v in expected["stats_12"]], abs=1e-9)
    assert scores["box AP"] == pytest.approx(50.5, abs=0.05) and list(scores)[1] == "box AP50"


def test_bad_results_are_named(scenes):
    annotations = scenes / "annotations" / "instances_val2017.json"
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    for change, says in (
        ({"image_id": 99}, "not in the annotations: 99"),
        ({"category_id": 50}, "no category 50"),
    ):
        with pytest.raises(ValueError, match=says):
            average_precision(json.loads(annotations.read_text()), [good, {**good, **change}], "bbox", [1, 2])


def test_only_the_images_evaluated_count(scenes):
    """All of image 1, nothing of the others."""
    path = scenes / "annotations" / "instances_val2017.json"
    results = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 1.0}
        for a in json.loads(path.read_text())["annotations"]
        if a["image_id"] == 1
    ]
    truth = json.loads(path.read_text())
    of = {n: average_precision(truth, results, "bbox", range(1, n + 1)) for n in (1, 4)}
    assert of[1]["box AP"] == pytest.approx(100) and of[4]["box AP"] < 90
