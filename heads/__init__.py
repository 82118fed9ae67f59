"""The in-domain task heads T_n by task name, and their files: safetensors with a JSON header to rebuild from.

Every head is built as Head(dim, ...) with its arguments kept in `config`, and answers
    loss, parts = head.loss(f, y)     # scalar; detached scalars for the log
    head.predict(f, y)                # a list of B dicts: the task's answer for each image, or person
to_coco_results in the head's module turns these into COCO's results format.

To predict, y holds for each image: image_id, orig_size (h, w), size after the resize, padded_size. For each
of pose's crops (data.pose.person_crop): image_id, crop_cxcywh and score of the box.
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from heads.captioner import Captioner
from heads.detr import Detr
from heads.mask2former import Mask2Former, Panoptic
from heads.pose import Pose

HEADS = {  # Table 1
    "detection": Detr,
    "segmentation": Mask2Former,
    "panoptic": Panoptic,
    "captioning": Captioner,
    "pose": Pose,
}


def save(head: nn.Module, path: str | Path, task: str, /, **header) -> None:
    """Write the weights and what rebuilds the head without its data set: task, sizes, categories or words."""
    header = {"task": task, "config": head.config, **header}
    part = Path(f"{path}.tmp")
    state = {name: value.contiguous() for name, value in head.state_dict().items()}
    save_file(state, part, metadata={"head": json.dumps(header)})
    part.replace(path)


def read_header(path: str | Path) -> dict:
    """The JSON header alone. Raises FileNotFoundError, or ValueError if the file is not one of ours."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no head file at {path}")
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["head"])
    except Exception as error:
        raise ValueError(f"{path}: not one of our head files ({type(error).__name__}: {error})") from error


def load(path: str | Path, dim: int) -> nn.Module:
    """A head in eval mode. Raises ValueError if it was made for features of another width than `dim`."""
    header = read_header(path)
    if header["config"]["dim"] != dim:
        raise ValueError(f"{path} was made for a backbone of width {header['config']['dim']}, not {dim}")
    head = HEADS[header["task"]](**header["config"])
    with safe_open(path, "pt") as file:
        head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return head.eval()


def find(places: list[str], task: str, features: dict) -> Path:
    """The file of a task's head, among files and folders with TASK.safetensors or TASK/TASK.safetensors.

    features: what it must have been trained on: backbone, no_cls, imagenet_norm
    Raises FileNotFoundError saying where it looked, or ValueError if the head knows other features.
    """
    looked = []
    for place in map(Path, places):
        candidates = [place / f"{task}.safetensors", place / task / f"{task}.safetensors"]
        if place.is_file():
            candidates = [place] if read_header(place)["task"] == task else []
        looked += candidates
        path = next((path for path in candidates if path.is_file()), None)
        if path:
            header = read_header(path)
            wrong = [
                f"{k} {header[k]}, not {now}" for k, now in features.items() if header.get(k, now) != now
            ]
            if wrong:
                raise ValueError(f"{path} was trained with {'; '.join(wrong)}: both stages must agree")
            return path
    where = " or ".join(map(str, looked or places))
    raise FileNotFoundError(
        f"no {task} head at {where}: stage1_heads.py --task {task} trains it; or see --heads"
    )


def check_classes(head: nn.Module, classes: list, path: Path) -> None:
    """Raises ValueError if the head's categories or words are not those of the data, in the same order."""
    name = "vocabulary" if "vocabulary" in head.config else "categories"
    had = head.config[name]
    if had != classes:
        at = next((i for i, (a, b) in enumerate(zip(had, classes, strict=False)) if a != b), "the end")
        words = "words" if name == "vocabulary" else name
        same = (
            "made from the same captions with the same --min-count"
            if words == "words"
            else "in the same order"
        )
        raise ValueError(
            f"{path} knows {len(had)} {words}, the data has {len(classes)}, unlike from {at} on: "
            f"they must be the same, {same}"
        )
