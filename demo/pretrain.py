"""The demo's foundation model: contrastive image-text pretraining (CLIP) of eva_mini on the made-up world.

    python demo/pretrain.py --out out/pretrain             # writes out/pretrain/eva_mini_clip.safetensors

Model, tokenizer and loss are open_clip's; the configuration is demo/eva_mini_clip.json. As in CLIP, a picture
comes with a sentence that names a part of what it shows and says nothing of where: what is fine-grained stays
under-trained. Pictures are scenes, single things, words, and, as the web has them too, scenes with one thing
in a red rectangle. Patches are dropped (FLIP, arXiv 2212.00794) until the learning rate decays.
"""

import argparse
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import PatchDropoutWithIndices
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import files  # noqa: E402
from backbone import register_models  # noqa: E402
from demo import world  # noqa: E402
from ranks import launch  # noqa: E402

SIDE, CONTEXT = 128, 24  # pictures are kept a little larger than the model's 112 px, to crop from
SENTENCES = 4  # per picture; one is drawn at each visit
SAID = ("{}", "the word {}", "a sign that says {}")
PREFIXES = ("", "", "a picture of ", "a photo of ", "an image of ")


def sentence(rng: np.random.Generator, things: list, stuff: list[str], bare: float = 0.2) -> str:
    """Alt text: one to three things, perhaps the stuff; no positions. bare: part of names without colour."""
    named = rng.permutation(len(things))[: rng.choice([1, 2, 3], p=[0.35, 0.45, 0.2])]
    parts = []
    for i in named:
        thing, short = things[i], rng.random()
        if thing.name == "sign" and short < 0.6:
            parts.append(f"a sign that says {thing.word}")
        elif short < bare:
            parts.append(world.with_article(thing.name))
        else:
            parts.append(thing.phrase if short < 0.8 else thing.phrase.replace(f" {thing.texture} ", " "))
    text = " and ".join(parts) or str(rng.choice(stuff))
    if parts and stuff and rng.random() < 0.5:
        text += f" {'under' if (name := str(rng.choice(stuff))) == 'sky' else 'on'} {name}"
    return text


def word(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A word that fills most of a picture, more or less stretched, before something."""
    cropped, text = world.word_picture(rng, "plain")
    w = int(SIDE * rng.uniform(0.8, 1))
    h = int(w * rng.uniform(0.35, 0.9))
    picture = Image.fromarray(world.background(rng, SIDE, SIDE, 20)[0])
    corner = rng.integers(0, (SIDE - w + 1, SIDE - h + 1)).tolist()
    picture.paste(cropped.resize((w, h), Image.Resampling.BICUBIC), corner)
    return picture, text.lower()


def sample(index: int, seed: int, things: float, words: float, marked: float, bare: float) -> tuple:
    """(SIDE, SIDE, 3) uint8 and SENTENCES: of a scene, one thing before something, a word, or a marked thing.

    things, words, marked: parts of the pictures; the rest are scenes
    """
    rng = np.random.default_rng((seed, 1, index))
    rest = 1 - things - words - marked
    kind = str(rng.choice(["scene", "thing", "word", "marked"], p=[rest, things, words, marked]))
    if kind == "word":
        picture, text = word(rng)
        texts = [str(rng.choice(SAID)).format(text) for _ in range(SENTENCES)]
    elif kind == "thing":
        picture, thing = world.thing_picture((seed, 2, index), "plain")
        texts = [sentence(rng, [thing], [], bare) for _ in range(SENTENCES)]
    else:
        scene = world.scene(rng, int(SIDE * rng.uniform(0.9, 1.2)))
        while kind == "marked" and len(scene.things) < 2:
            scene = world.scene(rng, SIDE)
        picture, named, stuff = scene.image, scene.things, list(scene.stuff)
        if kind == "marked":
            named, stuff = [scene.things[rng.integers(len(scene.things))]], []
            world.mark(picture, named[0])
        texts = [sentence(rng, named, stuff, 0.2 if stuff else bare) for _ in range(SENTENCES)]
        texts = [f"{text} marked in red" if kind == "marked" else text for text in texts]
    picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture), [f"{rng.choice(PREFIXES)}{text}" for text in texts]


def draw(out: Path, count: int, **mix) -> tuple[np.ndarray, Tensor]:
    """pictures (n, SIDE, SIDE, 3) uint8 and tokens (n, SENTENCES, CONTEXT), made once and kept in `out`."""
    made_of = "_".join(map(str, (count, *mix.values())))
    kept = [out / f"{name}_{made_of}.npy" for name in ("pictures", "tokens")]
    if not all(path.is_file() for path in kept):
        tokenize = open_clip.get_tokenizer("eva_mini_clip")
        pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
        tokens = np.empty((count, SENTENCES, CONTEXT), np.int32)
        with ProcessPoolExecutor() as pool:
            made = pool.map(partial(sample, **mix), range(count), chunksize=100)
            for i, (picture, texts) in enumerate(made):
                pictures[i], tokens[i] = picture, tokenize(texts)
                if (i + 1) % 5000 == 0:
                    print(f"{i + 1} pictures", flush=True)
        for path, array in zip(kept, (pictures, tokens), strict=True):
            np.save(path, array)
    return np.load(kept[0], mmap_mode="r"), torch.from_numpy(np.load(kept[1]))


def crop(pictures: np.ndarray, rng: np.random.Generator, side: int, normalize) -> Tensor:
    """(B, 3, side, side) floats: one window of 0.85-1 of the side for each picture, brought to `side`."""
    window = int(rng.integers(round(0.85 * SIDE), SIDE + 1))
    corners = rng.integers(0, SIDE - window + 1, (len(pictures), 2)).tolist()
    cut = np.stack([p[y : y + window, x : x + window] for p, (y, x) in zip(pictures, corners, strict=True)])
    images = torch.from_numpy(cut).permute(0, 3, 1, 2).float() / 255
    return normalize(F.interpolate(images, (side, side), mode="bilinear"))


def rate(step: int, peak: float, warmup: int, decay: int, steps: int) -> float:
    """Linear warm-up, constant, linear decay over the last `decay` steps: so a run can be prolonged."""
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / decay)


def save(model: torch.nn.Module, path: Path, tokens: Tensor) -> None:
    """fp16, open_clip's names; zeros for the words that never occurred, which makes the file small in git."""
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    unseen = torch.ones(len(state["token_embedding.weight"]), dtype=torch.bool)
    unseen[tokens.unique().long()] = False
    state["token_embedding.weight"][unseen] = 0
    files.save(state, path)


class Test:
    """Zero-shot top-1 of all things' names, on `count` pictures of each kind, and of the words on signs."""

    def __init__(self, preprocess, seed: int, count: int):
        keys = [(seed, i) for i in range(count)]
        drawn = {variant: [world.thing_picture(key, variant) for key in keys] for variant in world.VARIANTS}
        sign, n = world.THINGS.index("sign"), len(world.THINGS)
        signs = [world.thing_picture((seed, 1, sign + n * i), "plain") for i in range(2 * count)]
        drawn["words"] = [(p, thing) for p, thing in signs if thing.word in world.COMMON][:count]
        self.images = {k: torch.stack([preprocess(p) for p, _ in pairs]) for k, pairs in drawn.items()}
        self.labels = {}
        for kind, pairs in drawn.items():
            labels = [(t.word, world.COMMON) if kind == "words" else (t.name, world.THINGS) for _, t in pairs]
            self.labels[kind] = torch.tensor([names.index(name) for name, names in labels])

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        tokenize, scores = open_clip.get_tokenizer("eva_mini_clip"), {}
        names = open_clip.build_zero_shot_classifier(model, tokenize, world.THINGS, world.TEMPLATES)
        words = open_clip.build_zero_shot_classifier(model, tokenize, world.COMMON, SAID)
        for kind, images in self.images.items():
            f = image_features(model, images)
            right = (f @ (words if kind == "words" else names)).argmax(1) == self.labels[kind]
            scores[kind] = round(100 * float(right.float().mean()), 1)
        return scores


class Patches(torch.nn.Conv2d):
    """The patch embedding as one product: the gradient of a CPU's convolution is slow."""

    def forward(self, x: Tensor) -> Tensor:
        (B, C, h, w), p = x.shape, self.kernel_size[0]
        x = x.reshape(B, C, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, H, W, C p p)
        return F.linear(x, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def image_features(model: torch.nn.Module, images: Tensor) -> Tensor:
    """(B, embed_dim), in bf16 where the CPU has it; elsewhere that is slower than fp32 by far."""
    weights = dict([*model.visual.named_parameters(), *model.visual.named_buffers()])
    can = torch.cpu.get_capabilities()
    if any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        images, weights = images.bfloat16(), {name: w.bfloat16() for name, w in weights.items()}
    return functional_call(model.visual, weights, images).float()


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--out", type=Path, default=Path("out/pretrain"), help="folder for all that this run writes"
    )
    p.add_argument("--weights", type=Path, metavar="FILE", help="go on from this model (default: from none)")
    p.add_argument("--pictures", type=int, default=36_000, help="how many different ones there are")
    p.add_argument("--things", type=float, default=0.3, help="part of them that show one thing")
    p.add_argument("--words", type=float, default=0.25, help="part of them that show one word")
    p.add_argument("--marked", type=float, default=0.2, help="part of them with one thing in a red rectangle")
    p.add_argument("--bare", type=float, default=0.5, help="part of things called by their name alone")
    p.add_argument("--steps", type=int, default=3300)
    p.add_argument(
        "--decay", type=int, default=500, help="of these steps: learning rate to 0, all patches seen"
    )
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    p.add_argument(
        "--patch-dropout",
        type=float,
        nargs="+",
        default=[0.5, 0.25],
        help="part of the patches dropped before",
    )
    p.add_argument(
        "--coarse", type=int, default=800, help="steps with the first --patch-dropout, then the last"
    )
    p.add_argument(
        "--save-every", type=int, default=100, help="steps between checkpoints and lines of log.jsonl"
    )
    p.add_argument("--tests", type=int, default=210, help="pictures of each kind that log.jsonl scores")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    args = p.parse_args()
    if min(args.pictures // max(args.batch, 1), args.batch, args.steps, args.decay, args.save_every) < 1:
        raise ValueError("--batch, --steps, --decay, --save-every must be at least 1, --pictures a batch")
    if len(args.patch_dropout) > 2 or not all(0 <= part < 1 for part in args.patch_dropout):
        raise ValueError(f"--patch-dropout takes one or two parts, each in [0, 1), got {args.patch_dropout}")
    if (args.out / "last.pt").exists() and not args.resume:
        raise ValueError(f"--out {args.out} holds a run: pass --resume to go on with it, or another --out")

    if args.weights and not args.weights.is_file():
        raise FileNotFoundError(f"--weights {args.weights}: no such file")

    if min(args.things, args.words, args.marked) < 0 or args.things + args.words + args.marked > 1:
        raise ValueError("--things, --words and --marked are parts of all pictures, at most 1 together")

    # --- setup
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    # --- model
    register_models()  # eva_mini
    open_clip.add_model_config(Path(__file__).with_name("eva_mini_clip.json"))
    start_from = str(args.weights) if args.weights else None
    model, _, preprocess = open_clip.create_model_and_transforms("eva_mini_clip", start_from)
    trunk, loss_of = model.visual.trunk, open_clip.ClipLoss()
    trunk.patch_embed.proj.__class__ = Patches
    for block in trunk.blocks:
        block.attn.fused_attn = False  # torch's kernels are slow on a CPU for so few tokens
    side = trunk.patch_embed.img_size[0]
    normalize = preprocess.transforms[-1]

    # --- data
    mix = {name: getattr(args, name) for name in ("seed", "things", "words", "marked", "bare")}
    pictures, tokens = draw(args.out, args.pictures, **mix)
    test = Test(preprocess, args.seed + 1, args.tests)

    # --- optimizer
    plain = [q for q in model.parameters() if q.ndim < 2 or q is model.token_embedding.weight]
    matrices = [q for q in model.parameters() if not any(q is other for other in plain)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)

    # --- resume
    first, last, start, log = 0, args.out / "last.pt", time.time(), args.out / "log.jsonl"
    if args.resume and last.is_file():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, start = state["step"], start - state["seconds"]
    lines = log.read_text().splitlines(keepends=True) if first else []
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= first))

    # --- loop
    sums = []
    for step in range(first, args.steps):
        rng = np.random.default_rng((args.seed, step))
        epoch, i = divmod(step, args.pictures // args.batch)
        order = np.random.default_rng((args.seed, 1, epoch)).permutation(args.pictures)
        rows = np.sort(order[i * args.batch : (i + 1) * args.batch])
        images = crop(pictures[rows], rng, side, normalize)  # (B, 3, side, side)
        texts = tokens[rows, rng.integers(0, SENTENCES, args.batch)].long()  # (B, CONTEXT)
        drop = args.patch_dropout[0 if step < args.coarse else -1] if step < args.steps - args.decay else 0.0
        trunk.patch_drop = PatchDropoutWithIndices(drop, num_prefix_tokens=1) if drop else None
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.lr, 50, args.decay, args.steps)

        model.train()
        torch.manual_seed(args.seed * 1_000_003 + step)
        with sdpa_kernel(SDPBackend.MATH):
            both = image_features(model, images), model.encode_text(texts)
        loss = loss_of(*(F.normalize(f, dim=-1) for f in both), model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        sums.append(loss.item())

        # --- save
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            trunk.patch_drop = None
            seconds = time.time() - start
            line = {"step": step + 1, "loss": sum(sums) / len(sums), "lr": optimizer.param_groups[0]["lr"]}
            line |= {**test(model.eval()), "seconds": round(seconds)}
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)
            sums.clear()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with files.replacing(last) as part, open(part, "wb") as file:
                torch.save({**state, "step": step + 1, "seconds": seconds}, file)
            save(model, args.out / "eva_mini_clip.safetensors", tokens)


if __name__ == "__main__":
    launch(main)
