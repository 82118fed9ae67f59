"""Images with the captions that people wrote: COCO's, NoCaps', Karpathy's and LAVIS's JSON."""

from pathlib import Path

from files import Items, read_json


def read(path: str | Path) -> tuple[str, list[dict], list[str]]:
    """The data set's name, its images, what the user should know; of Karpathy's, the test images alone.

    Each image: id, image (its file), references (captions), domain (NoCaps', or None)
    Raises FileNotFoundError, or ValueError naming what is not as it should be.
    """
    content = read_json(path)
    name = Path(path).stem
    if isinstance(content, list):  # LAVIS's, BLIP's
        entries = Items(path, content, "entries")
        items = {}
        for k, image in enumerate(entries.column("image", str)):
            told = content[k].get("caption")
            texts = [told] if isinstance(told, str) else told
            if not (isinstance(texts, list) and {str}.issuperset(map(type, texts))):
                entries.refuse(k, f"caption must be text, or a list of texts, got {told!r:.60}")
            item = items.setdefault(image, {"id": image, "image": image, "references": [], "domain": None})
            item["references"] += map(entries.whole, texts)
        found, replaced = list(items.values()), entries.replaced
    elif isinstance(content, dict) and "annotations" in content:  # COCO's, NoCaps'
        images, annotations = (Items(path, content.get(k), k) for k in ("images", "annotations"))
        ids, names = images.ids(), images.column("file_name", str)
        found = [
            {"id": i, "image": image, "references": [], "domain": item.get("domain")}
            for i, image, item in zip(ids, names, images.items, strict=True)
        ]
        rows = annotations.refer("image_id", {i: row for row, i in enumerate(ids)}, "image")
        for row, text in zip(rows, annotations.column("caption", str), strict=True):
            found[row]["references"].append(text)
        replaced = annotations.replaced
    elif isinstance(content, dict) and "images" in content:
        name, found, replaced = content.get("dataset", name), [], 0
        for image in karpathy(path, content, ("test",)):
            file = "/".join(filter(None, (image["place"], image["name"])))
            captions = image["sentences"].column("raw", str)
            found.append({"id": image["id"], "image": file, "references": captions, "domain": None})
            replaced += image["sentences"].replaced
    else:
        raise ValueError(
            f"{path}: neither NoCaps', COCO's nor Karpathy's JSON, nor a list of image and caption"
        )
    note = f"{path}: half a character (a lone surrogate) replaced in {replaced} captions"
    return name, found, [note] * bool(replaced)


def karpathy(path: str | Path, content, splits: tuple[str, ...]) -> list[dict]:
    """Images of a Karpathy JSON: id, place (folder, or ""), name (of the file), sentences (Items).

    id: COCO's, cocoid; where the file has none, as for Flickr30k, imgid, or else the file's name
    """
    images = Items(path, content.get("images") if isinstance(content, dict) else None, "images")
    mine = [k for k, split in enumerate(images.column("split", str)) if split in splits]
    kinds = (key for key in ("cocoid", "imgid") if any(key in image for image in images.items))
    ids = images.ids(next(kinds, "filename"))
    places, names = images.column("filepath", str, default=""), images.column("filename", str)
    sentences = images.column("sentences", list)
    return [
        {
            "id": ids[k],
            "place": places[k],
            "name": names[k],
            "sentences": Items(path, sentences[k], f"{images.where(k)}: sentences"),
        }
        for k in mine
    ]
