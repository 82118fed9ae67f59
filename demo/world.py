"""A made-up world in the real file formats: scenes with all of COCO's annotations, words, classes, boxes.

    python demo/world.py OUT --train 400 --val 210 --words 2000 --size 112

    OUT/coco/{train,val}2017/*.jpg
    OUT/coco/annotations/...                 instances, person_keypoints, captions, panoptic
    OUT/coco/dataset_coco.json               Karpathy's splits of them, for retrieval
    OUT/words/train, OUT/words/test/SET      LMDBs in clovaai's layout
    OUT/shapes/VARIANT/CLASS/*.jpg           class folders, with names.json
    OUT/goi/{train,val}.jsonl                M3IT's coco-goi: what is in the red rectangle?

Every picture depends on (seed, index) alone. No script has a special case for this world.
"""

import argparse
import base64
import io
import json
import math
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import contourpy
import lmdb
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as rle

FINE = 2  # pictures are drawn at twice their size and averaged

COLORS = {
    "red": (206, 38, 40), "green": (40, 150, 48), "blue": (35, 90, 200), "orange": (250, 130, 20),
    "purple": (135, 60, 175), "yellow": (240, 215, 40), "white": (240, 240, 240), "black": (28, 28, 28),
}  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "checked")
STUFF = ("sky", "grass", "water", "sand", "brick", "wood")
GROUNDS, WALLS = ("grass", "water", "sand", "wood"), ("sky", "brick", "wood")
KEYPOINTS = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow "
    "left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
SKELETON = [
    [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9],
    [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7],
]  # fmt: skip
TEMPLATES = (
    "a picture of a {}",
    "a photo of a {}",
    "an image of a {}",
    "a {}",
)  # pretraining has no full stop
VARIANTS = ("plain", "sketch", "rotated", "noisy")
WORD_SETS = ("plain", "fonts", "blur", "curved", "clutter", "unseen")
LEXICON = (  # what signs say; the word sets have some of its short words, `unseen` made-up ones instead
    "air art auto bag bait bake ball band bank bar bath beach bed beer bell bench bike bird boat book box "
    "bread bridge bus cab cafe cake camp car card care cash cat chef city class clinic clock cloth club coal "
    "coat coffee cold corn craft cream cycle dairy dance deli desk dock dog door drink drive east enter exit "
    "farm fast ferry film fire fish flag flat food fresh fruit fuel game gate gift glass gold golf grand "
    "green grill guide gym hair hall hat hill home honey horse hot hotel ice inn jazz juice key king "
    "lake lamp lane law left lift lime live lock lunch mail map market meat menu metal milk mill mint motel "
    "music new news nine north nurse oak office oil open over paint park party path pay pets phone pizza "
    "plant play plaza point pool post print pub pull push quiet radio rail rent rest rice right river road "
    "room rose sale salt school shoe shop show silk slow snack soap soup south spa sport stage star stop "
    "store studio sugar sun taxi tea tile toys track train tram tree tunnel video view wait walk water way "
    "west wine wood yard yoga zone zoo"
).split()
SHORT = tuple(word for word in LEXICON if len(word) <= 4)[::3]  # few enough to be learned in minutes
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
SEEN = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
        "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol")  # fmt: skip
UNSEEN = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10", "STIXGeneralBolIta", "DejaVuSerif-BoldItalic")


# --- outlines of the shapes, (n, 2) with the largest distance from the centre about 1, y down


def _arc(n: int, start: float = -90, end: float = 270, radius: float = 1, x: float = 0) -> np.ndarray:
    """n points from angle `start` on, in degrees, the end left out."""
    angles = np.radians(np.linspace(start, end, n, endpoint=False))
    return np.stack([radius * np.cos(angles) + x, radius * np.sin(angles)], 1)


_T = np.linspace(0, 2 * math.pi, 32, endpoint=False)
_HEART_Y = 5 * np.cos(2 * _T) + 2 * np.cos(3 * _T) + np.cos(4 * _T) - 13 * np.cos(_T)
_BAR = 0.36  # half the width of the cross's bars
OUTLINES = {
    "circle": _arc(28),
    "triangle": _arc(3),
    "square": _arc(4, 45, 405),
    "hexagon": _arc(6),
    "star": _arc(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None],
    "cross": np.array([
        (-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR), (1, _BAR), (_BAR, _BAR),
        (_BAR, 1), (-_BAR, 1), (-_BAR, _BAR), (-1, _BAR), (-1, -_BAR), (-_BAR, -_BAR),
    ]),
    "heart": np.stack([16 * np.sin(_T) ** 3, _HEART_Y], 1) / 17,
    "moon": np.concatenate([_arc(22, 60, 300), _arc(16, 270, 90, 0.866, 0.5)]) + (0.2, 0),
    "ring": np.concatenate([_arc(28), _arc(1), 0.55 * _arc(1), 0.55 * _arc(28)[::-1]]),
    "arrow": np.array([(0, -1), (0.75, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.75, -0.1)]),
    "drop": np.stack([0.85 * np.sin(_T) * np.sin(_T / 2) ** 1.5, -np.cos(_T)], 1),
    "bolt": np.array([(0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.25), (0.08, -0.25)]),
}  # fmt: skip
THINGS = ("person", "sign", *OUTLINES)
THING_IDS = {name: i for i, name in enumerate(THINGS, 1)}
STUFF_IDS = {name: i for i, name in enumerate(STUFF, 101)}


# --- drawing


@dataclass
class Thing:
    """One object. keypoints (17, 2) in pixels for a person; mask (h, w) bool: what is seen of it."""

    name: str
    color: str
    texture: str = "plain"
    word: str = ""
    keypoints: np.ndarray | None = None
    back: bool = False  # a person seen from behind: no face
    mask: np.ndarray | None = None
    box: tuple[int, int, int, int] = (0, 0, 0, 0)  # x0, y0, x1, y1 of the mask

    @property
    def phrase(self) -> str:
        """As a caption names it: a red striped star, a person in blue, a white sign."""
        if self.name == "person":
            return f"a person in {self.color}"
        words = [self.color, *([self.texture] if self.texture != "plain" else []), self.name]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


@dataclass
class Scene:
    image: Image.Image
    things: list[Thing]  # back to front
    stuff: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (h, w) bool, what is seen of it


class Canvas:
    """A picture at FINE times its size, and beside it which thing is on top of each pixel (0: none)."""

    def __init__(self, background: np.ndarray):
        h, w = background.shape[:2]
        self.size = (w, h)
        self.fine = Image.fromarray(background).resize((FINE * w, FINE * h), Image.Resampling.NEAREST)
        self.ids = Image.new("L", self.size)
        self.draw, self.draw_id = ImageDraw.Draw(self.fine), ImageDraw.Draw(self.ids)

    def polygon(self, xy: np.ndarray, fill: tuple, number: int) -> None:
        self.draw.polygon((FINE * xy).flatten().tolist(), fill=fill)
        self.draw_id.polygon(xy.flatten().tolist(), fill=number)

    def limb(self, a, b, width: float, fill: tuple, number: int) -> None:
        """A thick line with round ends."""
        for draw, scale, color in ((self.draw, FINE, fill), (self.draw_id, 1, number)):
            (ax, ay), (bx, by), r = scale * np.asarray(a), scale * np.asarray(b), scale * width / 2
            draw.line((ax, ay, bx, by), fill=color, width=max(1, round(2 * r)))
            for x, y in ((ax, ay), (bx, by)):
                draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def textured(self, xy: np.ndarray, texture: np.ndarray, corner: np.ndarray, number: int) -> None:
        """A polygon filled with a picture (h, w, 3) that lies at `corner` of the fine picture."""
        mask = Image.new("L", texture.shape[1::-1])
        ImageDraw.Draw(mask).polygon((FINE * xy - corner).flatten().tolist(), fill=255)
        self.fine.paste(Image.fromarray(texture), tuple(corner.tolist()), mask)
        self.draw_id.polygon(xy.flatten().tolist(), fill=number)

    def finish(self) -> tuple[Image.Image, np.ndarray]:
        return self.fine.reduce(FINE), np.asarray(self.ids)


def shade(rng: np.random.Generator, color: str, strength: float = 14) -> tuple[int, int, int]:
    """A colour near the named one."""
    return tuple(np.clip(np.array(COLORS[color]) + rng.normal(0, strength, 3), 0, 255).astype(int).tolist())


def smooth_noise(rng: np.random.Generator, h: int, w: int, rows: int, columns: int) -> np.ndarray:
    """(h, w) about -1..1: random values on a grid of rows x columns, interpolated."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize((w, h), Image.Resampling.BICUBIC))


def surface(rng: np.random.Generator, name: str, h: int, w: int, unit: float) -> np.ndarray:
    """(h, w, 3) float: a piece of stuff; `unit` is the length of a brick or a wave in pixels."""
    base = {"sky": (125, 175, 225), "grass": (88, 140, 62), "water": (45, 105, 150), "sand": (215, 190, 140),
            "brick": (160, 88, 70), "wood": (140, 100, 65)}[name]  # fmt: skip
    y, x = np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)[None]
    if name == "sky":
        light = 30 * y / h + 35 * smooth_noise(rng, h, w, 4, 3).clip(0)
    elif name == "grass":
        light = rng.normal(0, 22, (h // 3 + 1, w)).repeat(3, 0)[:h] + 10 * smooth_noise(rng, h, w, 4, 4)
    elif name == "water":
        wave = np.sin(2 * math.pi * y / (0.55 * unit) + 2 * smooth_noise(rng, h, w, 5, 5))
        light = 26 * wave + 8 * smooth_noise(rng, h, w, 6, 3)
    elif name == "sand":
        light = rng.normal(0, 12, (h, w)) + 12 * smooth_noise(rng, h, w, 3, 3)
    elif name == "brick":
        row = np.floor(2 * y / unit)
        mortar = (2 * y / unit % 1 < 0.2) | ((x / unit + 0.5 * (row % 2)) % 1 < 0.1)
        light = np.where(mortar, 65, rng.normal(0, 5, (h, w)))
    else:
        plank = np.floor(x / unit)
        light = (
            14 * smooth_noise(rng, h, w, 3, w // 2 + 1) + 16 * np.sin(7 * plank) - 45 * (x / unit % 1 < 0.08)
        )
    return np.array(base) + rng.normal(0, 9, 3) + light[..., None]


def background(
    rng: np.random.Generator, h: int, w: int, unit: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(h, w, 3) uint8, and the (h, w) bool region of each stuff: one, or a wall above a ground."""
    ground, wall = str(rng.choice(GROUNDS)), str(rng.choice(WALLS))
    whole = np.ones((h, w), bool)
    if rng.random() < 0.4 or ground == wall:
        name = str(rng.choice(STUFF))
        return surface(rng, name, h, w, unit).clip(0, 255).astype(np.uint8), {name: whole}
    horizon = int(h * rng.uniform(0.3, 0.7))
    upper = surface(rng, wall, horizon, w, unit)
    picture = np.concatenate([upper, surface(rng, ground, h - horizon, w, unit)])
    above = whole & (np.arange(h) < horizon)[:, None]
    return picture.clip(0, 255).astype(np.uint8), {wall: above, ground: ~above}


def add_shape(rng, canvas: Canvas, thing: Thing, center, radius: float, angle: float, number: int) -> None:
    """One of OUTLINES, turned and a little stretched."""
    stretch = np.array([1, rng.uniform(0.85, 1.15)])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    xy = center + radius * (OUTLINES[thing.name] * stretch) @ turn.T
    fill = shade(rng, thing.color)
    if thing.texture == "plain":
        return canvas.polygon(xy, fill, number)
    corner = np.floor(FINE * xy.min(0)).astype(int)
    w, h = (np.ceil(FINE * xy.max(0)).astype(int) - corner + 1).tolist()
    period, slant = FINE * max(3.0, radius * 0.5), rng.uniform(0, math.pi)
    u = (math.cos(slant) * np.arange(w)[None] + math.sin(slant) * np.arange(h)[:, None]) / period
    v = (math.cos(slant) * np.arange(h)[:, None] - math.sin(slant) * np.arange(w)[None]) / period
    if thing.texture == "striped":
        second = u % 1 < 0.4
    elif thing.texture == "checked":
        second = (u % 1 < 0.5) ^ (v % 1 < 0.5)
    else:
        second = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09
    other = (30, 30, 30) if sum(COLORS[thing.color]) > 330 else (235, 235, 235)
    canvas.textured(xy, np.where(second[..., None], other, fill).astype(np.uint8), corner, number)


def add_person(rng, canvas: Canvas, thing: Thing, center, height: float, number: int) -> None:
    """A figure from the front or from behind; its right is on our left when it faces us."""
    thing.back = bool(rng.random() < 0.2)
    side = np.array([1, -1]) * (-1 if thing.back else 1)  # x of its left, right
    cx, top = center[0], center[1] - height / 2
    lean = rng.normal(0, 0.05)

    def at(x, y):  # in units of the height, from the top of the head's middle
        return np.array([cx + height * (x + lean * (1 - y)), top + height * y])

    points = np.zeros((17, 2))
    head = at(0, 0.09)
    points[0] = head + (0, 0.015 * height)
    swing, spread = rng.uniform(-0.4, 2.6, (2, 2)), rng.uniform(-0.1, 0.45, (2, 2))
    for k, s in enumerate(side):  # left, right
        points[1 + k] = head + height * np.array([0.03 * s, -0.015])
        points[3 + k] = head + height * np.array([0.075 * s, 0])
        points[5 + k] = at(0.11 * s, 0.22)
        points[11 + k] = at(0.07 * s, 0.54)
        for joint, length, angle in (
            (5, 0.16, swing[k, 0]),
            (7, 0.15, swing[k, 0] + 0.7 * swing[k, 1] - 0.3),
        ):
            reach = np.array([s * math.sin(angle), math.cos(angle)])
            points[joint + 2 + k] = points[joint + k] + height * length * reach
        for joint, length, angle in ((11, 0.22, spread[k, 0]), (13, 0.22, spread[k, 0] - 0.5 * spread[k, 1])):
            reach = np.array([s * math.sin(angle), math.cos(angle)])
            points[joint + 2 + k] = points[joint + k] + height * length * reach
    skin, shirt = tuple(rng.choice([(240, 200, 170), (190, 140, 105), (120, 80, 55)]).tolist()), thing.color
    shirt, trousers, hair = shade(rng, shirt), shade(rng, "blue", 30), shade(rng, "black", 20)
    for k in (0, 1):
        for a, b, width, fill in ((11, 13, 0.09, trousers), (13, 15, 0.075, trousers), (7, 9, 0.05, skin)):
            canvas.limb(points[a + k], points[b + k], height * width, fill, number)
    canvas.polygon(points[[5, 6, 12, 11]], shirt, number)
    canvas.limb(points[5], points[6], height * 0.07, shirt, number)
    canvas.limb(points[11], points[12], height * 0.08, trousers, number)
    for k in (0, 1):
        canvas.limb(points[5 + k], points[7 + k], height * 0.065, shirt, number)
    canvas.limb(head, head + (0, 0.11 * height), height * 0.05, skin, number)
    canvas.limb(head, head, height * 0.17, hair, number)
    if not thing.back:
        canvas.limb(head + (0, 0.02 * height), head + (0, 0.025 * height), height * 0.135, skin, number)
        for eye in points[1:3]:
            canvas.limb(eye, eye, height * 0.025, (20, 20, 20), number)
    thing.keypoints = points


@lru_cache(256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONTS / f"{name}.ttf", size)


def made_up(rng: np.random.Generator) -> str:
    """A word of 3-5 letters that can be said aloud, seldom one of LEXICON."""
    pattern = str(rng.choice(["cvc", "cvcv", "cvcvc", "vcv", "cvcc"], p=[0.35, 0.25, 0.15, 0.1, 0.15]))
    return "".join(str(rng.choice(list("bdfghklmnprstvz" if p == "c" else "aeiou"))) for p in pattern)


def add_sign(rng, canvas: Canvas, thing: Thing, center, width: float, number: int) -> None:
    """A plate with a word on it, in black or white."""
    thing.word = str(rng.choice(LEXICON))
    text = thing.word.upper() if rng.random() < 0.5 else thing.word
    face = font(str(rng.choice(SEEN)), max(6, round(FINE * width * 1.35 / len(text))))
    x0, y0, x1, y1 = face.getbbox(text)
    half = np.array([(x1 - x0) / FINE + 4, (y1 - y0) / FINE + 4]) / 2
    corners = center + half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    canvas.polygon(corners, shade(rng, thing.color), number)
    ink = (20, 20, 20) if sum(COLORS[thing.color]) > 330 else (245, 245, 245)
    canvas.draw.text((FINE * (center - half + 2) - (x0, y0)).tolist(), text, fill=ink, font=face)


def add(rng, canvas: Canvas, thing: Thing, center, radius: float, number: int, tilt: float = 0.5) -> None:
    if thing.name == "person":
        add_person(rng, canvas, thing, center, 2.6 * radius, number)
    elif thing.name == "sign":
        add_sign(rng, canvas, thing, center, 2 * radius, number)
    else:
        add_shape(rng, canvas, thing, center, radius, rng.uniform(-tilt, tilt), number)


def any_thing(rng: np.random.Generator) -> Thing:
    """A sixth of all things are persons, a sixth signs."""
    kind = rng.random()
    name = "person" if kind < 1 / 6 else "sign" if kind < 1 / 3 else str(rng.choice(list(OUTLINES)))
    texture = str(rng.choice(TEXTURES, p=[0.5, 0.2, 0.15, 0.15])) if name in OUTLINES else "plain"
    return Thing(name, str(rng.choice(list(COLORS))), texture)


def scene(rng: np.random.Generator, size: int) -> Scene:
    """1-8 things before one or two kinds of stuff. `size` is the longest side in pixels.

    Things of which less than 12 pixels, or 1 part in 1,000 of the picture, are seen do not count.
    """
    w, h = (int(rng.integers(size * 3 // 4, size + 1)) for _ in range(2))
    pixels, regions = background(rng, h, w, 0.16 * size)
    canvas, placed, count = Canvas(pixels), [], 1 + int(rng.binomial(7, 0.35))
    things = [any_thing(rng) for _ in range(count)]
    for number, thing in enumerate(things, 1):
        radius = size * rng.uniform(0.09, 0.22) * (1.15 - 0.06 * count)
        margin = 0.8 * radius * (1.5 if thing.name == "person" else 1)
        for _ in range(6):  # mostly apart, so that what overlaps is the exception
            center = rng.uniform((margin, margin), (w - margin, h - margin))
            if all(np.hypot(*(center - c)) > 0.9 * (radius + r) for c, r in placed):
                break
        placed.append((center, radius))
        add(rng, canvas, thing, center, radius, number)
    image, ids = canvas.finish()
    for number, thing in enumerate(things, 1):
        thing.mask = ids == number
        rows, columns = np.flatnonzero(thing.mask.any(1)), np.flatnonzero(thing.mask.any(0))
        if len(rows):
            thing.box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    seen = [thing for thing in things if thing.mask.sum() >= max(12, h * w / 1000)]
    stuff = {name: region & (ids == 0) for name, region in regions.items()}
    return Scene(image, seen, {name: region for name, region in stuff.items() if region.any()})


# --- words


def word_picture(
    rng: np.random.Generator, kind: str, known: tuple[str, ...] = SHORT
) -> tuple[Image.Image, str]:
    """A word as it is cropped from a picture, and its letters. kind: one of WORD_SETS; `plain` trains.

    known: the words that it may be
    """
    told = str(rng.choice(known)) if rng.random() < 0.9 else "".join(map(str, rng.integers(0, 10, 4)))
    text = made_up(rng) if kind == "unseen" else told
    text = str(rng.choice([text, text.upper(), text.capitalize()]))
    face = font(str(rng.choice(UNSEEN if kind == "fonts" else SEEN)), int(rng.integers(22, 30)))
    x0, y0, x1, y1 = face.getbbox(text)
    w, h = x1 - x0 + int(rng.integers(8, 20)), y1 - y0 + int(rng.integers(8, 16))
    name = str(rng.choice(list(COLORS)))
    light = np.array(COLORS[name]) + np.zeros((h, w, 3))
    if kind == "clutter":
        light = surface(rng, str(rng.choice(STUFF)), h, w, 14)
    light = light + 14 * smooth_noise(rng, h, w, 3, 3)[..., None] + rng.normal(0, 4, (h, w, 1))
    picture = Image.fromarray(light.clip(0, 255).astype(np.uint8))
    dark = light.mean() < 125
    draw = ImageDraw.Draw(picture)
    ink = tuple((rng.integers(200, 256, 3) if dark else rng.integers(0, 56, 3)).tolist())
    corner = ((w - x1 + x0) / 2 - x0 + rng.uniform(-2, 2), (h - y1 + y0) / 2 - y0 + rng.uniform(-2, 2))
    draw.text(corner, text, fill=ink, font=face)
    if kind == "clutter":
        for _ in range(3):
            ends = rng.uniform((0, 0, 0, 0), (w, h, w, h)).tolist()
            draw.line(ends, fill=tuple(rng.integers(0, 256, 3).tolist()), width=1)
    if kind == "curved":
        bend = (0.28 * h * np.sin(math.pi * (np.arange(w) / w + rng.uniform(0, 1)))).round().astype(int)
        pad = int(0.3 * h) + 1
        tall = np.pad(np.asarray(picture), ((pad, pad), (0, 0), (0, 0)), mode="edge")
        rows = (np.arange(h + 2 * pad)[:, None] + bend[None]).clip(0, h + 2 * pad - 1)
        picture = Image.fromarray(tall[rows, np.arange(w)[None]])
    if kind == "blur":
        small = picture.resize((max(8, w // 2), max(6, h // 2)), Image.Resampling.BILINEAR)
        picture = small.resize((w, h), Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(0.7))
    return picture, text


# --- classes


def shape_picture(key: tuple[int, ...], variant: str) -> tuple[Image.Image, Thing]:
    """A picture of one thing, of each name in turn: as in the scenes, a sketch, turned over, or noisy."""
    rng, side = np.random.default_rng(key), 112
    name, other = THINGS[key[-1] % len(THINGS)], any_thing(rng)
    thing = Thing(name, other.color, other.texture if name in OUTLINES else "plain")
    pixels, _ = background(rng, side, side, 0.16 * side)
    if variant == "sketch":
        pixels = np.full_like(pixels, 250)
        thing.texture = "plain"
    canvas = Canvas(pixels)
    add(rng, canvas, thing, rng.uniform(0.4, 0.6, 2) * side, rng.uniform(0.2, 0.34) * side, 1)
    image = canvas.finish()[0]
    if variant == "sketch":  # pencil: dark where brightness changes
        edges = image.convert("L").filter(ImageFilter.FIND_EDGES).crop((1, 1, side - 1, side - 1))
        image = Image.new("RGB", (side, side), (255, 255, 255))
        image.paste(edges.point(lambda v: 255 - min(255, 4 * v)), (1, 1))
    if variant == "rotated":
        image = image.rotate(float(rng.uniform(90, 270)), Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
    if variant == "noisy":
        image = np.asarray(image).astype(np.float32) * 0.6 + 60 + rng.normal(0, 45, (side, side, 3))
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    return image, thing


# --- sentences


def sentences(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Five captions: what stands where beside what, how many there are, and what is around."""
    things, stuff = scene.things, list(scene.stuff)
    around = [f"{'under' if name == 'sky' else 'on'} {name}" for name in stuff]
    told = [f"{related(rng, things) if things else stuff[0]} {rng.choice(around)}" for _ in range(2)]
    if len(things) > 1:
        told.append(related(rng, things))
    named = Counter(thing.name for thing in things)
    counts = [f"{NUMBERS[n]} {plural(name) if n > 1 else name}" for name, n in named.most_common(3)]
    told.append(" and ".join(filter(None, (", ".join(counts[:-1]), *counts[-1:]))) or " and ".join(stuff))
    while len(told) < 5:
        phrases = [thing.phrase for thing in rng.permutation(things)[:2]] or stuff
        told.append(f"{' and '.join(phrases)} {' '.join(around)}")
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in told]


NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight")


def plural(name: str) -> str:
    return {"person": "people", "cross": "crosses"}.get(name, f"{name}s")


def related(rng: np.random.Generator, things: list[Thing]) -> str:
    """One thing, or two and how they lie to each other."""
    if len(things) == 1:
        return things[0].phrase
    i, j = rng.choice(len(things), 2, replace=False).tolist()
    a, b = things[i], things[j]
    dx, dy = (np.add(a.box[:2], a.box[2:]) - np.add(b.box[:2], b.box[2:])) / 2
    apart = a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]
    if not apart and rng.random() < 0.5:  # boxes overlap: what was drawn later is in front
        return f"{a.phrase} {'in front of' if i > j else 'behind'} {b.phrase}"
    if abs(dx) > abs(dy):
        return f"{a.phrase} to the {'left' if dx < 0 else 'right'} of {b.phrase}"
    return f"{a.phrase} {'above' if dy < 0 else 'below'} {b.phrase}"


# --- files


def polygons(mask: np.ndarray, box: tuple[int, int, int, int]) -> list[list[float]]:
    """COCO's `segmentation` of a mask: the outlines of its parts; holes are filled, as COCO's polygons do."""
    x0, y0, x1, y1 = box
    padded = np.pad(mask[y0:y1, x0:x1], 1).astype(np.float32)
    lines = contourpy.contour_generator(z=padded, fill_type="OuterOffset").filled(0.5, 2.0)
    outer = [
        points[: ends[1] - 1] for points, ends in zip(*lines, strict=True)
    ]  # its last point is its first
    return [(line + (x0 - 0.5, y0 - 0.5)).round(1).flatten().tolist() for line in outer if len(line) > 2]


def annotate(scene: Scene) -> list[dict]:
    """COCO's annotations of the things, keypoints included, without ids."""
    h, w = scene.image.height, scene.image.width
    annotations = []
    for thing in scene.things:
        outline = polygons(thing.mask, thing.box)
        code = rle.merge(rle.frPyObjects(outline, h, w))
        annotation = {
            "category_id": THING_IDS[thing.name], "iscrowd": 0, "segmentation": outline,
            "area": float(rle.area(code)), "bbox": rle.toBbox(code).tolist(),
        }  # fmt: skip
        if thing.keypoints is not None:
            triples = []
            for k, (x, y) in enumerate(thing.keypoints.round().astype(int).tolist()):
                hidden = not (0 <= x < w and 0 <= y < h) or (thing.back and k < 3)
                triples += [0, 0, 0] if hidden else [x, y, 2 if thing.mask[y, x] else 1]
            annotation |= {"keypoints": triples, "num_keypoints": sum(v > 0 for v in triples[2::3])}
        annotations.append(annotation)
    return annotations


def panoptic(scene: Scene) -> tuple[np.ndarray, list[dict]]:
    """The PNG (h, w, 3) whose colour R + 256 G + 65536 B is a segment's id, and the segments."""
    ids = np.zeros((scene.image.height, scene.image.width), np.int64)
    regions = [(THING_IDS[t.name], t.mask) for t in scene.things]
    regions += [(STUFF_IDS[name], region) for name, region in scene.stuff.items()]
    segments = []
    for k, (category_id, region) in enumerate(regions, 1):
        segment = k * 1_500_450_271 % 2**24  # a prime: distinct, and distinct to the eye
        ids[region] = segment
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        corner, end = (int(columns[0]), int(rows[0])), (int(columns[-1]) + 1, int(rows[-1]) + 1)
        segments.append({
            "id": segment, "category_id": category_id, "iscrowd": 0, "area": int(region.sum()),
            "bbox": [*corner, end[0] - corner[0], end[1] - corner[1]],
        })  # fmt: skip
    return to_colors(ids), segments


def to_colors(ids: np.ndarray) -> np.ndarray:
    """(h, w) up to 2^24 - 1 -> (h, w, 3) uint8."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)


def draw_scene(image_id: int, out: Path, split: str, size: int, seed: int) -> tuple[dict, list, list, list]:
    """Write one JPEG and one panoptic PNG; what the annotation files say of them."""
    rng = np.random.default_rng((seed, image_id))
    one = scene(rng, size)
    name = f"{image_id:012d}"
    one.image.save(out / split / f"{name}.jpg", quality=92)
    colors, segments = panoptic(one)
    Image.fromarray(colors).save(out / "annotations" / f"panoptic_{split}" / f"{name}.png", compress_level=1)
    image = {"id": image_id, "file_name": f"{name}.jpg", "width": one.image.width, "height": one.image.height}
    return image, annotate(one), segments, sentences(rng, one)


def each(function: Callable, items: range) -> list:
    """The results in order, made by all cores if there is enough to do."""
    if len(items) < 64:
        return list(map(function, items))
    ignore = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is ours
    with ProcessPoolExecutor(**ignore) as pool:
        return list(pool.map(function, items, chunksize=16))


def write(
    out: Path, split: str, count: int, size: int, seed: int, first_id: int = 1
) -> list[tuple[dict, list[str]]]:
    """A split of COCO: pictures and instances, person_keypoints, captions and panoptic files.

    Returns the images and their captions.
    """
    (out / split).mkdir(parents=True, exist_ok=True)
    (out / "annotations" / f"panoptic_{split}").mkdir(parents=True, exist_ok=True)
    draw_one = partial(draw_scene, out=out, split=split, size=size, seed=seed)
    drawn = each(draw_one, range(first_id, first_id + count))
    instances, captions, maps = [], [], []
    first = 8 * first_id - 7  # an image has at most 8 things: ids are unique over splits
    for image, annotations, segments, told in drawn:
        of = {"image_id": image["id"]}
        instances += [{"id": first + len(instances) + i, **of, **a} for i, a in enumerate(annotations)]
        captions += [{"id": first + len(captions) + i, **of, "caption": c} for i, c in enumerate(told)]
        maps.append({**of, "file_name": image["file_name"].replace("jpg", "png"), "segments_info": segments})
    things = [{"id": i, "name": name, "supercategory": "thing"} for name, i in THING_IDS.items()]
    things[0] |= {"supercategory": "person", "keypoints": KEYPOINTS, "skeleton": SKELETON}
    both = [{"id": i, "name": name, "isthing": 1, "supercategory": "thing"} for name, i in THING_IDS.items()]
    both += [{"id": i, "name": name, "isthing": 0, "supercategory": "stuff"} for name, i in STUFF_IDS.items()]
    persons = [a for a in instances if "keypoints" in a]
    boxes = [{k: v for k, v in a.items() if "keypoints" not in k} for a in instances]
    names = [{k: c[k] for k in ("id", "name", "supercategory")} for c in things]
    contents = {
        "instances": {"annotations": boxes, "categories": names},
        "person_keypoints": {"annotations": persons, "categories": things[:1]},
        "captions": {"annotations": captions},
        "panoptic": {"annotations": maps, "categories": both},
    }
    images = [image for image, *_ in drawn]
    for kind, content in contents.items():
        path = out / "annotations" / f"{kind}_{split}.json"
        path.write_text(json.dumps({"images": images, **content}))
    return [(image, told) for image, _, _, told in drawn]


def write_karpathy(out: Path, splits: dict[str, tuple[str, list]]) -> None:
    """dataset_coco.json of {split: (folder, images and captions)}."""
    images, sentid = [], 0
    for split, (folder, rows) in splits.items():
        for image, told in rows:
            entries = [
                {"tokens": raw.lower().rstrip(".").replace(",", "").split(), "raw": raw,
                 "imgid": len(images), "sentid": sentid + k}
                for k, raw in enumerate(told)
            ]  # fmt: skip
            sentid += len(told)
            images.append({
                "filepath": folder, "filename": image["file_name"], "imgid": len(images),
                "cocoid": image["id"], "split": split,
                "sentids": [e["sentid"] for e in entries], "sentences": entries,
            })  # fmt: skip
    (out / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def encoded_word(index: int, kind: str, seed: int) -> tuple[bytes, str]:
    picture, text = word_picture(np.random.default_rng((seed, index)), kind)
    return encode(picture), text


def write_words(out: Path, kind: str, count: int, seed: int) -> None:
    """An LMDB: image-000000001, label-000000001, ..., num-samples."""
    out.mkdir(parents=True)
    made = each(partial(encoded_word, kind=kind, seed=seed), range(1, count + 1))
    with lmdb.open(str(out), map_size=sum(len(data) + 4096 for data, _ in made) * 2 + 2**20) as store:
        with store.begin(write=True) as txn:
            for i, (data, text) in enumerate(made, 1):
                txn.put(f"image-{i:09d}".encode(), data)
                txn.put(f"label-{i:09d}".encode(), text.encode())
            txn.put(b"num-samples", str(count).encode())
    (out / "lock.mdb").unlink(missing_ok=True)  # readers open it with lock=False


def save_shape(index: int, out: Path, variant: str, seed: int) -> None:
    picture, thing = shape_picture((seed, index), variant)
    picture.save(out / folder_of(thing.name) / f"{index:06d}.jpg", quality=92)


def folder_of(name: str) -> str:
    return f"{THINGS.index(name):02d}_{name}"


def write_shapes(out: Path, variant: str, count: int, seed: int) -> None:
    """`count` pictures, equally many of each thing, in a folder for each, and names.json."""
    folders = {folder_of(name): name for name in THINGS}
    for folder in folders:
        (out / folder).mkdir(parents=True)
    (out / "names.json").write_text(json.dumps({"names": folders, "templates": TEMPLATES}))
    each(partial(save_shape, out=out, variant=variant, seed=seed), range(count))


def grounded(index: int, size: int, seed: int) -> str:
    """A line of coco-goi: a scene of two things or more, one of them in a red rectangle."""
    rng = np.random.default_rng((seed, index))
    one = scene(rng, size)
    while len(one.things) < 2:
        one = scene(rng, size)
    thing = one.things[rng.integers(len(one.things))]
    x0, y0, x1, y1 = thing.box
    box = (
        max(0, x0 - 2),
        max(0, y0 - 2),
        min(one.image.width, x1 + 2) - 1,
        min(one.image.height, y1 + 2) - 1,
    )
    ImageDraw.Draw(one.image).rectangle(box, outline=(255, 0, 0), width=2)
    question = "\n".join(["Which of these is in the red rectangle?", *THINGS])
    picture = base64.b64encode(encode(one.image)).decode()
    return json.dumps({"input": question, "image_str": picture, "outputs": thing.name})


def write_world(out: Path, train: int, val: int, words: int, size: int, seed: int) -> None:
    """Everything. Test sets of words and classes have as many pictures as there are validation scenes."""
    coco = out / "coco"
    trained = write(coco, "train2017", train, size, seed)
    held_out = write(coco, "val2017", val, size, seed + 1, first_id=train + 1)
    half = len(held_out) // 2
    splits = {"train": ("train2017", trained), "val": ("val2017", held_out[:half])}
    write_karpathy(coco, {**splits, "test": ("val2017", held_out[half:])})
    write_words(out / "words" / "train", "plain", words, seed + 2)
    for k, kind in enumerate(WORD_SETS):
        write_words(out / "words" / "test" / kind, kind, val, seed + 3 + k)
    for variant in VARIANTS:
        write_shapes(out / "shapes" / variant, variant, val, seed + 20)
    (out / "goi").mkdir()
    for split, count, its_seed in (("train", train, seed + 30), ("val", val, seed + 31)):
        lines = each(partial(grounded, size=size, seed=its_seed), range(count))
        (out / "goi" / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="folder to make; it must not exist")
    p.add_argument("--train", type=int, default=400, help="training scenes, and as many pictures to ground")
    p.add_argument("--val", type=int, default=210, help="validation scenes, and pictures in every test set")
    p.add_argument("--words", type=int, default=2000, help="training words")
    p.add_argument("--size", type=int, default=112, help="longest side of a scene in pixels")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    part = args.out.with_name(f"{args.out.name}.part")  # so that an interrupted run leaves no half a world
    try:
        if min(args.train, args.val, args.words) < 1 or args.size < 48 or args.seed < 0:
            raise ValueError("--train, --val and --words must be at least 1, --size 48, --seed 0")
        if args.out.exists():
            raise ValueError(f"{args.out} exists: remove it or name another folder; nothing was changed")
        shutil.rmtree(part, ignore_errors=True)
        write_world(part, args.train, args.val, args.words, args.size, args.seed)
        os.rename(part, args.out)
    except (ValueError, OSError, lmdb.Error) as error:
        print(f"world.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{args.out}: {args.train} + {args.val} scenes")


if __name__ == "__main__":
    main()
