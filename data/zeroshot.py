"""Images for CLIP to name or to find: class folders (Table 5) and images with captions (Table 6).

    open_set("imagenet-a", "imagenet-a")      one of KNOWN: names and templates are built in
    open_set("shapes", "out/shapes/plain")    any other: names.json beside its class folders,
        {"names": {"<folder>": "<class name>", ...}, "templates": ["a picture of a {}.", ...]}
    open_captions("dataset_coco.json", "coco")

A label is looked up by the name of its folder, never by its place among the folders: a missing folder shifts
nothing, a folder that is no class is refused. In either case a text is an entry of `texts` put into every one
of `templates`.
"""

import csv
import json
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.pictures import locate
from data.references import read
from files import expecting, read_json, shown

KNOWN = {  # Table 5's columns, in its order
    "imagenet-a": "ImageNet-A",
    "imagenet-r": "ImageNet-R",
    "imagenet-sketch": "ImageNet-S",
    "imagenet-1k": "ImageNet-1K",
    "eurosat": "EuroSAT",
    "cifar-10": "CIFAR-10",
    "cifar-100": "CIFAR-100",
    "gtsrb": "GTSRB",
    "caltech-101": "Caltech-101",
}
# Where the class folders may be in what is unpacked, or in torchvision's layouts of it
INSIDE = ("", "val", "2750", "eurosat/2750", "101_ObjectCategories", "caltech101/101_ObjectCategories")


@dataclass
class Benchmark:
    """E_o: n images, and the texts to be matched with them.

    images: n files, or an (n, h, w, 3) uint8 array; texts: the class names or the captions;
    templates: strings with one {}; target: (n,) the class of each image, or (T,) the image of each caption;
    notes: what the user should know
    """

    name: str
    images: list[str] | np.ndarray
    texts: list[str]
    templates: list[str]
    target: Tensor
    notes: list[str] = field(default_factory=list)


# --- classification


def open_set(name: str, folder: str, limit: int | None = None) -> Benchmark:
    """A labelled set; of folders, the first image of every class, then the second, and so on.

    Raises FileNotFoundError, or ValueError naming folders that are no class, or a names.json that is not one.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--set {name}={folder}: no such folder")
    names, templates = class_list(name, root)
    classes = {_plain(folder): i for i, folder in enumerate(names)}
    if len(classes) < len(names):
        raise ValueError(f"{root}/names.json: two of its folders differ only in space, _ or leading zeros")
    images, folders = _own_format(name, root) or _class_folders(name, root, classes)
    unknown = sorted({folder for folder in folders if _plain(folder) not in classes})
    if unknown:
        raise ValueError(
            f"{root}: {len(unknown)} folders are no class of {name}: {', '.join(unknown[:5])}. Move them "
            "away, or call the set otherwise and put a names.json beside them"
        )
    target = torch.tensor([classes[_plain(folder)] for folder in folders])
    present = set(target.tolist())
    absent = [n for i, n in enumerate(names) if i not in present]
    notes = [f"{name}: {len(images)} images, {len(names)} classes"]
    if absent:
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        notes.append(f"{name}: no images of {len(absent)} classes, which stay in the choice: {shown}")
    return Benchmark(name, images[:limit], list(names.values()), templates, target[:limit], notes)


def class_list(name: str, root: Path) -> tuple[dict[str, str], list[str]]:
    """{folder: class name} in the order of the classes, and templates: built in, or from names.json."""
    if name.startswith("imagenet-") and name in KNOWN:
        import open_clip

        info = resources.files("timm.data._info")
        wnids = (info / "imagenet_synsets.txt").read_text().split()  # ascending, as the 1,000 names
        names = dict(zip(wnids, open_clip.IMAGENET_CLASSNAMES, strict=True))
        if name in ("imagenet-a", "imagenet-r"):  # 200 of them
            part = (info / f"{name.replace('-', '_')}_synsets.txt").read_text().split()
            names = {wnid: names[wnid] for wnid in part}
        return names, [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    if name in KNOWN:
        content = json.loads(Path(__file__).with_name("zeroshot_names.json").read_text())[name]
        return content["names"], content["templates"]
    file = root / "names.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, and {name} is none of {', '.join(KNOWN)}")
    with expecting(file, "a names.json"):
        content = read_json(file)
        names, templates = content["names"], content["templates"]
        good = names and templates and type(names) is dict and type(templates) is list
        wrong = [f"{k}: {shown(v)}" for k, v in names.items() if not (isinstance(v, str) and v)]
        wrong += [
            shown(t) for t in templates if not (isinstance(t, str) and t.count("{}") == 1 == t.count("{"))
        ]
    if wrong or not good:
        found = f", got {wrong[0]}" if wrong else ""
        raise ValueError(
            f"{file}: expected names, {{folder: class name}}, and templates, each with one {{}}{found}"
        )
    return names, templates


def _plain(folder: str) -> str:
    """aquarium fish = aquarium_fish, 00001 = 1: as the same set is found on disk."""
    return str(int(folder)) if folder.isdecimal() else folder.replace(" ", "_")


def _own_format(name: str, root: Path) -> tuple[np.ndarray | list[str], list[str]] | None:
    """Images and the folder each would be in, from CIFAR's or GTSRB's files; None if they are not there."""
    from torchvision.datasets import CIFAR10, CIFAR100

    reader = {"cifar-10": CIFAR10, "cifar-100": CIFAR100}.get(name)
    if reader and (root / reader.base_folder).is_dir():
        try:
            data = reader(root, train=False)
        except RuntimeError as error:
            raise ValueError(f"{root / reader.base_folder}: torchvision refuses it: {error}") from error
        return data.data, [data.classes[label] for label in data.targets]
    if name == "gtsrb" and (root / "gtsrb/GT-final_test.csv").is_file():
        with open(root / "gtsrb/GT-final_test.csv", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
        images = root / "gtsrb/GTSRB/Final_Test/Images"
        return [str(images / row["Filename"]) for row in rows], [row["ClassId"] for row in rows]
    return None


def _class_folders(name: str, root: Path, classes: dict[str, int]) -> tuple[list[str], list[str]]:
    """Image files and their folders' names: the first of every folder, then the second, and so on."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    def folders(inside: str) -> list[Path]:
        if not (root / inside).is_dir():
            return []
        return sorted(p for p in (root / inside).iterdir() if p.is_dir() and p.name[0] != ".")

    places = (folders(inside) for inside in INSIDE)
    class_folders = next((f for f in places if any(_plain(p.name) in classes for p in f)), None)
    if class_folders is None:
        there, wanted = ", ".join(p.name for p in folders("")[:3]), ", ".join(list(classes)[:3])
        raise ValueError(f"{root} has no class folder of {name} ({wanted}, ...); it has {there or 'none'}")
    images = []
    for folder in class_folders:
        files = sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        images += [(k, folder.name, file) for k, file in enumerate(files)]
    if not images:
        raise ValueError(f"{root}: no images in its {len(class_folders)} class folders")
    images.sort()
    return [file for *_, file in images], [folder for _, folder, _ in images]


# --- retrieval


def open_captions(file: str, folder: str, limit: int | None = None) -> Benchmark:
    """Images with their captions, all of them, as they are written.

    file: Karpathy's JSON (its test images), COCO's captions_*.json, or LAVIS's list of {image, caption}
    Raises FileNotFoundError, or ValueError naming images without a file, images without captions, or what
    the file lacks.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--captions {file}: no such file")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    name, found, notes = read(path)
    captions = {item["image"]: item["references"] for item in found}
    if not captions:
        raise ValueError(f"{file} holds no images (of Karpathy's splits, only `test` is read)")
    if len(captions) < len(found):
        raise ValueError(f"{file}: {len(found) - len(captions)} images have the file name of another")
    if silent := [image for image, texts in captions.items() if not any(text.strip() for text in texts)]:
        raise ValueError(f"{file}: {len(silent)} of {len(captions)} images have no caption: {silent[:3]}")
    captions = dict(islice(captions.items(), limit))
    images = locate(folder, captions, file)
    texts = [text for image in captions.values() for text in image]
    target = torch.tensor([i for i, image in enumerate(captions.values()) for _ in image])
    notes = [f"{name}: {len(images)} images, {len(texts)} captions", *notes]
    return Benchmark(name, images, texts, ["{}"], target, notes)
