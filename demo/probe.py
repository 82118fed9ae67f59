"""What M's patches, and its [CLS], tell of a sign's word: linear probes, a diagnostic.

    python demo/probe.py --weights demo/eva_mini_clip.safetensors
    python demo/probe.py --lora out/visft/lora.safetensors        # before and after

Signs that say one of world.COMMON, alone before something; M's patches under the sign, brought to 2 x 6 cells
(RoIAlign), are what a linear classifier reads. Its top-1 on signs that it was not trained on; chance is 2%.
Writes OUT/result.json, rows as the evaluations have them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import backbone as vit  # noqa: E402
import evaluation  # noqa: E402
import files  # noqa: E402
import lora  # noqa: E402
import ranks  # noqa: E402
from demo import world  # noqa: E402

SIDE = 112


def draw_sign(key: tuple[int, ...]) -> tuple[np.ndarray, list[float], int]:
    """A picture (SIDE, SIDE, 3) uint8, the sign's box in it, and the index of its word."""
    rng, thing = np.random.default_rng(key), None
    while thing is None or thing.word not in world.COMMON:
        thing = world.Thing("sign", str(rng.choice(list(world.COLORS))))
        canvas = world.Canvas(world.background(rng, SIDE, SIDE, 0.16 * SIDE)[0])
        world.add(rng, canvas, thing, rng.uniform(0.4, 0.6, 2) * SIDE, rng.uniform(0.2, 0.34) * SIDE)
    image, ids = canvas.finish()
    rows, columns = np.flatnonzero(ids.any(1)), np.flatnonzero(ids.any(0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return np.asarray(image), list(map(float, box)), world.COMMON.index(thing.word)


@torch.no_grad()
def features(backbone: vit.Backbone, seed: int, count: int) -> tuple[torch.Tensor, ...]:
    """(n, 12 D) of the signs' patches, (n, D) of [CLS], (n,) words."""
    patches, tokens, words = [], [], []
    for start in range(0, count, 100):
        drawn = [draw_sign((seed, i)) for i in range(start, min(start + 100, count))]
        images, boxes, labels = zip(*drawn, strict=True)
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        f = backbone(normalize(x, backbone.mean, backbone.std))
        boxes = [torch.tensor([box]) for box in boxes]
        patches.append(roi_align(f.grid, boxes, (2, 6), 1 / backbone.patch, aligned=True).flatten(1))
        tokens.append(f.cls)
        words += labels
    return torch.cat(patches), torch.cat(tokens), torch.tensor(words)


def right(x: torch.Tensor, y: torch.Tensor, x_test: torch.Tensor, y_test: torch.Tensor) -> np.ndarray:
    """(m,) which of x_test a linear classifier names that was trained on x (n, D) and y (n,)."""
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    W = torch.zeros(x.shape[1], len(world.COMMON), requires_grad=True)
    optimizer = torch.optim.LBFGS([W], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ W, y) + 3e-3 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return ((x_test @ W).argmax(1) == y_test).numpy()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="eva_mini.px112")
    p.add_argument("--weights", default="demo/eva_mini_clip.safetensors", help="a file, or random")
    p.add_argument("--train", type=int, default=4000, help="signs that the probe is trained on")
    p.add_argument("--test", type=int, default=1000, help="signs that it reads")
    p.add_argument("--lora", type=Path, help="dW, to be compared with M as it is")
    p.add_argument("--out", type=Path, default=Path("out/probe"))
    args = p.parse_args()
    backbone, found = vit.load(args.model, args.weights), {"patches": {}, "[CLS]": {}}
    if args.lora:
        lora.load(backbone.vit, args.lora)
    for variant in ("before", "after") if args.lora else ("before",):
        lora.switch(backbone.vit, on=variant == "after")
        *trained, y = features(backbone, 1, args.train)
        *tested, y_test = features(backbone, 2, args.test)
        for name, x, x_test in zip(found, trained, tested, strict=True):
            found[name][variant] = right(x, y, x_test, y_test)
    rows = [evaluation.result_row(name, "top-1", scores) for name, scores in found.items()]
    print(evaluation.rows_table(rows))
    files.write_json(args.out / "result.json", {"rows": rows})


if __name__ == "__main__":
    ranks.launch(main)
