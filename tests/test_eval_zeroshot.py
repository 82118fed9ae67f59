"""eval_zeroshot.py end to end, against open_clip's own preprocessing, classifier and towers."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import backbone as vit
import eval_zeroshot
import lora
from clip import Clip, _architecture, cached_texts, timm_vit
from data import zeroshot
from ranks import Ranks
from tests.conftest import SHARED

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"red": "a red thing", "green": "a green thing", "blue": "a blue thing", "grey": "something grey"}
TEMPLATES = ["a photo of {}.", "{}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, pictures) -> dict[str, Path]:
    """A CLIP with eva_mini as its tower and a tiny text tower: config, weights, and a LoRA of it.

    Random features all point one way: less their mean, the pictures fall into several classes.
    """
    out = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 224, "timm_model_name": "eva_mini", "timm_pool": "token", "timm_proj": None}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    files = {
        "config": out / "test_clip.json",
        "weights": out / "clip.safetensors",
        "lora": out / "lora.safetensors",
    }
    files["config"].write_text(json.dumps(config))
    open_clip.add_model_config(files["config"])
    vit.register_models()
    torch.manual_seed(0)
    made, _, transform = open_clip.create_model_and_transforms("test_clip")
    images = [transform(Image.open(p).convert("RGB")) for p in sorted(pictures.glob("set/*/[0-3].png"))]
    with torch.no_grad():
        made.visual.trunk.head.bias -= made.eval().encode_image(torch.stack(images)).mean(0)
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, files["weights"])
    tower = lora.attach(made.visual.trunk, rank=4, alpha=4)
    for p in lora.parameters(tower).values():
        nn.init.normal_(p, std=0.3)
    lora.save(tower, files["lora"], backbone="eva_mini")
    return files


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """4 class folders with 4 images each, of unlike sizes and modes, one unreadable; captions of all."""
    out, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    captions = []
    for k, folder in enumerate(NAMES):
        (out / "set" / folder).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (30 + 9 * i, 60 - 7 * k, 3), dtype=np.uint8)
            pixels[..., k % 3] = 255
            image = Image.fromarray(pixels)
            image = [image, image.convert("L"), image.convert("P"), image.convert("RGBA")][i]
            image.save(out / "set" / folder / f"{i}.png")
            texts = [f"{folder} picture {i} and {j}" for j in range(5 + i % 3)]
            captions.append({"image": f"{folder}/{i}.png", "caption": texts})
    (out / "set" / "red" / "broken.png").write_bytes(b"not an image")
    (out / "set" / "names.json").write_text(json.dumps({"names": NAMES, "templates": TEMPLATES}))
    (out / "captions.json").write_text(json.dumps(captions))
    return out


@pytest.fixture(scope="module")
def own_vit(tmp_path_factory) -> dict[str, Path]:
    """A CLIP with open_clip's own ViT, a LoRA tuned on the same of timm's, and both merged by hand."""
    out = tmp_path_factory.mktemp("own_vit")
    vision = {"image_size": 224, "patch_size": 16, "width": 192, "layers": 12, "mlp_ratio": 4.0}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    files = {name: out / f"{name}.safetensors" for name in ("weights", "lora", "merged")}
    files["config"] = out / "own_vit.json"
    files["config"].write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(files["config"])
    torch.manual_seed(0)
    made = open_clip.create_model("own_vit")
    for p in made.visual.parameters():
        nn.init.normal_(p, std=0.1)
    state = {k: v.detach().contiguous() for k, v in made.state_dict().items()}
    save_file(state, files["weights"])
    tower = vit.load("vit_tiny_patch16_224", "random").vit  # 12 blocks of width 192, 3 heads
    for p in lora.parameters(lora.attach(tower, rank=4, alpha=8)).values():
        nn.init.normal_(p, std=0.3)
    lora.save(tower, files["lora"], backbone="vit_tiny_patch16_224")
    for n, block in enumerate(tower.blocks):
        (A_q, A_v), (B_q, B_v) = block.attn.qkv.lora_A.chunk(2), block.attn.qkv.lora_B.chunk(2)
        W = state[f"visual.transformer.resblocks.{n}.attn.in_proj_weight"]  # (3 * 192, 192)
        W[:192] += 8 / 4 * B_q.detach() @ A_q.detach()
        W[384:] += 8 / 4 * B_v.detach() @ A_v.detach()
    save_file(state, files["merged"])
    return files


@pytest.fixture
def base(model, tmp_path) -> list:
    return base_options(model, tmp_path)


def base_options(model: dict[str, Path], tmp_path: Path) -> list:
    cache = ("--text-cache", tmp_path / "texts")
    return [
        "--clip",
        model["config"],
        "--clip-weights",
        model["weights"],
        "--workers",
        0,
        "--batch",
        5,
        *cache,
    ]


def test_texts_are_computed_again_for_whatever_they_depend_on(tmp_path):
    """Not for the same list again; for other texts, templates, types, seeds of random weights, configs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    calls = []

    def features(texts, templates, batch):
        calls.append(texts)
        return torch.full((len(texts), 4), float(len(calls)))

    def cached(texts=("a", "b"), templates=("{}",), config="x", dtype=torch.float32, seed=0):
        ranks = Ranks(0, 1, torch.device("cpu"), dtype)
        args = argparse.Namespace(clip_weights="random", seed=seed, text_cache=tmp_path, batch=2)
        stub = SimpleNamespace(ranks=ranks, dim=4, text_features=features)
        return cached_texts(stub, list(texts), list(templates), {"embed_dim": config}, args)

    try:
        assert cached().eq(1).all() and cached().eq(1).all() and len(calls) == 1
        changes = dict(texts=("a", "c")), dict(templates=("a {}",)), dict(config="y")
        for n, change in enumerate((*changes, dict(dtype=torch.bfloat16), dict(seed=1)), 2):
            assert cached(**change).eq(n).all() and cached(**change).eq(n).all() and cached().eq(1).all()
    finally:
        dist.destroy_process_group()


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def scores(out: Path, variant: str) -> dict[str, float]:
    return {row["metric"]: row[variant] for row in result(out)["rows"]}


@torch.no_grad()
def reference(model: dict, images: list[Path], texts: list[list[str]], tuned: bool) -> torch.Tensor:
    """(n, T) cosines by open_clip alone, image by image, prompt by prompt."""
    name, weights = model["config"].stem, model["merged" if tuned and "merged" in model else "weights"]
    clip, _, transform = open_clip.create_model_and_transforms(name, str(weights))
    clip.eval()
    if tuned and "merged" not in model:
        lora.load(clip.visual.trunk, model["lora"])
        lora.merge(clip.visual.trunk)
    tokenize = open_clip.get_tokenizer(name)
    columns = []
    for prompts in texts:
        of_prompts = [clip.encode_text(tokenize([prompt]), normalize=True)[0] for prompt in prompts]
        columns.append(nn.functional.normalize(torch.stack(of_prompts).mean(0), dim=0))
    rows = [
        clip.encode_image(transform(Image.open(i).convert("RGB"))[None], normalize=True)[0] for i in images
    ]
    return torch.stack(rows) @ torch.stack(columns).T


def test_classification_is_open_clips_before_and_after(model, pictures, base, run, tmp_path):
    """Accuracy equals a count with open_clip alone; --compare equals two runs; the broken file is named."""
    folders = [pictures / "set" / folder for folder in NAMES]
    images = [path for folder in folders for path in sorted(folder.glob("[0-3].png"))]
    target = torch.arange(4).repeat_interleave(4)
    prompts = [[t.format(name) for t in TEMPLATES] for name in NAMES.values()]
    options = ["classification", *base, "--set", f"colours={pictures / 'set'}", "--out"]
    code, out, err = run("eval_zeroshot", *options, tmp_path / "both", "--compare", model["lora"])
    assert code == 0, err
    assert "| Table 5, top-1 % | colours |" in out and "| colours | acc1 | " in out
    for variant, given in (("before", "none"), ("after", model["lora"])):
        cosines = reference(model, images, prompts, tuned=variant == "after")
        expected = 100 * (cosines.argmax(1) == target).double().mean().item()
        assert scores(tmp_path / "both", variant) == {"acc1": expected, "mean per class": expected}
        assert run("eval_zeroshot", *options, tmp_path / variant, "--lora", given)[0] == 0
        assert scores(tmp_path / variant, variant) == scores(tmp_path / "both", variant)
    assert scores(tmp_path / "both", "before") != scores(tmp_path / "both", "after")  # else nothing is tested
    told = result(tmp_path / "both")
    assert told["sets"]["colours"]["images"] == 16 == told["rows"][0]["n"] and not told["partial"]
    assert "broken.png: UnidentifiedImageError" in told["sets"]["colours"]["skipped"][0]
    assert told["sets"]["colours"]["templates"] == TEMPLATES and "Resize" in told["protocol"]["image"][0]


def recalls(S: np.ndarray, owner: np.ndarray) -> dict[str, float]:
    """Counted. S: (images, captions) cosines; owner: each caption's image"""
    expected = {}
    for K in (1, 5, 10):
        top = np.argsort(-S, 1)[:, :K]  # captions
        expected[f"TR@{K}"] = 100 * np.mean([i in owner[top[i]] for i in range(len(S))])
    for K in (1, 5, 10):
        top = np.argsort(-S, 0)[:K]  # images
        expected[f"IR@{K}"] = 100 * np.mean([owner[t] in top[:, t] for t in range(len(owner))])
    return expected


def test_retrieval_is_a_brute_force_count(model, pictures, base, run, tmp_path):
    """16 images with 5, 6 or 7 captions: recall of the ranks by open_clip alone."""
    options = [
        "--captions",
        pictures / "captions.json",
        "--images",
        pictures / "set",
        "--compare",
        model["lora"],
    ]
    code, out, err = run("eval_zeroshot", "retrieval", *base, *options, "--out", tmp_path)
    assert code == 0, err
    listed = json.loads((pictures / "captions.json").read_text())
    owner = np.array([i for i, item in enumerate(listed) for _ in item["caption"]])
    images = [pictures / "set" / item["image"] for item in listed]
    texts = [[caption] for item in listed for caption in item["caption"]]
    for variant in ("before", "after"):
        S = reference(model, images, texts, tuned=variant == "after").numpy()  # (16, 92)
        assert scores(tmp_path, variant) == pytest.approx(recalls(S, owner), abs=1e-9)
    assert {row["metric"]: row["n"] for row in result(tmp_path)["rows"]}["IR@5"] == 92
    assert scores(tmp_path, "before") != scores(tmp_path, "after")


def test_two_ranks_are_one_process(model, pictures, base, run, run_ranks, tmp_path):
    """17 files in batches of 5 on two ranks."""
    options = ["classification", *base, "--set", f"colours={pictures / 'set'}", "--compare", model["lora"]]
    assert run("eval_zeroshot", *options, "--out", tmp_path / "one")[0] == 0
    options[options.index("--text-cache") + 1] = tmp_path / "other texts"
    codes, outs = run_ranks(2, "eval_zeroshot", *options, "--out", tmp_path / "two")
    assert codes == [0, 0], outs
    assert result(tmp_path / "two")["rows"] == result(tmp_path / "one")["rows"]
    assert result(tmp_path / "two")["sets"] == result(tmp_path / "one")["sets"]
    texts = [load_file(next((tmp_path / name).iterdir()))["texts"] for name in ("texts", "other texts")]
    torch.testing.assert_close(
        texts[0], texts[1], rtol=0, atol=1e-6
    )  # other batches, other order of summation


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"), torch.float32)
    dist.destroy_process_group()


def test_classifier_and_pixels_are_open_clips(model, pictures, group):
    clip = Clip("test_clip", str(model["weights"]), group, seed=0)
    theirs, _, transform = open_clip.create_model_and_transforms("test_clip", str(model["weights"]))
    names, templates = zeroshot.class_list("imagenet-a", Path())
    names, tokenize = list(names.values())[:12], open_clip.get_tokenizer("test_clip")
    W = clip.text_features(names, templates[:7], batch=64)
    functions = open_clip.OPENAI_IMAGENET_TEMPLATES[:7]
    expected = open_clip.build_zero_shot_classifier(theirs.eval(), tokenize, names, functions)  # (D, 12)
    torch.testing.assert_close(W, expected.T, rtol=0, atol=1e-6)  # other batches, other order of summation
    with Image.open(pictures / "set/red/0.png") as image:
        pixels = clip.pixels(clip.transform(image.convert("RGB"))[None])
        assert torch.equal(pixels[0], transform(image))  # bit for bit


def test_text_features_come_back_from_the_cache(model, pictures, base, run, tmp_path, monkeypatch):
    options = [
        "classification",
        *base,
        "--set",
        f"colours={pictures / 'set'}",
        "--limit",
        3,
        "--out",
        tmp_path,
    ]
    assert run("eval_zeroshot", *options)[0] == 0 and result(tmp_path)["partial"]
    first = scores(tmp_path, "before")
    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", None)  # cannot be called
    assert run("eval_zeroshot", *options)[0] == 0 and scores(tmp_path, "before") == first
    options[options.index("--clip-weights") + 1] = "random"
    with pytest.raises(TypeError):  # another model: computed anew
        eval_zeroshot_main(options, monkeypatch)


def eval_zeroshot_main(options: list, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_zeroshot.py", *map(str, options)])
    try:
        eval_zeroshot.main()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("tower", ["model", "own_vit"])
def test_real_samples_run_with_random_weights(tower, request, run, tmp_path):
    """CIFAR-10's images at chance, COCO's with all their captions: as a count with open_clip alone says."""
    if not (SHARED / "classification").is_dir():
        pytest.skip("needs ../shared/data/classification, which is not here")
    model = request.getfixturevalue(tower)
    base = [*base_options(model, tmp_path), "--compare", model["lora"]]
    folder = SHARED / "classification/cifar10/test"
    options = ["--set", f"cifar-10={folder}", "--limit", 30, "--out", tmp_path / "c"]
    code, out, err = run("eval_zeroshot", "classification", *base, *options)
    assert code == 0, err
    names, templates = zeroshot.class_list("cifar-10", Path())
    images = [folder / name / f"{k:04d}.jpg" for k in range(3) for name in names]
    ranked = []
    for variant in ("before", "after"):
        texts = [[t.format(n) for t in templates] for n in names]
        cosines = reference(model, images, texts, tuned=variant == "after")
        ranked.append(cosines.argsort(1, descending=True))
        right = (ranked[-1] == torch.arange(10).repeat(3)[:, None]).double()
        found = scores(tmp_path / "c", variant)
        assert found["acc1"] == pytest.approx(100 * right[:, 0].mean().item(), abs=1e-9)
        assert found["acc5"] == pytest.approx(100 * right[:, :5].sum(1).mean().item(), abs=1e-9)
    assert not torch.equal(*ranked)
    options = ["--captions", SHARED / "retrieval/dataset_coco_mini.json", "--images", SHARED / "coco"]
    code, out, err = run(
        "eval_zeroshot", "retrieval", *base, *options, "--limit", 12, "--out", tmp_path / "r"
    )
    assert code == 0, err
    assert result(tmp_path / "r")["rows"][0]["n"] == 12 and "coco: 12 images, 60 captions" in out
    listed = json.loads((SHARED / "retrieval/dataset_coco_mini.json").read_text())["images"]
    listed = [item for item in listed if item["split"] == "test"][:12]
    images = [next((SHARED / "coco").rglob(item["filename"].rpartition("_")[2])) for item in listed]
    texts = [[sentence["raw"]] for item in listed for sentence in item["sentences"]]
    owner = np.repeat(np.arange(12), [len(item["sentences"]) for item in listed])
    counted = []
    for variant in ("before", "after"):
        counted.append(reference(model, images, texts, tuned=variant == "after").numpy())  # (12, 60)
        assert scores(tmp_path / "r", variant) == pytest.approx(recalls(counted[-1], owner), abs=1e-9)
    assert not np.array_equal(*(S.argsort(1) for S in counted))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clips_own_vit_is_timms(quick_gelu):
    vision = {"image_size": 70, "patch_size": 14, "width": 160, "head_width": 80, "layers": 2}
    vision["mlp_ratio"] = 4.9231  # bigG's
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    config["quick_gelu"] = quick_gelu
    torch.manual_seed(1)
    theirs, images = open_clip.CLIP(**config).eval(), torch.randn(2, 3, 70, 70)
    for p in theirs.visual.parameters():
        nn.init.normal_(p, std=0.1)
    ours = timm_vit(config, theirs.visual).eval()
    with torch.no_grad():
        expected = theirs.encode_image(images)
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)
        lora.attach(ours, rank=2)
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)  # B = 0
        nn.init.normal_(lora.layers(ours)["blocks.0.attn.qkv"].lora_B)
        assert not torch.allclose(ours(images), expected, atol=1e-2)


def test_features_that_are_not_finite_are_refused(model, pictures, base, run, tmp_path):
    state = load_file(model["weights"])
    for key, what in (("visual.trunk.norm.weight", "17 images"), ("text.ln_final.weight", "4 texts")):
        bad = tmp_path / "nan.safetensors"
        save_file({**state, key: state[key] * torch.nan}, bad)
        base[base.index("--clip-weights") + 1] = bad
        options = ["classification", *base, "--set", f"colours={pictures / 'set'}", "--out", tmp_path]
        code, _, err = run("eval_zeroshot", *options)
        assert code == 2 and f"{what.replace('17', '16')}" in err and "not finite" in err, err
        assert not (tmp_path / "result.json").exists()


def test_a_retrieval_image_that_cannot_be_read_is_refused(pictures, base, run, tmp_path):
    listed = [{"image": "red/0.png", "caption": "a"}, {"image": "red/broken.png", "caption": ["b", "c"]}]
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    options = ["--captions", tmp_path / "captions.json", "--images", pictures / "set", "--out", tmp_path]
    code, _, err = run("eval_zeroshot", "retrieval", *base, *options)
    assert code == 2 and "1 of 2 images cannot be read" in err and "broken.png" in err


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--clip", "no-such-model"], "neither a model that open_clip has nor a .json"),
        (["--clip", "absent.json"], "absent.json: no such file"),
        (["--clip-weights", "absent.pt"], "--clip-weights absent.pt: neither a file nor `random`"),
        (["--clip-weights", "{config}"], "--clip test_clip --clip-weights"),
        (["--set", "colours"], "--set wants NAME=DIR, each NAME once"),
        (["--set", "colours={set}"], "--set wants NAME=DIR, each NAME once"),
        (
            ["--clip", "ViT-B-32", "--clip-weights", "random", "--lora", "{lora}"],
            "was tuned on eva_mini: Eva",
        ),
        (
            ["--clip", "ViT-L-14-CLIPA", "--clip-weights", "random", "--lora", "{lora}"],
            "(final_ln_after_pool",
        ),
        (["--clip", "coca_ViT-B-32", "--clip-weights", "random", "--lora", "{lora}"], "is CoCa"),
        (["--clip", "ViT-B-16-SigLIP2", "--clip-weights", "random", "--lora", "{lora}"], "(SigLIP)"),
        (["--clip", "MobileCLIP-B", "--clip-weights", "random", "--lora", "{lora}"], "(MobileCLIP)"),
        (["--clip", "EVA01-g-14", "--clip-weights", "random", "--lora", "{lora}"], "was tuned on eva_mini"),
    ],
)
def test_bad_options_are_one_line(changed, message, model, pictures, base, run, tmp_path):
    known = {**model, "set": pictures / "set"}
    changed = [word.format(**known) for word in changed]
    options = ["classification", *base, "--set", f"colours={pictures / 'set'}", "--out", tmp_path, *changed]
    code, _, err = run("eval_zeroshot", *options)
    lines = [line for line in err.splitlines() if line.startswith("eval_zeroshot.py: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err


def test_paper_towers_take_the_papers_lora():
    """open_clip calls EVA-ViT-G eva_giant_patch14_224, timm eva_giant_patch14_clip_224."""
    for clip, ours in (("EVA01-g-14", "eva_g"), ("EVA02-E-14-plus", "eva_e")):
        tower = open_clip.get_model_config(clip)["vision_cfg"]["timm_model_name"]
        assert _architecture(tower) == _architecture(vit.TIMM_NAMES[ours])


def test_algorithm_3_can_be_found():
    text = (ROOT / "eval_zeroshot.py").read_text()
    at = [text.index(f"Alg. 3, line {line}") for line in (1, 2, 3, 4, 6)]  # line 5 is `end for`
    assert at == sorted(at)
