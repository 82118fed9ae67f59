"""The in-domain task heads T_n by task name, and how one is built from its file."""

from pathlib import Path

from safetensors import safe_open
from torch import nn

from heads import read_header
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


def load(path: str | Path, dim: int) -> nn.Module:
    """A head in eval mode. Raises ValueError if it was made for features of another width than `dim`."""
    header = read_header(path)
    if header["config"]["dim"] != dim:
        raise ValueError(f"{path} was made for a backbone of width {header['config']['dim']}, not {dim}")
    head = HEADS[header["task"]](**header["config"])
    with safe_open(path, "pt") as file:
        head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    return head.eval()


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
