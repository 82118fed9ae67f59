"""Every row of README's table of towers: features, LoRA, both stages, exports, against the library itself."""

import json
import re
import shutil
import sys
from pathlib import Path

import open_clip
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

import backbone as vit
import lora
import weights as weight_files
from clip import Clip
from ranks import Ranks
from tests import towers
from tests.stages import stage1, stage2
from tests.towers import SIDE, TOWERS, Tower

ONE = dict(atol=1e-5, rtol=1e-5)  # fp32, another order of summation
every = pytest.mark.parametrize("row", TOWERS, ids=[row.name for row in TOWERS])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(row) -> --weights of a row, and a LoRA file that was tuned on timm's tower."""
    done = {}

    def make(row: Tower) -> tuple[Path, Path]:
        if row.name not in done:
            folder = tmp_path_factory.mktemp("tower")
            weights = row.save(folder)
            backbone = vit.load(row.model, str(weights))
            lora.attach(backbone.vit, rank=3, alpha=2.0)
            randomize(backbone.vit)
            lora.save(backbone.vit, folder / "lora.safetensors", backbone=row.model, step=1)
            done[row.name] = weights, folder / "lora.safetensors"
        return done[row.name]

    return make


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for p in lora.parameters(model).values():
        nn.init.normal_(p, std=0.3, generator=generator)


def tokens(f: vit.Features) -> Tensor:
    """(B, [CLS] and patches, D)"""
    grid = f.grid.flatten(2).transpose(1, 2)
    return grid if f.cls is None else torch.cat([f.cls[:, None], grid], 1)


@torch.no_grad()
def ours(row: Tower, weights: Path, images: Tensor, lora_file: Path | None = None) -> Tensor:
    backbone = vit.load(row.model, str(weights))
    if lora_file:
        lora.load(backbone.vit, lora_file)
    return tokens(backbone(images))


@torch.no_grad()
def theirs(model: nn.Module, images: Tensor) -> Tensor:
    """The same of a library's model, without registers: CLIP's last norm is its pooling's."""
    model.eval()
    H, W = images.shape[2] // patch_of(model), images.shape[3] // patch_of(model)
    if isinstance(model, timm.models.VisionTransformer | timm.models.Eva):
        f, prefix = model.forward_features(images), model.num_prefix_tokens
        f = model.fc_norm(f)
        return torch.cat([f[:, : int(model.cls_token is not None)], f[:, prefix:]], 1)
    forward = {"interpolate_pos_encoding": True} if hasattr(model.embeddings, "position_embedding") else {}
    f = model(images, **forward).last_hidden_state
    if isinstance(model, transformers.CLIPVisionModel):
        f = model.post_layernorm(f)
    has_cls = f.shape[1] > H * W
    return torch.cat([f[:, : int(has_cls)], f[:, -H * W :]], 1)


def patch_of(model: nn.Module) -> int:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).kernel_size[0]


def opened(row: Tower, weights: Path) -> nn.Module:
    """A row's weights in its library."""
    if row.library == "transformers":
        kind = json.loads((weights / "config.json").read_text())["architectures"][0]
        return getattr(transformers, kind).from_pretrained(weights)
    if row.library == "timm":
        return timm.create_model(row.model, num_classes=0, checkpoint_path=str(weights))
    return open_clip.create_model(made_clip(row), pretrained=str(weights)).eval()


def made_clip(row: Tower) -> str:
    """open_clip's name of the config that the row's CLIP has."""
    return "test_eva" if "eva" in row.timm else "test_own"


@every
def test_features_are_the_librarys_at_its_own_size_and_another(row, made):
    weights, _ = made(row)
    model = opened(row, weights)
    if row.library == "open_clip":  # its images are of one size
        with torch.no_grad():
            f = ours(row, weights, row.images())[:, 0]
            state = load_file(weights)
            head = state.get("visual.proj")
            f = (
                f @ head
                if head is not None
                else F.linear(f, *(state[f"visual.trunk.head.{k}"] for k in ("weight", "bias")))
            )
            torch.testing.assert_close(f, model.encode_image(row.images()), **ONE)
        return
    for size in [(SIDE, SIDE), (3, 5)] if row.other and row.library != "timm" else [(SIDE, SIDE)]:
        if row.library == "timm":  # of its own size, 224: test_backbone.py has the others
            size = (224 // row.patch, 224 // row.patch)
        images = row.images(*size)
        got = ours(row, weights, images)
        assert got.std() > 0.1
        torch.testing.assert_close(got, theirs(model, images), **ONE)


@every
def test_lora_is_identity_then_reaches_the_first_block_and_merges(row, made):
    weights, _ = made(row)
    backbone = vit.load(row.model, str(weights))
    with torch.no_grad():
        plain = tokens(backbone(row.images()))
        lora.attach(backbone.vit, rank=3)
        assert torch.equal(tokens(backbone(row.images())), plain)
    randomize(backbone.vit)
    tuned = tokens(backbone(row.images()))
    tuned.square().mean().backward()
    trained = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert trained == {f"vit.{name}" for name in lora.parameters(backbone.vit)}
    assert all(p.grad.abs().max() > 0 for p in lora.parameters(backbone.vit).values())
    with torch.no_grad():
        assert (tuned - plain).abs().max() > 0.01
        lora.merge(backbone.vit)
        torch.testing.assert_close(tokens(backbone(row.images())), tuned, **ONE)


@every
def test_both_stages_run(row, made, scenes, run, tmp_path):
    """That the loss falls is test_real_stages.py's to say: here LoRA of every block is trained and kept."""
    weights, _ = made(row)
    options = {"model": row.model, "weights": weights, "data-fraction": 0.2, "iters": 2}
    code, _, err = run("stage1_heads", *stage1(scenes, tmp_path / "one", **options))
    assert code == 0, err
    code, _, err = run("stage2_lora", *stage2(scenes, tmp_path / "two", tmp_path / "one", **options))
    assert code == 0, err
    header, state = lora.read(tmp_path / "two" / "lora.safetensors")
    assert header["backbone"] == row.model
    assert all(value.any() for value in state.values()) and len(state) in (4, 8)


# --- out


def exports(library: str) -> list:
    return [pytest.param(row, to, id=f"{row.name}-{to}") for row in TOWERS for to in row.to if to in library]


@pytest.mark.parametrize("row, to", exports("transformers blip2 timm open_clip eva_clip peft"))
def test_what_is_exported_is_ours_in_the_library(row, to, made, run, tmp_path):
    weights, lora_file = made(row)
    dst = tmp_path / {"timm": "t.safetensors", "open_clip": "o.safetensors", "eva_clip": "e.pt"}.get(
        to, "out"
    )
    options = ("--weights", weights, "--lora", lora_file, "--to", to)
    model = () if to in ("transformers", "blip2", "peft") else ("--model", row.model)
    code, out, err = run("convert", "export", dst, *options, *model)
    assert code == 0, err
    images = row.images(*([224 // row.patch] * 2 if row.library == "timm" else [SIDE, SIDE]))
    expected = ours(row, weights, images, lora_file)
    assert (expected - ours(row, weights, images)).abs().max() > 0.01
    if to in ("transformers", "blip2"):
        got = theirs(opened(row, dst), images)
    elif to == "timm":
        kind = row.timm if row.name in out else row.model
        line = re.search(r"timm.create_model\(.*\)", out)[0].replace(f'"{kind}"', f'"{row.model}"')
        got = theirs(eval(line), images)
    elif to == "peft":
        got = theirs(with_peft(row, weights, dst), images)
    else:
        got, expected = (
            of_clip(row, to, weights, dst, images),
            of_clip(row, "lora", weights, lora_file, images),
        )
    torch.testing.assert_close(got, expected, **ONE)


def with_peft(row: Tower, weights: Path, adapter: Path) -> nn.Module:
    model = opened(row, weights)
    for attention in model.modules():
        if hasattr(attention, "qkv_bias_separate"):
            attention.qkv_bias_separate = True  # as the README says
    model = peft.PeftModel.from_pretrained(model, adapter).base_model.model
    return model.visual.trunk if row.library == "open_clip" else model


@torch.no_grad()
def of_clip(row: Tower, to: str, weights: Path, dst: Path, images: Tensor) -> Tensor:
    """The image features of a CLIP: what was exported, in its library; or ours, with the LoRA beside it."""
    if to == "open_clip":
        return opened(row, dst).encode_image(images)
    if to == "eva_clip":
        model = timm.create_model(row.model, num_classes=16).eval()
        model.load_state_dict(checkpoint_filter_fn(torch.load(dst, weights_only=True), model))
        return model(images)
    clip = Clip(made_clip(row), str(weights), Ranks(0, 1, torch.device("cpu"), torch.float32), 0)
    lora.load(clip.tower, dst)
    return clip.model.encode_image(images)


@pytest.mark.parametrize("row", [row for row in TOWERS if row.zero_shot], ids=lambda row: row.name)
def test_a_clip_that_is_scored_takes_the_lora_of_timms_tower(row, made):
    """eval_zeroshot.py's model, before and after: open_clip's, then with W + dW by hand."""
    weights, lora_file = made(row)
    clip = Clip(made_clip(row), str(weights), Ranks(0, 1, torch.device("cpu"), torch.float32), 0)
    images = row.images()
    with torch.no_grad():
        expected = F.normalize(opened(row, weights).encode_image(images), dim=-1)
        torch.testing.assert_close(clip.image_features(images), expected, **ONE)
        lora.load(clip.tower, lora_file)
        before, after = expected, clip.image_features(images)
        assert (after - before).abs().max() > 0.01
        lora.merge(clip.tower)
        torch.testing.assert_close(clip.image_features(images), after, **ONE)


# --- one LoRA file, and bigger models

THEIRS = [row for row in TOWERS if row.library == "transformers"]


@pytest.mark.parametrize("row", THEIRS, ids=lambda row: row.name)
def test_one_lora_file_is_for_timms_tower_and_transformers(row, made, tmp_path):
    weights, lora_file = made(row)
    model = opened(row, weights)
    tower = lora.attentions(model)
    lora.load(tower, lora_file)
    expected = ours(row, weights, row.images(), lora_file)
    torch.testing.assert_close(theirs(model, row.images()), expected, **ONE)
    lora.save(tower, tmp_path / "back.safetensors")  # q and v as they are there
    assert torch.equal(ours(row, weights, row.images(), tmp_path / "back.safetensors"), expected)


LANGUAGE = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
LANGUAGE |= dict(intermediate_size=32, vocab_size=64, pad_token_id=0)


def bigger(kind: str) -> nn.Module:
    """A tiny model with a vision tower of one of the rows above in it."""
    text = transformers.LlamaConfig(**LANGUAGE)
    clip = ROWS["clip"].make(14).config
    siglip = ROWS["siglip"].make(14).config
    words = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    if kind == "clip":
        return transformers.CLIPModel(transformers.CLIPConfig(vision_config=clip, text_config=words))
    if kind == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(vision_config=siglip, text_config=words))
    if kind == "paligemma":
        gemma = transformers.GemmaConfig(**LANGUAGE, head_dim=16)
        more = dict(text_config=gemma, image_token_index=63, projection_dim=32)
        config = transformers.PaliGemmaConfig(vision_config=siglip, **more)
        return transformers.PaliGemmaForConditionalGeneration(config)
    if kind in ("llava", "llava_next"):
        name = {"llava": "Llava", "llava_next": "LlavaNext"}[kind]
        config = getattr(transformers, f"{name}Config")(
            vision_config=clip, text_config=text, image_token_index=63
        )
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    vision = {k: v for k, v in siglip.to_dict().items() if k not in ("model_type", "vision_use_head")}
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, image_token_id=63)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


ROWS = {row.make.__qualname__.split(".")[0]: row for row in reversed(THEIRS)}
BIGGER = {k: "siglip" for k in ("siglip", "paligemma", "idefics3", "smolvlm")}
BIGGER |= {k: "clip" for k in ("clip", "llava", "llava_next")}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """wholes(kind) -> the folder of a bigger model, in shards."""
    done = {}

    def make(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp("whole") / kind
            torch.manual_seed(4)
            model = bigger(kind)
            for p in model.parameters():
                nn.init.normal_(p, std=0.1)
            model.save_pretrained(done[kind], max_shard_size="100KB")
        return done[kind]

    return make


@pytest.mark.parametrize("kind", BIGGER)
def test_a_tower_inside_a_bigger_model_in_and_out(kind, made, wholes, run, tmp_path):
    """The same features; after the export all other weights are bit-equal, and the tower's are merged."""
    row, folder = ROWS[BIGGER[kind]], wholes(kind)
    _, lora_file = made(row)
    before = opened(row, folder)
    attentions = lora.attentions(before)
    inner = next(m for m in before.modules() if hasattr(getattr(m, "embeddings", None), "patch_embedding"))
    torch.testing.assert_close(ours(row, folder, row.images()), inside(inner, row.images()), **ONE)
    options = ("--weights", folder, "--lora", lora_file, "--to", "transformers")
    code, out, err = run("convert", "export", tmp_path / "out", *options)
    assert code == 0, err
    assert ("without effect there: dW of blocks.1" in out) == kind.startswith("llava"), out
    after, updated = opened(row, tmp_path / "out"), set()
    for name, value in before.state_dict().items():
        if not torch.equal(value, after.state_dict()[name]):
            updated.add(name)
    assert len(updated) == 4 and all(re.search(r"(q|v)_proj.weight", name) for name in updated)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    lora.load(attentions, lora_file)
    got = next(m for m in after.modules() if hasattr(getattr(m, "embeddings", None), "patch_embedding"))
    torch.testing.assert_close(inside(got, row.images()), inside(inner, row.images()), **ONE)


@torch.no_grad()
def inside(tower: nn.Module, images: Tensor) -> Tensor:
    """theirs(), of a tower in a model that takes images another way."""
    tower.eval()
    if "Clip" not in type(tower).__name__ and "CLIP" not in type(tower).__name__:
        return tower(images).last_hidden_state
    return tower.post_layernorm(tower(images).last_hidden_state)


def test_the_image_features_of_a_whole_llava_are_ours(made, wholes):
    """LLaVA reads the patches before the last block, without the final norm: dW of the last has no effect."""
    row = ROWS["clip"]
    _, lora_file = made(row)
    model = opened(row, wholes("llava")).eval()
    lora.load(lora.attentions(model), lora_file)
    backbone = vit.load(row.model, str(wholes("llava")))
    lora.load(backbone.vit, lora_file)
    layers = backbone.vit.blocks
    with torch.no_grad():
        theirs = model.get_image_features(row.images()).pooler_output
        backbone.vit.blocks, backbone.vit.norm = layers[:1], nn.Identity()
        patches = tokens(backbone(row.images()))[:, 1:]
        expected = model.model.multi_modal_projector(patches)
    torch.testing.assert_close(torch.stack(tuple(theirs)), expected, **ONE)


def test_names_of_older_folders_are_found_too(made, wholes, tmp_path):
    """LLaVA's and PaliGemma's on the hub: another prefix, and tensors that are no weights."""
    row, folder = ROWS["clip"], tmp_path / "old"
    state = weight_files.read(wholes("llava"))
    old = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in state.items()}
    old["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    folder.mkdir()
    save_file(old, folder / "model.safetensors")
    shutil.copy(wholes("llava") / "config.json", folder)
    got = ours(row, folder, row.images())
    assert torch.equal(got, ours(row, wholes("llava"), row.images()))
    assert torch.equal(got, ours(row, folder / "model.safetensors", row.images()))  # config.json is beside it


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, None)])
def test_merged_in_16_bit_only_if_asked_and_said(dtype, kind, made, wholes, run, tmp_path):
    row, half = ROWS["clip"], tmp_path / "half"
    _, lora_file = made(row)
    opened(row, wholes("llava")).to(torch.bfloat16).save_pretrained(half)  # as most are stored
    options = [
        "--weights",
        half,
        "--lora",
        lora_file,
        "--to",
        "transformers",
        *(["--dtype", dtype] if dtype else []),
    ]
    code, out, err = run("convert", "export", tmp_path / "out", *options)
    assert code == 0, err
    before, after = weight_files.read(half), weight_files.read(tmp_path / "out")
    kind = kind or torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(kind)[6:]
    merged = 0.0, 0.0
    for name, part, A, B in two_blocks(lora_file):
        file = f"vision_tower.encoder.layers.{name}.self_attn.{part}_proj.weight"
        W, dW = before[file].float(), B @ A * (2.0 / 3)
        assert after[file].dtype == kind and torch.equal(after[file], (W + dW).to(kind))
        change = after[file].double() - W.to(kind).double()
        merged = merged[0] + (change * dW).sum(), merged[1] + dW.double().square().sum()
    share = re.search(r"(-?[\d.]+)% of the update lost in the rounding", out)
    if kind == torch.float32:
        assert share is None
    else:
        assert float(share[1]) == pytest.approx(100 * (1 - merged[0] / merged[1]).item(), abs=0.051)
        assert share[0] in (tmp_path / "out" / "README.md").read_text()
    same = [name for name in before if "self_attn" not in name]
    assert all(torch.equal(after[name], before[name]) for name in same)


def two_blocks(lora_file: Path) -> list:
    """Block, q or v, A and B of a file of two fused blocks of rank 3."""
    state = lora.read(lora_file)[1]
    found = []
    for n in range(2):
        A, B = (state[f"blocks.{n}.attn.qkv.lora_{part}"].chunk(2) for part in "AB")
        found += [(n, "q", A[0], B[0]), (n, "v", A[1], B[1])]
    return found


# --- what is refused


def changed_json(folder: Path, file: str, **more) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **more}))


def rewritten(folder: Path, change) -> None:
    """The tensors of all shards through change(state), as one file."""
    state = weight_files.read(folder)
    for file in folder.glob("model*"):
        file.unlink()
    save_file({k: v.clone() for k, v in change(state).items()}, folder / "model.safetensors")


def int8(state: dict) -> dict:
    name = next(k for k in state if k.endswith("layers.1.self_attn.q_proj.weight"))
    return {**state, name: state[name].to(torch.int8), f"{name}_scale": torch.ones(1)}


TWICE = lambda s: s | {k.replace("vision_tower", "second_tower"): v for k, v in s.items()}  # noqa: E731
BAD = {
    "another width": (
        lambda f: rewritten(f, lambda s: {k: torch.cat([v, v]) for k, v in s.items()}),
        "expected",
    ),
    "another depth": (
        lambda f: rewritten(f, lambda s: {k.replace("layers.1.", "layers.2."): v for k, v in s.items()}),
        "missing blocks.1.*unexpected 'blocks.2.|missing blocks.1",
    ),
    "half a tower": (
        lambda f: rewritten(
            f, lambda s: {k: v for k, v in s.items() if "vision_tower.encoder.layers.1." not in k}
        ),
        "missing blocks.1.norm1.weight",
    ),
    "no keys": (
        lambda f: rewritten(f, lambda s: {k: v for k, v in s.items() if "k_proj" not in k}),
        "missing blocks.0.attn.qkv.weight",
    ),
    "keys of another width": (
        lambda f: rewritten(
            f, lambda s: {k: v[:7] if "0.self_attn.k_proj" in k else v for k, v in s.items()}
        ),
        "missing blocks.0.attn.qkv.weight",
    ),
    "two towers": (
        lambda f: rewritten(f, TWICE),
        "2 vision towers: .*_tower., .*_tower.: one is",
    ),
    "quantized": (
        lambda f: changed_json(f, "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "quantized by bitsandbytes",
    ),
    "quantized tensors": (lambda f: rewritten(f, int8), r"quantized model: .*q_proj.weight holds int8"),
    "absent shard": (
        lambda f: sorted(f.glob("model-*.safetensors"))[1].unlink(),
        r"1 of \d+ shards are absent: model-00002",
    ),
    "InternViT": (
        lambda f: changed_json(
            f, "config.json", model_type="intern_vit_6b", auto_map={"AutoModel": "m.InternVisionModel"}
        ),
        "intern_vit_6b is not supported: its code is in the folder, not in transformers",
    ),
    "an unknown type": (lambda f: changed_json(f, "config.json", model_type="llava_llama"), "llava_llama"),
    "another activation": (
        lambda f: vision(f, hidden_act="gelu"),
        "has 3 heads and gelu; the model of --model has 3 heads and QuickGELU",
    ),
    "other heads": (
        lambda f: vision(f, num_attention_heads=4),
        "4 heads and quick_gelu; .* has 3 heads and quick_gelu",
    ),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "JSON of a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json"),
    "a broken index": (lambda f: changed_json(f, "model.safetensors.index.json", weight_map=3), "index.json"),
}


def vision(folder: Path, **more) -> None:
    config = json.loads((folder / "config.json").read_text())
    changed_json(folder, "config.json", vision_config={**config["vision_config"], **more})


@pytest.mark.parametrize("how", BAD)
def test_a_folder_that_is_no_such_tower_is_refused(how, wholes, run, tmp_path):
    folder, row = tmp_path / "bad", ROWS["clip"]
    shutil.copytree(wholes("llava"), folder)
    BAD[how][0](folder)
    options = ("--model", row.model, "--weights", folder, "--to", "timm")
    code, _, err = run("convert", "export", tmp_path / "out.safetensors", *options)
    assert code == 2 and re.search(BAD[how][1], err), err
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "out.safetensors").exists(), err
    with pytest.raises((ValueError, FileNotFoundError), match=BAD[how][1]):
        vit.load(row.model, str(folder))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_torchscript_archive_is_refused_by_name(made, run, tmp_path):
    row = next(row for row in TOWERS if row.zero_shot)
    visual = opened(row, made(row)[0]).visual
    torch.jit.save(torch.jit.trace(visual, row.images()), tmp_path / "ViT-L-14-336px.pt")
    options = ("--model", row.model, "--weights", tmp_path / "ViT-L-14-336px.pt", "--to", "timm")
    code, _, err = run("convert", "export", tmp_path / "out.safetensors", *options)
    assert code == 2 and "px.pt: a TorchScript archive, as OpenAI's own CLIP files are, holds code" in err


def test_dinov3_with_a_bias_of_k_is_refused(tmp_path):
    """Rotated, it is not the same for all keys, and timm's has none. Of zeros, it is as good as none."""
    row = ROWS["dinov3"]
    model = row._replace(make=towers.dinov3(key_bias=True)).make(16)
    model.save_pretrained(tmp_path)
    vit.load(row.model, str(tmp_path))
    nn.init.ones_(model.model.layer[1].attention.k_proj.bias)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1 tensors: unexpected 'blocks.1.attn.k_bias'"):
        vit.load(row.model, str(tmp_path))


def test_custom_code_beside_a_file_is_not_asked_for(made, wholes, tmp_path):
    folder = tmp_path / "code"
    shutil.copytree(wholes("llava"), folder)
    rewritten(folder, lambda s: s)
    changed_json(folder, "config.json", model_type="new", auto_map={"AutoConfig": "new.NewConfig"})
    with pytest.raises(ValueError, match="config.json: "):
        vit.load(ROWS["clip"].model, str(folder / "model.safetensors"))


def test_naflex_is_refused_by_name(tmp_path):
    config = transformers.Siglip2VisionConfig(**towers.THEIRS, **towers.MLP, num_patches=16)
    transformers.Siglip2VisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SigLIP 2 NaFlex"):
        vit.load(ROWS["siglip"].model, str(tmp_path))


def test_a_tower_of_less_blocks_takes_the_lora_of_more(made, wholes, run, tmp_path):
    """LLaVA-OneVision keeps 26 of SigLIP's 27: what has no place is named, as for BLIP-2's 39 of 40."""
    less = tmp_path / "less"
    shutil.copytree(wholes("llava"), less)
    rewritten(less, lambda s: {k: v for k, v in s.items() if "vision_tower.encoder.layers.1." not in k})
    vision(less, num_hidden_layers=1)
    _, lora_file = made(ROWS["clip"])
    options = ("--weights", less, "--lora", lora_file, "--to", "transformers")
    code, out, err = run("convert", "export", tmp_path / "out", *options)
    assert code == 0, err
    assert f"left out: blocks.1.attn.qkv.lora_A, of a block that {less} does not have" in out
    before, after = weight_files.read(less), weight_files.read(tmp_path / "out")
    assert sum(not torch.equal(after[name], before[name]) for name in before) == 2


def test_exports_that_cannot_be(made, run, tmp_path):
    timms, clips = ROWS["clip"], next(row for row in TOWERS if row.library == "timm")
    folder, lora_file = made(timms)
    file, _ = made(clips)
    for weights, options, said in (
        (file, ("--to", "transformers"), "is timm: --to transformers needs a whole blip2 or clip or"),
        (
            folder,
            ("--to", "timm", "--model", timms.model, "--dtype", "bf16"),
            "--dtype goes with --to transformers",
        ),
        (folder, ("--to", "peft", "--lora", lora_file), "is clip: .*--to transformers"),
        (folder, ("--to", "open_clip"), "is clip: --to open_clip needs a whole open_clip or"),
        (
            folder / "model.safetensors",
            ("--to", "transformers"),
            "needs the folder that save_pretrained wrote",
        ),
    ):
        dst = tmp_path / ("out.safetensors" if options[1] in ("timm", "open_clip") else "out")
        code, _, err = run("convert", "export", dst, "--weights", weights, *options)
        assert code == 2 and re.search(said, err), err
    assert not any(tmp_path.iterdir())


def test_readmes_table_is_what_these_tests_are_run_with():
    _, inside, _ = towers.block(towers.README.read_text())
    assert inside == towers.table(), "run python -m tests.towers --write"
    assert len(inside.splitlines()) <= 20


def test_a_row_that_differs_is_written_again(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(towers.README.read_text().replace("| DINOv3 |", "| DINOv4 |"))
    monkeypatch.setattr(towers, "README", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["towers.py", "--write"])
    towers.main()
    assert "| DINOv3 |" in (tmp_path / "README.md").read_text()


def test_the_recipe_of_dinov3_runs(made, scenes, real_ocr, run, tmp_path):
    """README's, after both stages: words, and objects on [CLS] beside registers, from a folder."""
    row = next(row for row in TOWERS if row.name == "DINOv3")
    weights, lora_file = made(row)
    options = (
        "--model",
        row.model,
        "--weights",
        weights,
        "--compare",
        lora_file,
        "--workers",
        0,
        "--size",
        96,
    )
    words = ("--train", real_ocr, "--test", real_ocr, "--iters", 2, "--batch", 4, "--limit", 6)
    code, out, err = run("eval_ocr", *options, *words, "--out", tmp_path / "ocr")
    assert code == 0, err
    code, out, err = run("eval_goi", *options, "--coco", scenes, "--epochs", 2, "--out", tmp_path / "goi")
    assert code == 0, err
    for name in ("ocr", "goi"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert all(row[v] is not None for row in result["rows"] for v in ("before", "after"))
        assert str(weights / "model.safetensors") in result["sha256"]
