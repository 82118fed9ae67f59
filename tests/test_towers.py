"""Every row of README's table of towers: features, LoRA, both stages, exports, against the library itself."""

import json
import re
from pathlib import Path

import open_clip
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

import backbone as vit
import lora
from clip import Clip
from ranks import Ranks
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
    """That the loss falls is test_stages.py's to say: here LoRA of every block is trained and kept."""
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
