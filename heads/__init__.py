"""The task heads T_n and their files: safetensors with a JSON header to rebuild from; by_task: the classes.

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
