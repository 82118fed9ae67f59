"""A made-up world in the real file formats: scenes with all of COCO's annotations, words, classes, boxes.

    python demo/world.py OUT --train 400 --val 1008 --words 2000 --size 112

    OUT/coco/{train,val}2017/*.jpg
    OUT/coco/annotations/...                 instances, person_keypoints, captions, panoptic
    OUT/coco/dataset_coco.json, ..._2.json   Karpathy's splits of them, for retrieval in galleries of 200
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

PAPER, PENCIL, PALE = 246, (60, 60, 64), 0.7  # of sketches: PALE is the part of a colour that is seen
NOISE = 45  # standard deviation in the noisy pictures
TURN = (80, 120)  # degrees to either side in the pictures that are turned
GALLERY = 200  # test pictures of each of Karpathy's files
FINE = 2  # pictures are drawn at twice their size and averaged

COLORS = {
    "red": (206, 38, 40), "green": (40, 150, 48), "blue": (35, 90, 200), "orange": (250, 130, 20),
    "purple": (135, 60, 175), "yellow": (240, 215, 40), "white": (240, 240, 240), "black": (28, 28, 28),
}  # fmt: skip
TEXTURES, TEXTURE_P = ("plain", "striped", "dotted", "checked"), (0.5, 0.2, 0.15, 0.15)
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
# Like the texts of pretraining, which have no full stop
TEMPLATES = ("a picture of a {}", "a photo of a {}", "an image of a {}", "a {}")
VARIANTS = ("plain", "sketch", "rotated", "noisy")
WORD_SETS = ("plain", "fonts", "blur", "curved", "clutter", "unseen")
COMMON = (  # what four signs in five say, and all words but the made-up ones of `unseen`
    "air art bank bar bath beer bike boat book bus cafe cake cash city club deli exit farm film fish food "
    "fuel game gift gold golf gym hall home ice inn jazz king lake lift mail map menu milk open park pub "
    "road sale shop spa stop taxi tea zoo"
).split()
LEXICON = (  # what the others say
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
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
BOLD = ("DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")  # of signs
SEEN = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
        "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol")  # fmt: skip
UNSEEN = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10", "STIXGeneralBolIta", "DejaVuSerif-BoldItalic")


# --- things in pictures


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


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
        """As a caption names it: a red striped cup, a person in blue, a white sign."""
        if self.name == "person":
            return f"a person in {self.color}"
        words = [self.color, *([self.texture] if self.texture != "plain" else []), self.name]
        return with_article(" ".join(words))


@dataclass
class Scene:
    image: Image.Image
    things: list[Thing]  # back to front
    stuff: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (h, w) bool, what is seen of it


class Canvas:
    """A picture at FINE times its size, and beside it which thing is on top of each pixel (0: none).

    sketched: parts are drawn as with a pencil, pale and with a line around each
    """

    def __init__(self, background: np.ndarray, sketched: bool = False):
        h, w = background.shape[:2]
        self.size, self.sketched, self.number = (w, h), sketched, 0  # number: of the thing that is drawn
        self.fine = Image.fromarray(background).resize((FINE * w, FINE * h), Image.Resampling.NEAREST)
        self.ids = Image.new("L", self.size)
        self.draw, self.draw_id = ImageDraw.Draw(self.fine), ImageDraw.Draw(self.ids)

    def polygon(self, xy: np.ndarray, fill) -> None:
        """fill: a colour, or a picture and its corner in the fine picture"""
        fine = (FINE * xy).flatten().tolist()
        self.draw_id.polygon(xy.flatten().tolist(), fill=self.number)
        if self.sketched:
            self.draw.polygon(fine, fill=pale(fill))
            self.draw.line(fine + fine[:4], fill=PENCIL, width=FINE, joint="curve")
        elif isinstance(fill[0], Image.Image):
            pattern, corner = fill
            mask = Image.new("1", pattern.size)
            ImageDraw.Draw(mask).polygon((FINE * xy - corner).flatten().tolist(), fill=1)
            self.fine.paste(pattern, tuple(corner), mask)
        else:
            self.draw.polygon(fine, fill=fill)

    def disk(self, center, radius: float, fill: tuple) -> None:
        (x, y), r = center, radius
        self.draw_id.ellipse((x - r, y - r, x + r, y + r), fill=self.number)
        x, y, r = FINE * x, FINE * y, FINE * r
        colors = dict(fill=pale(fill), outline=PENCIL, width=FINE) if self.sketched else dict(fill=fill)
        self.draw.ellipse((x - r, y - r, x + r, y + r), **colors)

    def line(self, xy: np.ndarray, width: float, fill: tuple) -> None:
        """Through the points, with round ends."""
        strokes = [(self.draw_id, 1, self.number, width)]
        if self.sketched and FINE * width >= 4:
            strokes += [(self.draw, FINE, PENCIL, width), (self.draw, FINE, pale(fill), width - 2)]
        else:
            strokes += [(self.draw, FINE, PENCIL if self.sketched else fill, width)]
        for draw, scale, color, thick in strokes:
            points, r = scale * np.asarray(xy), scale * thick / 2
            draw.line(points.flatten().tolist(), fill=color, width=max(1, round(2 * r)))
            for x, y in points.tolist() if r > 1 else ():
                draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def finish(self) -> tuple[Image.Image, np.ndarray]:
        return self.fine.reduce(FINE), np.asarray(self.ids)


def pale(fill: tuple) -> tuple[int, int, int]:
    """A colour as it is filled in on a sketch: hardly."""
    return tuple(round(PAPER + PALE * (v - PAPER)) for v in fill)


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
        grain = 14 * smooth_noise(rng, h, w, 3, w // 2 + 1)
        light = grain + 16 * np.sin(7 * plank) - 45 * (x / unit % 1 < 0.08)
    return np.array(base) + rng.normal(0, 9, 3) + light[..., None]


def background(rng: np.random.Generator, h: int, w: int, unit: float) -> tuple[np.ndarray, dict]:
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


def pattern(rng, thing: Thing, fill: tuple, center, radius: float) -> tuple[Image.Image, list[int]]:
    """A picture of the thing's texture that is larger than the thing, and its corner in the fine picture."""
    side = math.ceil(2.6 * FINE * radius)
    corner = np.floor(FINE * (center - 1.3 * radius)).astype(int).tolist()
    period, slant = FINE * max(3.0, radius * 0.5), rng.uniform(0, math.pi)
    x, y = np.arange(side)[None] / period, np.arange(side)[:, None] / period
    u, v = math.cos(slant) * x + math.sin(slant) * y, math.cos(slant) * y - math.sin(slant) * x
    if thing.texture == "striped":
        second = u % 1 < 0.4
    elif thing.texture == "checked":
        second = (u % 1 < 0.5) ^ (v % 1 < 0.5)
    else:
        second = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09
    other = (30, 30, 30) if sum(COLORS[thing.color]) > 330 else (235, 235, 235)
    return Image.fromarray(np.where(second[..., None], other, fill).astype(np.uint8)), corner


@dataclass
class Pen:
    """Draws in units of a thing's radius around its centre, x to the right and y down, turned."""

    rng: np.random.Generator
    canvas: Canvas
    thing: Thing
    center: np.ndarray
    radius: float
    turn: np.ndarray  # (2, 2)
    fill: tuple  # the thing's own colour, or a pattern

    def at(self, xy) -> np.ndarray:
        return self.center + self.radius * np.asarray(xy, float) @ self.turn.T

    def polygon(self, fill, *xy) -> None:
        self.canvas.polygon(self.at(xy), fill)

    def disk(self, fill, r: float, *xy) -> None:
        for center in self.at(xy):
            self.canvas.disk(center, self.radius * r, fill)

    def line(self, fill, width: float, *xy) -> None:
        self.canvas.line(self.at(xy), self.radius * width, fill)


def arc(n: int, start: float, end: float, rx: float = 1, ry: float = 1, x: float = 0, y: float = 0) -> list:
    """n points of an ellipse around (x, y) from angle `start` to `end`, in degrees; 0 is right, 90 down."""
    angles = np.radians(np.linspace(start, end, n))
    return list(zip(rx * np.cos(angles) + x, ry * np.sin(angles) + y, strict=True))


DARK, WHITE, BROWN, CREAM, LEAF = (40, 35, 30), (245, 245, 245), (110, 75, 45), (235, 225, 200), (50, 120, 50)


def circle(p: Pen) -> None:
    p.polygon(p.fill, *arc(29, 0, 360, 0.9, 0.9))


def bolt(p: Pen) -> None:
    p.polygon(p.fill, (0.3, -1), (-0.65, 0.15), (-0.05, 0.15), (-0.3, 1), (0.65, -0.25), (0.08, -0.25))


def house(p: Pen) -> None:
    p.polygon(BROWN, (0.4, -0.95), (0.65, -0.95), (0.65, -0.3), (0.4, -0.3))
    p.polygon(p.fill, (-0.8, -0.1), (0.8, -0.1), (0.8, 0.95), (-0.8, 0.95))
    p.polygon((150, 60, 50), (-1.05, -0.1), (0, -0.95), (1.05, -0.1))
    p.polygon(DARK, (-0.5, 0.3), (-0.1, 0.3), (-0.1, 0.95), (-0.5, 0.95))
    p.polygon(WHITE, (0.2, 0.15), (0.6, 0.15), (0.6, 0.55), (0.2, 0.55))
    p.line(DARK, 0.05, (0.4, 0.15), (0.4, 0.55))
    p.line(DARK, 0.05, (0.2, 0.35), (0.6, 0.35))


def tree(p: Pen) -> None:
    p.polygon(BROWN, (-0.13, 0), (0.13, 0), (0.2, 1), (-0.2, 1))
    p.line(BROWN, 0.1, (0, 0.6), (0.4, 0.2))
    p.disk(p.fill, 0.45, (-0.42, -0.05), (0.42, -0.05))
    p.disk(p.fill, 0.6, (0, -0.4))


def car(p: Pen) -> None:
    p.polygon(p.fill, (-0.62, 0), (-0.35, -0.55), (0.35, -0.55), (0.65, 0))
    p.polygon(WHITE, (-0.45, -0.03), (-0.27, -0.43), (-0.05, -0.43), (-0.05, -0.03))
    p.polygon(WHITE, (0.06, -0.03), (0.06, -0.43), (0.28, -0.43), (0.47, -0.03))
    p.polygon(p.fill, (-1.05, 0.05), (-0.95, -0.05), (0.7, -0.05), (1.05, 0.12), (1.05, 0.5), (-1.05, 0.5))
    p.disk((250, 220, 60), 0.09, (0.95, 0.2))
    p.disk(DARK, 0.28, (-0.55, 0.48), (0.55, 0.48))
    p.disk((170, 170, 170), 0.12, (-0.55, 0.48), (0.55, 0.48))


def fish(p: Pen) -> None:
    dark = tuple(round(0.6 * v) for v in p.fill)
    p.polygon(dark, (-0.3, -0.3), (0.05, -0.75), (0.35, -0.3))
    p.polygon(dark, (-0.5, 0), (-1.05, -0.5), (-0.9, 0), (-1.05, 0.5))
    p.polygon(p.fill, *arc(20, 0, 360, 0.75, 0.45, 0.1))
    p.polygon(dark, (0.05, 0), (-0.25, 0.25), (-0.3, -0.1))
    p.line(dark, 0.06, *arc(5, -60, 60, 0.12, 0.35, 0.27))
    p.disk(WHITE, 0.13, (0.55, -0.1))
    p.disk(DARK, 0.07, (0.57, -0.1))


def flower(p: Pen) -> None:
    p.line(LEAF, 0.1, (0, 0), (0, 1))
    p.polygon(LEAF, (0, 0.85), (0.2, 0.45), (0.55, 0.35), (0.35, 0.75))
    p.polygon(LEAF, (0, 0.95), (-0.2, 0.6), (-0.5, 0.55), (-0.3, 0.85))
    p.disk(p.fill, 0.28, *arc(6, 0, 300, 0.4, 0.4, 0, -0.35))
    p.disk((250, 220, 60) if p.thing.color != "yellow" else BROWN, 0.22, (0, -0.35))


def cup(p: Pen) -> None:
    color = p.fill if p.thing.texture == "plain" else COLORS[p.thing.color]
    p.line(color, 0.16, (0.45, -0.35), (0.8, -0.35), (0.85, 0.1), (0.4, 0.35))
    p.polygon(p.fill, (-0.65, -0.55), (0.55, -0.55), (0.38, 0.8), (-0.48, 0.8))
    p.polygon(WHITE, *arc(16, 0, 360, 0.6, 0.2, -0.05, -0.55))
    p.polygon(BROWN, *arc(16, 0, 360, 0.46, 0.12, -0.05, -0.53))


def clock(p: Pen) -> None:
    p.disk(p.fill, 0.9, (0, 0))
    p.disk(WHITE, 0.7, (0, 0))
    for a, b in zip(arc(12, 0, 330, 0.62, 0.62), arc(12, 0, 330, 0.52, 0.52), strict=True):
        p.line(DARK, 0.06, a, b)
    hour, minute = p.rng.uniform(0, 360, 2)
    p.line(DARK, 0.12, (0, 0), *arc(1, hour, hour, 0.32, 0.32))
    p.line(DARK, 0.08, (0, 0), *arc(1, minute, minute, 0.5, 0.5))


def ladder(p: Pen) -> None:
    for y in np.arange(-0.8, 0.9, 0.32).tolist():
        p.line(p.fill, 0.13, (-0.38, y), (0.38, y))
    for x in (-0.4, 0.4):
        p.line(p.fill, 0.15, (0.9 * x, -1), (1.1 * x, 1))


def umbrella(p: Pen) -> None:
    p.line(DARK, 0.09, (0, -0.95), (0, 0.8), *arc(5, 180, 0, 0.14, -0.14, 0.14, 0.8))
    scallops = [point for x in (0.6, 0, -0.6) for point in arc(6, 0, -180, 0.3, 0.14, x, 0.05)]
    p.polygon(p.fill, *arc(16, 180, 360, 0.9, 0.85, 0, 0.05), *scallops)
    for x in (-0.3, 0.3):
        p.line(DARK, 0.05, (0, -0.8), (0.7 * x, -0.5), (x, 0.05))


def mushroom(p: Pen) -> None:
    p.polygon(CREAM, (-0.22, 0), (0.22, 0), (0.32, 0.95), (-0.32, 0.95))
    p.polygon(p.fill, *arc(18, 180, 360, 0.95, 0.95, 0, 0.1), *arc(8, 0, 180, 0.95, 0.15, 0, 0.1))
    p.disk(WHITE, 0.15, (-0.45, -0.25), (0.05, -0.55))
    p.disk(WHITE, 0.11, (0.5, -0.2), (0.05, -0.1))


def person(pen: Pen) -> None:
    """A figure from the front or from behind; its right is on our left when it faces us. It is not turned."""
    rng, thing, canvas, height = pen.rng, pen.thing, pen.canvas, 2.6 * pen.radius
    thing.back = bool(rng.random() < 0.2)
    side = np.array([1, -1]) * (-1 if thing.back else 1)  # x of its left, right
    cx, top = pen.center[0], pen.center[1] - height / 2
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
        arms = (5, 0.16, swing[k, 0]), (7, 0.15, swing[k, 0] + 0.7 * swing[k, 1] - 0.3)
        legs = (11, 0.22, spread[k, 0]), (13, 0.22, spread[k, 0] - 0.5 * spread[k, 1])
        for joint, length, angle in (*arms, *legs):
            reach = np.array([s * math.sin(angle), math.cos(angle)])
            points[joint + 2 + k] = points[joint + k] + height * length * reach
    skin = tuple(rng.choice([(240, 200, 170), (190, 140, 105), (120, 80, 55)]).tolist())
    shirt, trousers, hair = pen.fill, shade(rng, "blue", 30), shade(rng, "black", 20)
    for k in (0, 1):
        for a, b, width, fill in ((11, 13, 0.09, trousers), (13, 15, 0.075, trousers), (7, 9, 0.05, skin)):
            canvas.line(points[[a + k, b + k]], height * width, fill)
    canvas.polygon(points[[5, 6, 12, 11]], shirt)
    canvas.line(points[5:7], height * 0.07, shirt)
    canvas.line(points[11:13], height * 0.08, trousers)
    for k in (0, 1):
        canvas.line(points[[5 + k, 7 + k]], height * 0.065, shirt)
    canvas.line(head + height * np.array([(0, 0), (0, 0.11)]), height * 0.05, skin)
    canvas.disk(head, height * 0.085, hair)
    if not thing.back:
        canvas.disk(head + (0, 0.022 * height), height * 0.07, skin)
        for eye in points[1:3]:
            canvas.disk(eye, height * 0.0125, (20, 20, 20))
    thing.keypoints = points


@lru_cache(256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONTS / f"{name}.ttf", size)


def made_up(rng: np.random.Generator) -> str:
    """A word of 3-5 letters that can be said aloud, seldom one of LEXICON."""
    pattern = str(rng.choice(["cvc", "cvcv", "cvcvc", "vcv", "cvcc"], p=[0.35, 0.25, 0.15, 0.1, 0.15]))
    return "".join(str(rng.choice(list("bdfghklmnprstvz" if p == "c" else "aeiou"))) for p in pattern)


def sign(pen: Pen) -> None:
    """A plate with a word on it, in black or white. It is not turned."""
    rng, thing = pen.rng, pen.thing
    thing.word = str(rng.choice(COMMON if rng.random() < 0.8 else LEXICON))
    text = thing.word.upper() if rng.random() < 0.7 else thing.word
    face = font(str(rng.choice(BOLD)), max(8, round(FINE * pen.radius * 3.6 / max(len(text), 3))))
    x0, y0, x1, y1 = face.getbbox(text)
    half = np.array([(x1 - x0) / FINE + 5, (y1 - y0) / FINE + 5]) / 2
    center = np.clip(pen.center, half, np.maximum(pen.canvas.size - half, half))
    pen.canvas.polygon(center + half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), pen.fill)
    ink = (20, 20, 20) if pen.canvas.sketched or sum(COLORS[thing.color]) > 330 else (245, 245, 245)
    pen.canvas.draw.text((FINE * (center - half + 2.5) - (x0, y0)).tolist(), text, fill=ink, font=face)


DRAW = (person, sign, circle, bolt, house, tree, car, fish, flower, cup, clock, ladder, umbrella, mushroom)
THINGS = tuple(draw.__name__ for draw in DRAW)
TEXTURED = ("circle", "bolt", "cup", "umbrella")
THING_IDS = {name: i for i, name in enumerate(THINGS, 1)}
STUFF_IDS = {name: i for i, name in enumerate(STUFF, 101)}


def add(rng, canvas: Canvas, thing: Thing, center, radius: float) -> None:
    """The next thing, on top of the others."""
    canvas.number += 1
    angle = rng.uniform(-0.35, 0.35)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    fill = shade(rng, thing.color)
    if thing.texture != "plain" and not canvas.sketched:
        fill = pattern(rng, thing, fill, center, radius)
    DRAW[THINGS.index(thing.name)](Pen(rng, canvas, thing, center, radius, turn, fill))


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of what is True in (h, w), the last two exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def any_thing(rng: np.random.Generator) -> Thing:
    """A sixth of all things are persons, a sixth signs."""
    kind = rng.random()
    name = "person" if kind < 1 / 6 else "sign" if kind < 1 / 3 else str(rng.choice(THINGS[2:]))
    texture = str(rng.choice(TEXTURES, p=TEXTURE_P)) if name in TEXTURED else "plain"
    return Thing(name, str(rng.choice(list(COLORS))), texture)


def scene(rng: np.random.Generator, size: int) -> Scene:
    """1-8 things before one or two kinds of stuff. `size` is the longest side in pixels.

    Things of which less than 12 pixels, or 1 part in 1,000 of the picture, are seen do not count.
    """
    w, h = (int(rng.integers(size * 3 // 4, size + 1)) for _ in range(2))
    pixels, regions = background(rng, h, w, 0.16 * size)
    canvas, placed, count = Canvas(pixels), [], 1 + int(rng.binomial(7, 0.35))
    things = [any_thing(rng) for _ in range(count)]
    for thing in things:
        radius = size * rng.uniform(0.12, 0.25) * (1.15 - 0.06 * count)
        margin = 0.8 * radius * (1.5 if thing.name == "person" else 1)
        for _ in range(6):  # mostly apart, so that what overlaps is the exception
            center = rng.uniform((margin, margin), (w - margin, h - margin))
            if all(np.hypot(*(center - c)) > 0.9 * (radius + r) for c, r in placed):
                break
        placed.append((center, radius))
        add(rng, canvas, thing, center, radius)
    image, ids = canvas.finish()
    for number, thing in enumerate(things, 1):
        thing.mask = ids == number
    seen = [thing for thing in things if np.count_nonzero(thing.mask) >= max(12, h * w / 1000)]
    for thing in seen:
        thing.box = bounds(thing.mask)
    stuff = {name: region & (ids == 0) for name, region in regions.items()}
    return Scene(image, seen, {name: region for name, region in stuff.items() if region.any()})


# --- words


def word_picture(rng: np.random.Generator, kind: str) -> tuple[Image.Image, str]:
    """A word as it is cropped from a picture, and its letters. kind: one of WORD_SETS; `plain` trains."""
    told = str(rng.choice(COMMON)) if rng.random() < 0.9 else "".join(map(str, rng.integers(0, 10, 4)))
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


def thing_picture(key: tuple[int, ...], variant: str) -> tuple[Image.Image, Thing]:
    """A picture of one thing, of each name in turn: as in the scenes, a sketch, turned over, or noisy."""
    rng, side = np.random.default_rng(key), 112
    name, other = THINGS[key[-1] % len(THINGS)], any_thing(rng)
    thing = Thing(name, other.color, str(rng.choice(TEXTURES, p=TEXTURE_P)) if name in TEXTURED else "plain")
    pixels, _ = background(rng, side, side, 0.16 * side)
    if variant == "sketch":
        pixels = (PAPER + PALE * (pixels - float(PAPER))).astype(np.uint8)
    canvas = Canvas(pixels, sketched=variant == "sketch")
    add(rng, canvas, thing, rng.uniform(0.4, 0.6, 2) * side, rng.uniform(0.2, 0.34) * side)
    image = canvas.finish()[0]
    if variant == "rotated":
        angle = float(rng.uniform(*TURN)) * float(rng.choice((-1, 1)))
        image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
    if variant == "noisy":
        image = np.asarray(image).astype(np.float32) * 0.6 + 50 + rng.normal(0, NOISE, (side, side, 3))
        image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    return image, thing


# --- sentences


def sentences(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Five captions: what stands where beside what, how many there are, what is around and what signs say."""
    things, stuff = scene.things, list(scene.stuff)
    around = [f"{'under' if name == 'sky' else 'on'} {name}" for name in stuff]
    told = [f"{related(rng, things) if things else stuff[0]} {rng.choice(around)}" for _ in range(2)]
    if len(things) > 1:
        told.append(related(rng, things))
    named = Counter(thing.name for thing in things)
    counts = [plural(name, n) if n > 1 else with_article(name) for name, n in named.most_common(3)]
    told.append(" and ".join(filter(None, (", ".join(counts[:-1]), *counts[-1:]))) or " and ".join(stuff))
    while len(told) < 5:
        phrases = [read(rng, thing) for thing in rng.permutation(things)[:2]] or stuff
        told.append(f"{' and '.join(phrases)} {' '.join(around)}")
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in told]


def read(rng: np.random.Generator, thing: Thing) -> str:
    """A thing's phrase, of every other sign with what it says."""
    return f"{thing.phrase} that says {thing.word}" if thing.word and rng.random() < 0.5 else thing.phrase


def plural(name: str, count: int) -> str:
    number = ("two", "three", "four", "five", "six", "seven", "eight")[count - 2]
    return f"{number} {name if name == 'fish' else 'people' if name == 'person' else f'{name}s'}"


def related(rng: np.random.Generator, things: list[Thing]) -> str:
    """One thing, or two and how they lie to each other."""
    if len(things) == 1:
        return read(rng, things[0])
    i, j = rng.choice(len(things), 2, replace=False).tolist()
    a, b = things[i], things[j]
    one, other = read(rng, a), read(rng, b)
    dx, dy = (np.add(a.box[:2], a.box[2:]) - np.add(b.box[:2], b.box[2:])) / 2
    apart = a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]
    if not apart and rng.random() < 0.5:  # boxes overlap: what was drawn later is in front
        return f"{one} {'in front of' if i > j else 'behind'} {other}"
    if abs(dx) > abs(dy):
        return f"{one} to the {'left' if dx < 0 else 'right'} of {other}"
    return f"{one} {'above' if dy < 0 else 'below'} {other}"


# --- files


def polygons(mask: np.ndarray, box: tuple[int, int, int, int]) -> list[list[float]]:
    """COCO's `segmentation` of a mask: the outlines of its parts; holes are filled, as COCO's polygons do."""
    x0, y0, x1, y1 = box
    padded = np.zeros((y1 - y0 + 2, x1 - x0 + 2))
    padded[1:-1, 1:-1] = mask[y0:y1, x0:x1]
    x, y = np.meshgrid(np.arange(x1 - x0 + 2.0), np.arange(y1 - y0 + 2.0))
    # The class itself: contour_generator()'s checks and masked arrays take longer than the outlines
    outlines = contourpy.SerialContourGenerator(
        x, y, padded, padded > 2, corner_mask=False, quad_as_tri=False,
        line_type=contourpy.LineType.Separate, fill_type=contourpy.FillType.OuterOffset,
        z_interp=contourpy.ZInterp.Linear,
    )  # fmt: skip
    lines = outlines.filled(0.5, 2.0)
    outer = [xy[: ends[1] - 1] for xy, ends in zip(*lines, strict=True)]  # its last point is its first
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
    regions = [(THING_IDS[t.name], t.mask, t.box) for t in scene.things]
    regions += [(STUFF_IDS[name], region, bounds(region)) for name, region in scene.stuff.items()]
    segments = []
    for k, (category_id, region, (x0, y0, x1, y1)) in enumerate(regions, 1):
        segment = k * 1_500_450_271 % 2**24  # a prime: distinct, and distinct to the eye
        ids[region] = segment
        segments.append({
            "id": segment, "category_id": category_id, "iscrowd": 0, "area": int(np.count_nonzero(region)),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        })  # fmt: skip
    return to_colors(ids), segments


def to_colors(ids: np.ndarray) -> np.ndarray:
    """(h, w) up to 2^24 - 1 -> (h, w, 3) uint8."""
    return ids.astype("<u4")[..., None].view(np.uint8)[..., :3]


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


def write_karpathy(path: Path, splits: dict[str, tuple[str, list]]) -> None:
    """Karpathy's dataset_coco.json of {split: (folder, images and captions)}."""
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
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))


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
    picture, thing = thing_picture((seed, index), variant)
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


def mark(image: Image.Image, thing: Thing) -> None:
    """A red rectangle around what is seen of a thing."""
    (x0, y0, x1, y1), (w, h) = thing.box, image.size
    box = (max(0, x0 - 2), max(0, y0 - 2), min(w, x1 + 2) - 1, min(h, y1 + 2) - 1)
    ImageDraw.Draw(image).rectangle(box, outline=(255, 0, 0), width=2)


def grounded(index: int, size: int, seed: int) -> str:
    """A line of coco-goi: a scene of two things or more, one of them in a red rectangle."""
    rng = np.random.default_rng((seed, index))
    one = scene(rng, size)
    while len(one.things) < 2:
        one = scene(rng, size)
    thing = one.things[rng.integers(len(one.things))]
    mark(one.image, thing)
    question = "\n".join(["Which of these is in the red rectangle?", *THINGS])
    picture = base64.b64encode(encode(one.image)).decode()
    return json.dumps({"input": question, "image_str": picture, "outputs": thing.name})


def write_world(out: Path, train: int, val: int, words: int, size: int, seed: int) -> None:
    """Everything. Test sets of words and classes have as many pictures as there are validation scenes."""
    coco = out / "coco"
    trained = write(coco, "train2017", train, size, seed)
    held_out = write(coco, "val2017", val, size, seed + 1, first_id=train + 1)
    n = min(GALLERY, -(-val // 2))
    for k in range(max(1, val // GALLERY)):
        test, rest = held_out[k * n : (k + 1) * n], held_out[: k * n] + held_out[(k + 1) * n :]
        splits = {"train": ("train2017", trained), "val": ("val2017", rest), "test": ("val2017", test)}
        write_karpathy(coco / f"dataset_coco{f'_{k + 1}' if k else ''}.json", splits)
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
    p.add_argument("--val", type=int, default=1008, help="validation scenes, and pictures in every test set")
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
