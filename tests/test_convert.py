"""Weights in and out against the libraries that read them, and against the release's layouts written out."""

import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import open_clip
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.eva import _create_eva, checkpoint_filter_fn
from timm.models.vision_transformer import _create_vision_transformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

import backbone as vit
import convert
import lora
import tasks
import weights as weight_files

SIZE = dict(patch_size=14, embed_dim=192, num_heads=3, mlp_ratio=4, global_pool="token")
WIDTH = 192
OWN_VIT = "vit_mini_clip"


@register_model
def eva_mini_blip2(pretrained=False, **kwargs):
    """eva_mini without its last block: what eva_g_blip2 is to eva_g."""
    return _create_eva("eva_mini_blip2", pretrained=pretrained, **{**SIZE, "depth": 5, **kwargs})


@register_model
def vit_mini_clip(pretrained=False, **kwargs):
    """vit_medium_patch32_clip_224, smaller: open_clip's own ViT as timm has it."""
    size = dict(patch_size=32, embed_dim=128, depth=2, num_heads=2, pre_norm=True, norm_layer=nn.LayerNorm)
    return _create_vision_transformer(OWN_VIT, pretrained=pretrained, **{**size, **kwargs})


@register_model
def eva_split(pretrained=False, **kwargs):
    """Separate q_proj, k_proj and v_proj."""
    return _create_eva(
        "eva_split", pretrained=pretrained, **{**SIZE, "depth": 2, "qkv_fused": False, **kwargs}
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """One small tower in each format, and a LoRA for it."""
    folder = tmp_path_factory.mktemp("weights")
    mini = vit.load("eva_mini", "random", seed=3)
    for p in mini.vit.parameters():
        nn.init.normal_(p, std=0.05)
    state = mini.vit.state_dict()
    head = {"head.weight": torch.randn(32, WIDTH), "head.bias": torch.randn(32)}  # the CLIP projection
    save_file(state, folder / "timm.safetensors")
    torch.save(state, folder / "eva_vit_g.pth")

    (folder / "eva_mini_clip.json").write_text(
        json.dumps(
            {
                "embed_dim": 32,
                "vision_cfg": {
                    "image_size": 224, "timm_model_name": "eva_mini", "timm_pool": "token", "timm_proj": None,
                },
                "text_cfg": {
                    "context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2,
                },
                "custom_text": True,
            }
        )
    )  # fmt: skip
    open_clip.add_model_config(folder / "eva_mini_clip.json")
    clip = open_clip.create_model("eva_mini_clip")
    clip.visual.trunk.load_state_dict({**state, **head})
    whole = clip.state_dict()
    save_file({k: v.contiguous() for k, v in whole.items()}, folder / "clip.safetensors")
    original = {f"module.{k.replace('visual.trunk.', 'visual.')}": v for k, v in whole.items()}
    torch.save({"epoch": 3, "state_dict": original}, folder / "eva_clip.pt")

    lavis = {f"visual_encoder.{k}": v for k, v in state.items() if not k.startswith("norm.")}
    lavis |= {f"ln_vision.{k}": state[f"norm.{k}"] for k in ("weight", "bias")}
    torch.save({"model": {**lavis, "t5_proj.weight": torch.ones(2, 2)}}, folder / "lavis.pth")

    torch.manual_seed(0)
    for name, layers in (("blip2", 6), ("blip2_less", 5)):
        model = Blip2ForConditionalGeneration(blip2_config(layers)).eval()
        for p in model.vision_model.parameters():
            nn.init.normal_(p, std=0.05)
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias.data[WIDTH : 2 * WIDTH] = 0  # EVA has no key bias
        model.save_pretrained(folder / name, max_shard_size="3MB")
        (folder / name / "tokenizer.json").write_text("{}")

    lora.attach(mini.vit, rank=4, alpha=2.0)
    for p in lora.parameters(mini.vit).values():
        nn.init.normal_(p, std=0.2)
    lora.save(mini.vit, folder / "lora.safetensors", backbone="eva_mini", step=7)
    return folder


def blip2_config(layers: int) -> Blip2Config:
    mini = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    vision = dict(hidden_size=WIDTH, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=3)
    return Blip2Config(
        vision_config={**vision, "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6},
        qformer_config={**mini, "intermediate_size": 64, "encoder_hidden_size": WIDTH},
        text_config={**mini, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
        num_query_tokens=4,
        image_token_index=63,
    )


IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
ONE = dict(atol=1e-5, rtol=1e-5)  # fp32, another order of summation


def tokens(f: vit.Features) -> Tensor:
    """(B, 1 + N, D)"""
    return torch.cat([f.cls[:, None], f.grid.flatten(2).transpose(1, 2)], 1)


def tuned(files: Path, weights: str = "timm.safetensors", model: str = "eva_mini") -> Tensor:
    """Ours: the tower with the LoRA beside it, not merged."""
    backbone = vit.load(model, str(files / weights))
    lora.load(backbone.vit, files / "lora.safetensors")
    with torch.no_grad():
        return tokens(backbone(IMAGES))


# --- in: backbones


@pytest.mark.parametrize(
    "src", ["timm.safetensors", "eva_vit_g.pth", "clip.safetensors", "eva_clip.pt", "lavis.pth"]
)
def test_every_format_holds_the_same_tower(files, tmp_path, run, src):
    """Read directly as --weights, and imported: equal bit for bit."""
    expected = load_file(files / "timm.safetensors")
    code, out, err = run("convert", "import", files / src, tmp_path / "ours.safetensors")
    assert code == 0, err
    assert "backbone eva_mini" in out
    for weights in (files / src, tmp_path / "ours.safetensors"):
        got = vit.load("eva_mini", str(weights)).vit.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_eva_clips_original_names_as_timm_reads_them(files):
    model = timm.create_model("eva_mini", num_classes=32)
    original = torch.load(files / "eva_clip.pt", weights_only=True)["state_dict"]
    theirs = checkpoint_filter_fn({k.removeprefix("module."): v for k, v in original.items()}, model)
    ours = weight_files.tower(weight_files.read(files / "eva_clip.pt"), "eva_clip")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("folder, model", [("blip2", "eva_mini"), ("blip2_less", "eva_mini_blip2")])
def test_the_vision_model_of_transformers(files, tmp_path, run, folder, model):
    whole = Blip2ForConditionalGeneration.from_pretrained(files / folder).vision_model.eval()
    whole.save_pretrained(tmp_path / "alone")
    with torch.no_grad():
        expected = whole(IMAGES).last_hidden_state
    assert run("convert", "import", files / folder, tmp_path / "a.safetensors", "--model", model)[0] == 0
    for weights in (files / folder, tmp_path / "alone", tmp_path / "a.safetensors"):
        with torch.no_grad():
            torch.testing.assert_close(tokens(vit.load(model, str(weights))(IMAGES)), expected, **ONE)


def test_blip2s_tower_of_the_paper_has_39_blocks():
    with torch.device("meta"):
        backbone = vit.Backbone("eva_g_blip2")
    assert sum(p.numel() for p in backbone.parameters()) == 985_897_344  # transformers' less the key biases
    assert convert.MODELS[backbone.dim, len(backbone.vit.blocks)] == "eva_g_blip2"


# --- in: the authors' LoRA


def test_the_authors_lora_is_theirs(files, tmp_path, run):
    """Their attention: the base projection, plus x times a dense (B A)^T / 64 for q and v."""
    rank, scale = 64, 1 / 64
    release = {}
    for i in range(6):
        release[f"visual.blocks.{i}.attn.qkv.lora_A"] = torch.randn(2 * rank, WIDTH)
        release[f"visual.blocks.{i}.attn.qkv.lora_B"] = torch.randn(2 * WIDTH, rank)
    torch.save(release, tmp_path / "eva_g_lora_5000.pt")
    code, out, err = run("convert", "import", tmp_path / "eva_g_lora_5000.pt", tmp_path / "lora.safetensors")
    assert code == 0, err
    assert "rank 64, alpha 1" in out
    model = vit.load("eva_mini", str(files / "timm.safetensors")).vit
    header = lora.load(model, tmp_path / "lora.safetensors")
    assert header["backbone"] == "eva_mini" and header["no_cls"] and header["imagenet_norm"]

    attention = model.blocks[4].attn
    A, B = (release[f"visual.blocks.4.attn.qkv.lora_{part}"] for part in "AB")
    x = torch.randn(2, 10, WIDTH)
    dW = torch.cat([B[:WIDTH] @ A[:rank], torch.zeros(WIDTH, WIDTH), B[WIDTH:] @ A[rank:]])  # (3 D, D)
    bias = torch.cat([attention.q_bias, torch.zeros(WIDTH), attention.v_bias])
    qkv = F.linear(x, attention.qkv.weight, bias) + x @ dW.T * scale
    q, k, v = qkv.view(2, 10, 3, 3, WIDTH // 3).permute(2, 0, 3, 1, 4)
    weights = (q * (WIDTH // 3) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected, atol=1e-4, rtol=1e-4)  # |qkv| is some 100


# --- in: the authors' heads


def linear(name: str, out: int, into: int) -> dict[str, tuple]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norms(*names: str, width: int) -> dict[str, tuple]:
    return {f"{name}.{part}": (width,) for name in names for part in ("weight", "bias")}


def attention(name: str, width: int) -> dict[str, tuple]:
    inside = {f"{name}.in_proj_weight": (3 * width, width), f"{name}.in_proj_bias": (3 * width,)}
    return {**inside, **linear(f"{name}.out_proj", width, width)}


def release_shapes(task: str, dim: int) -> dict[str, tuple]:
    """The release's names and shapes, without `visft_heads.` and the aliases of the segmentation head."""
    if task == "detection":
        shapes = {"input_proj.weight": (128, dim, 1, 1), "input_proj.bias": (128,)}
        shapes |= {"transformer.task_embeddings_enc.weight": (256, 128)}
        for width, stack, crossed in ((128, "encoder", 0), (256, "decoders.detection.detection_coco", 1)):
            for i in range(6):
                layer = f"transformer.{stack}.layers.{i}"
                shapes |= attention(f"{layer}.self_attn", width)
                if crossed:
                    shapes |= attention(f"{layer}.multihead_attn", width)
                shapes |= linear(f"{layer}.linear1", 1024, width) | linear(f"{layer}.linear2", width, 1024)
                shapes |= norms(*(f"{layer}.norm{n + 1}" for n in range(2 + crossed)), width=width)
        shapes |= linear("transformer.enc2dec_proj", 256, 128) | linear(
            "transformer.pos_embed_proj", 256, 128
        )
        shapes |= norms("transformer.decoders.detection.detection_coco.norm", width=256)
        shapes |= {"query_embeds.detection.detection_coco.weight": (100, 256)} | linear(
            "class_embeds", 92, 256
        )
        for i, out in enumerate((256, 256, 4)):
            shapes |= linear(f"bbox_embeds.layers.{i}", out, 256)
        return {**shapes, "det_losses.empty_weight": (92,)}
    if task == "captioning":
        shapes = linear("attention.encoder_att", 384, dim) | linear("attention.decoder_att", 384, 384)
        shapes |= linear("attention.full_att", 1, 384) | {"embedding.weight": (9490, 384)}
        shapes |= {"decode_step.weight_ih": (1536, 384 + dim), "decode_step.weight_hh": (1536, 384)}
        shapes |= {"decode_step.bias_ih": (1536,), "decode_step.bias_hh": (1536,)}
        shapes |= linear("init_h", 384, dim) | linear("init_c", 384, dim) | linear("f_beta", dim, 384)
        return {f"caption_decoder.{k}": v for k, v in (shapes | linear("fc", 9490, 384)).items()}
    pixels, predictor = "segment_pixel_decoder", "segment_predictor"
    shapes = {f"{pixels}.input_proj.0.0.weight": (256, dim, 1, 1), f"{pixels}.input_proj.0.0.bias": (256,)}
    shapes |= norms(f"{pixels}.input_proj.0.1", width=256) | {f"{pixels}.transformer.level_embed": (1, 256)}
    for i in range(6):
        layer = f"{pixels}.transformer.encoder.layers.{i}"
        shapes |= linear(f"{layer}.self_attn.sampling_offsets", 64, 256)
        shapes |= linear(f"{layer}.self_attn.attention_weights", 32, 256)
        shapes |= linear(f"{layer}.self_attn.value_proj", 256, 256)
        shapes |= linear(f"{layer}.self_attn.output_proj", 256, 256)
        shapes |= norms(f"{layer}.norm1", f"{layer}.norm2", width=256)
        shapes |= linear(f"{layer}.linear1", 512, 256) | linear(f"{layer}.linear2", 256, 512)
    shapes |= {f"{pixels}.mask_features.weight": (256, 256, 1, 1), f"{pixels}.mask_features.bias": (256,)}
    shapes |= {f"{pixels}.adapter_1.weight": (256, dim, 1, 1), f"{pixels}.layer_1.weight": (256, 256, 3, 3)}
    shapes |= norms(f"{pixels}.adapter_1.norm", f"{pixels}.layer_1.norm", width=256)
    for i in range(9):
        for kind, name in (("self", "self_attn"), ("cross", "multihead_attn")):
            layer = f"{predictor}.transformer_{kind}_attention_layers.{i}"
            shapes |= attention(f"{layer}.{name}", 256) | norms(f"{layer}.norm", width=256)
        layer = f"{predictor}.transformer_ffn_layers.{i}"
        shapes |= linear(f"{layer}.linear1", 1024, 256) | linear(f"{layer}.linear2", 256, 1024)
        shapes |= norms(f"{layer}.norm", width=256)
    shapes |= norms(f"{predictor}.decoder_norm", width=256) | linear(f"{predictor}.class_embed", 81, 256)
    shapes |= {f"{predictor}.{n}.weight": (100, 256) for n in ("query_feat", "query_embed")}
    shapes |= {f"{predictor}.level_embed.weight": (1, 256)}
    for i in range(3):
        shapes |= linear(f"{predictor}.mask_embed.layers.{i}", 256, 256)
    return shapes


def release_head(task: str, dim: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = release_shapes(task, dim).items()
    state = {f"visft_heads.{k}": torch.randn(v, generator=generator) * 0.05 for k, v in shapes}
    if task == "segmentation":
        alias = {k.replace("segment_", "segment_head.", 1): v for k, v in state.items()}
        state |= alias
    return state


def imported(task: str, tmp_path: Path, run, *options) -> tuple[dict[str, Tensor], nn.Module, str]:
    release = release_head(task)
    torch.save(release, tmp_path / "heads.ckpt")
    code, out, err = run(
        "convert", "import", tmp_path / "heads.ckpt", tmp_path / f"{task}.safetensors", *options
    )
    assert code == 0, err
    assert tasks.find_head([tmp_path], task, dict(backbone="eva_mini", no_cls=True, imagenet_norm=True))
    release = {k.removeprefix("visft_heads."): v for k, v in release.items() if "segment_head." not in k}
    return release, tasks.load_head(tmp_path / f"{task}.safetensors", WIDTH), out


@pytest.mark.parametrize(
    "task, tensors, params", [("detection", 199, 8_761_312), ("segmentation", 284, 13_650_833)]
)
def test_the_authors_head_layouts_are_complete(task, tensors, params):
    """Counts of the release: facts about their files, so that the layouts of these tests are theirs."""
    shapes = release_shapes(task, 1408)
    assert len(shapes) == tensors
    shapes.pop("det_losses.empty_weight", None)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == params


@pytest.mark.parametrize("task, special", [("detection", 4), ("segmentation", 4)])
def test_every_tensor_of_the_authors_heads_is_used_once(tmp_path, run, task, special):
    """All but `special` (rows chosen, a dimension dropped, or named as left out) are in ours, each once."""
    release, head, out = imported(task, tmp_path, run)
    ours = {}
    for value in head.state_dict().values():
        ours.setdefault(value.shape, []).append(value)
    used = {k: sum(torch.equal(v, value) for value in ours.get(v.shape, [])) for k, v in release.items()}
    assert sorted(used.values()) == [0] * special + [1] * (len(release) - special)
    changed = {k.split(".")[-2] + k.split(".")[-1] for k, times in used.items() if not times}
    if task == "detection":
        assert changed == {
            "task_embeddings_encweight",
            "class_embedsweight",
            "class_embedsbias",
            "det_lossesempty_weight",
        }
        assert "left out: det_losses.empty_weight" in out
    assert len(head.state_dict()) == len(release) - (task == "detection")


def test_detection_logits_are_the_authors_by_category_id(tmp_path, run, real_coco):
    release, head, _ = imported("detection", tmp_path, run)
    content = json.loads((real_coco / "annotations" / "instances_val2017.json").read_text())
    categories = sorted(content["categories"], key=lambda c: c["id"])
    assert head.config["categories"] == [{"id": c["id"], "name": c["name"]} for c in categories]
    q = torch.randn(5, 256)
    theirs = F.linear(q, release["class_embeds.weight"], release["class_embeds.bias"])  # (5, 92)
    ours = head.class_embed(q)  # (5, 81)
    torch.testing.assert_close(ours[:, :80], theirs[:, [c["id"] for c in categories]])
    torch.testing.assert_close(ours[:, 80], theirs[:, 91])
    assert torch.equal(head.task_token, release["transformer.task_embeddings_enc.weight"][0])


def test_segmentation_layers_are_the_authors(tmp_path, run):
    """A decoder layer, Eq. 2's pixel branch and the classes, from the release's tensors by their names."""
    release, head, out = imported("segmentation", tmp_path, run)

    def attend(name, q, k, v):
        weights = [release[f"{name}.{part}"] for part in ("in_proj_weight", "in_proj_bias")]
        out = [release[f"{name}.out_proj.{part}"] for part in ("weight", "bias")]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        none = (None, None, False, 0.0)
        return F.multi_head_attention_forward(q, k, v, 256, 8, *weights, *none, *out)[0].transpose(0, 1)

    def part(name, *more):
        return release[f"{name}.weight"], release.get(f"{name}.bias"), *more

    q, query_pos = torch.randn(1, 100, 256), torch.randn(1, 100, 256)
    memory, keys = torch.randn(1, 12, 256), torch.randn(1, 12, 256)
    cross, own, ffn = (
        f"segment_predictor.transformer_{kind}_layers.7"
        for kind in ("cross_attention", "self_attention", "ffn")
    )
    x = F.layer_norm(
        q + attend(f"{cross}.multihead_attn", q + query_pos, keys, memory), (256,), *part(f"{cross}.norm")
    )
    both = x + query_pos
    x = F.layer_norm(x + attend(f"{own}.self_attn", both, both, x), (256,), *part(f"{own}.norm"))
    hidden = F.relu(F.linear(x, *part(f"{ffn}.linear1")))
    expected = F.layer_norm(x + F.linear(hidden, *part(f"{ffn}.linear2")), (256,), *part(f"{ffn}.norm"))
    ours = head.decoder[7](q, query_pos, keys, memory, torch.zeros(8, 100, 12))
    torch.testing.assert_close(ours, expected, **ONE)

    F_0, F_1, pixels = torch.randn(1, WIDTH, 4, 3), torch.randn(1, 256, 4, 3), "segment_pixel_decoder"
    y = F.group_norm(F.conv2d(F_0, *part(f"{pixels}.adapter_1")), 32, *part(f"{pixels}.adapter_1.norm"))
    y = F.conv2d(y + F_1, *part(f"{pixels}.layer_1"), padding=1)
    y = F.relu(F.group_norm(y, 32, *part(f"{pixels}.layer_1.norm")))
    expected = F.conv2d(y, *part(f"{pixels}.mask_features"))
    torch.testing.assert_close(head.pixel_features(F_0, F_1, None), expected, **ONE)

    theirs, ours = F.linear(q, *part("segment_predictor.class_embed")), head.class_embed(q)  # (1, 100, 81)
    torch.testing.assert_close(ours[..., :79], theirs[..., 1:80])  # they label the first class, person, 1
    torch.testing.assert_close(ours[..., 80], theirs[..., 80])  # no-object, and toothbrush in their training
    torch.testing.assert_close(ours[..., 79], theirs[..., 0])
    assert "toothbrush" in out


def test_the_authors_captioning_head(tmp_path, run):
    """Names and shapes are ours after the prefix; the words come from their WORDMAP file."""
    tokens = {f"word{i}": i for i in range(1, 9487)}
    tokens |= {"<unk>": 9487, "<start>": 9488, "<end>": 9489, "<pad>": 0}
    (tmp_path / "words.json").write_text(json.dumps(tokens))
    release, head, _ = imported("captioning", tmp_path, run, "--words", tmp_path / "words.json")
    state = {f"caption_decoder.{name}": value for name, value in head.state_dict().items()}
    assert len(release) == 19 and state.keys() == release.keys()
    assert all(torch.equal(state[name], value) for name, value in release.items())
    assert all(tokens[word] == i for i, word in enumerate(head.config["vocabulary"]))
    _, head, _ = imported("captioning", tmp_path, run)
    assert head.config["vocabulary"][:2] == ["<pad>", "<1>"] and len(head.config["vocabulary"]) == 9490
    (tmp_path / "words.json").write_text(json.dumps({"a": 1}))
    options = (tmp_path / "heads.ckpt", tmp_path / "c.safetensors", "--words", tmp_path / "words.json")
    code, _, err = run("convert", "import", *options)
    assert code == 2 and "1 words, the head has 9490" in err


def test_a_file_with_more_heads_asks_which(tmp_path, run):
    both = release_head("detection") | release_head("segmentation")
    torch.save({"model": both, "epoch": 1}, tmp_path / "visft_final.pth")
    code, _, err = run("convert", "import", tmp_path / "visft_final.pth", tmp_path / "h.safetensors")
    assert code == 2 and "detection, segmentation" in err and "--from" in err
    code, out, err = run(
        "convert", "import", tmp_path / "visft_final.pth", tmp_path / "h.safetensors", "--from", "detection"
    )
    assert code == 0 and "left out: segment_pixel_decoder" in out and "and 56" in out
    changed = {
        k: v + k.startswith("visft_heads.segment_head") for k, v in release_head("segmentation").items()
    }
    torch.save(changed, tmp_path / "alias.ckpt")
    code, _, err = run("convert", "import", tmp_path / "alias.ckpt", tmp_path / "s.safetensors")
    assert code == 2 and "alias differ" in err


# --- out


def test_timm_loads_the_export(files, tmp_path, run):
    """By the line that it prints, also where the backbone file has CLIP's projection."""
    for weights in ("timm.safetensors", "eva_clip.pt", "with_head.safetensors"):
        if weights == "with_head.safetensors":
            code, _, err = run("convert", "import", files / "eva_clip.pt", tmp_path / weights)
            assert code == 0 and "head.weight" in load_file(tmp_path / weights), err
        weights = (tmp_path if weights == "with_head.safetensors" else files) / weights
        dst = tmp_path / f"{weights.stem}_out.safetensors"
        options = ("--weights", weights, "--lora", files / "lora.safetensors", "--to", "timm")
        code, out, err = run("convert", "export", dst, *options)
        assert code == 0, err
        line = f'timm.create_model("eva_mini", num_classes=0, checkpoint_path="{dst}")'
        assert line in out and ("left out: head." in out) == (weights.stem != "timm")
        model = eval(line).eval()
        with torch.no_grad():
            torch.testing.assert_close(model.forward_features(IMAGES), tuned(files), **ONE)


@pytest.mark.parametrize("weights", ["clip.safetensors", "eva_clip.pt"])
def test_open_clip_loads_the_export(files, tmp_path, run, weights):
    dst = tmp_path / "clip.safetensors"
    options = ("--weights", files / weights, "--lora", files / "lora.safetensors", "--to", "open_clip")
    code, _, err = run("convert", "export", dst, *options)
    assert code == 0, err
    before = open_clip.create_model("eva_mini_clip", pretrained=str(files / "clip.safetensors"))
    after = open_clip.create_model("eva_mini_clip", pretrained=str(dst))
    with torch.no_grad():
        torch.testing.assert_close(after.visual.trunk.forward_features(IMAGES), tuned(files), **ONE)
        text = torch.randint(1, 64, (2, 16))
        assert torch.equal(after.encode_text(text), before.encode_text(text))
        assert not torch.allclose(after.encode_image(IMAGES), before.encode_image(IMAGES), atol=1e-2)
    # and back to EVA-CLIP's own names, as timm reads those
    code, _, err = run("convert", "export", tmp_path / "eva.pt", "--weights", dst, "--to", "eva_clip")
    assert code == 0, err
    state = torch.load(tmp_path / "eva.pt", weights_only=True)
    original = torch.load(files / "eva_clip.pt", weights_only=True)["state_dict"]
    assert {f"module.{k}" for k in state} == set(original)
    model = timm.create_model("eva_mini", num_classes=32).eval()
    model.load_state_dict(checkpoint_filter_fn(state, model))
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), after.encode_image(IMAGES), **ONE)


@pytest.fixture(scope="module")
def own_vit(tmp_path_factory) -> Path:
    """A CLIP with open_clip's own ViT, small, and a LoRA of the same of timm's."""
    folder = tmp_path_factory.mktemp("own_vit")
    vision = {"image_size": 224, "patch_size": 32, "width": 128, "layers": 2}
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1}
    (folder / "own_vit_b.json").write_text(
        json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(folder / "own_vit_b.json")
    torch.manual_seed(5)
    clip = open_clip.create_model("own_vit_b")
    for p in clip.visual.parameters():
        nn.init.normal_(p, std=0.15)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / "clip.safetensors")
    backbone = vit.load(OWN_VIT, "random")
    for p in lora.parameters(lora.attach(backbone.vit, rank=4, alpha=2.0)).values():
        nn.init.normal_(p, std=0.2)
    lora.save(backbone.vit, folder / "lora.safetensors", backbone=OWN_VIT)
    return folder


def test_open_clips_own_vit_in_and_out(own_vit, tmp_path, run):
    """timm's filter reads the same tower; what is exported is ours with the LoRA beside it, in open_clip."""
    state, dst = load_file(own_vit / "clip.safetensors"), tmp_path / "clip.safetensors"
    backbone = vit.load(OWN_VIT, str(own_vit / "clip.safetensors"))
    expected = vit_filter_fn(state, timm.create_model(OWN_VIT, num_classes=32))
    for name, value in backbone.vit.state_dict().items():
        assert torch.equal(value, expected[name]), name
    options = ("--model", OWN_VIT, "--weights", own_vit / "clip.safetensors", "--to", "open_clip")
    code, _, err = run("convert", "export", dst, *options)  # without LoRA: every tensor as it was
    back = load_file(dst)
    assert code == 0 and back.keys() == state.keys(), err
    assert all(torch.equal(back[k], state[k]) for k in state)

    code, _, err = run("convert", "export", dst, *options, "--lora", own_vit / "lora.safetensors")
    assert code == 0, err
    after = open_clip.create_model("own_vit_b", pretrained=str(dst)).eval()
    lora.load(backbone.vit, own_vit / "lora.safetensors")
    with torch.no_grad():
        expected = backbone(IMAGES).cls @ state["visual.proj"]
        torch.testing.assert_close(after.encode_image(IMAGES), expected, **ONE)
    before = open_clip.create_model("own_vit_b", pretrained=str(own_vit / "clip.safetensors")).eval()
    text = torch.randint(1, 64, (2, 16))
    assert torch.equal(after.encode_text(text), before.encode_text(text))
    with torch.no_grad():
        assert not torch.allclose(after.encode_image(IMAGES), before.encode_image(IMAGES), atol=1e-2)


def test_other_vits_of_open_clips_own_are_refused_by_name(own_vit, tmp_path, run):
    state = load_file(own_vit / "clip.safetensors")
    coca = {**state, "visual.attn_pool.query": torch.zeros(4, 128)}
    clipa = {k: v for k, v in state.items() if "ln_pre" not in k}
    for weights, said in ((coca, "weights of CoCa"), (clipa, "weights of CLIPA")):
        save_file(weights, tmp_path / "other.safetensors")
        options = ("--model", OWN_VIT, "--weights", tmp_path / "other.safetensors", "--to", "open_clip")
        code, _, err = run("convert", "export", tmp_path / "out.safetensors", *options)
        assert code == 2 and said in err and not (tmp_path / "out.safetensors").exists(), err
    options = ("--weights", own_vit / "clip.safetensors", "--lora", own_vit / "lora.safetensors")
    code, _, err = run("convert", "export", tmp_path / "out", *options, "--to", "peft")
    assert code == 2 and "no layer for q and v that PEFT could tune" in err, err


@pytest.mark.parametrize("folder, model", [("blip2", "eva_mini"), ("blip2_less", "eva_mini_blip2")])
def test_transformers_loads_the_export(files, tmp_path, run, folder, model):
    """Shards, index, tokenizer and language model stay; the LoRA of a block that BLIP-2 lacks is named."""
    dst = tmp_path / "out"
    options = ("--weights", files / folder, "--lora", files / "lora.safetensors", "--to", "blip2")
    code, out, err = run("convert", "export", dst, *options)
    assert code == 0, err
    assert ("left out: blocks.5.attn.qkv.lora_A" in out) == (folder == "blip2_less")
    less = {k: v for k, v in load_file(files / "lora.safetensors").items() if "blocks.5" not in k}
    header = json.dumps(lora.read_header(files / "lora.safetensors"))
    if folder == "blip2":
        less = load_file(files / "lora.safetensors")
    save_file(less, tmp_path / "less.safetensors", metadata={"lora": header})
    ours = vit.load(model, str(files / folder))
    lora.load(ours.vit, tmp_path / "less.safetensors")
    before, after = (Blip2ForConditionalGeneration.from_pretrained(f).eval() for f in (files / folder, dst))
    with torch.no_grad():
        got = after.vision_model(IMAGES).last_hidden_state
        torch.testing.assert_close(got, tokens(ours(IMAGES)), **ONE)
    for name, value in before.state_dict().items():
        same = torch.equal(value, after.state_dict()[name])
        assert same != (name.startswith("vision_model") and name.endswith("qkv.weight")), name
    assert (dst / "tokenizer.json").read_text() == "{}"
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    assert index == json.loads((files / folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_transformers_loads_the_export_of_a_half_precision_blip2_in_fp32(files, tmp_path, run, stored, key):
    """Its config names the type that from_pretrained takes: 16 bit would round the update away again."""
    src, dst = tmp_path / "half", tmp_path / "out"
    half = Blip2ForConditionalGeneration.from_pretrained(files / "blip2", dtype=getattr(torch, stored))
    half.save_pretrained(src)
    config = json.loads((src / "config.json").read_text())
    del config["dtype"]  # in fp16 the Q-Former stays in fp32, so that this names fp32
    config[key] = config["text_config"][key] = config["vision_config"][key] = stored
    (src / "config.json").write_text(json.dumps(config))
    code, _, err = run(
        "convert", "export", dst, "--weights", src, "--lora", files / "lora.safetensors", "--to", "blip2"
    )
    assert code == 0, err
    after = Blip2ForConditionalGeneration.from_pretrained(dst)
    assert {p.dtype for p in after.parameters()} == {torch.float32}
    ours = vit.load("eva_mini", str(src))
    lora.load(ours.vit, files / "lora.safetensors")
    with torch.no_grad():
        for block, layer in zip(ours.vit.blocks, after.vision_model.encoder.layers, strict=True):
            qkv = block.attn.qkv
            torch.testing.assert_close(layer.self_attn.qkv.weight, qkv.weight + qkv.delta(), **ONE)
    assert stored not in (dst / "config.json").read_text()


def test_peft_loads_the_export(files, tmp_path, run):
    """A fused qkv: rank 2 r, k untouched. timm's EVA must be told to call its qkv layer."""
    lora_file = ("--lora", files / "lora.safetensors", "--to", "peft")
    for weights in ("timm.safetensors", "blip2_less"):
        code, _, err = run("convert", "export", tmp_path / weights, "--weights", files / weights, *lora_file)
        assert code == 0, err
    assert json.loads((tmp_path / "blip2_less" / "adapter_config.json").read_text())["r"] == 8
    model = vit.load("eva_mini", str(files / "timm.safetensors")).vit
    with torch.no_grad():
        plain = model.forward_features(IMAGES)
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "timm.safetensors")
        bypassed = adapted.forward_features(IMAGES)
        assert torch.equal(bypassed, plain)  # what the README warns of
        for block in model.blocks:
            block.attn.qkv_bias_separate = True
        got = adapted.forward_features(IMAGES)
        torch.testing.assert_close(got, tuned(files), **ONE)
    layer = adapted.base_model.model.blocks[0].attn.qkv
    assert not layer.get_delta_weight("default")[WIDTH : 2 * WIDTH].any()

    blip2 = Blip2ForConditionalGeneration.from_pretrained(files / "blip2_less").eval()
    merged = ("--weights", files / "blip2_less", "--lora", files / "lora.safetensors", "--to", "blip2")
    assert run("convert", "export", tmp_path / "merged", *merged)[0] == 0
    expected = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval().vision_model
    adapted = peft.PeftModel.from_pretrained(blip2, tmp_path / "blip2_less")
    with torch.no_grad():
        got = adapted.base_model.model.vision_model(IMAGES).last_hidden_state
        torch.testing.assert_close(got, expected(IMAGES).last_hidden_state, **ONE)


def test_separate_q_and_v_keep_their_rank(tmp_path, run):
    """Other timm ViTs have q_proj and v_proj: merged in each; PEFT has the very same form."""
    model = vit.load("eva_split", "random", seed=1)
    save_file(model.vit.state_dict(), tmp_path / "w.safetensors")
    lora.attach(model.vit, rank=3)
    for p in lora.parameters(model.vit).values():
        nn.init.normal_(p, std=0.2)
    lora.save(model.vit, tmp_path / "l.safetensors", backbone=model.name)
    options = (
        "--weights",
        tmp_path / "w.safetensors",
        "--lora",
        tmp_path / "l.safetensors",
        "--model",
        model.name,
    )
    with torch.no_grad():
        expected = model.vit.forward_features(IMAGES)
    for to, dst in (("timm", "t.safetensors"), ("peft", "p")):
        code, _, err = run("convert", "export", tmp_path / dst, *options, "--to", to)
        assert code == 0, err
    options = dict(num_classes=0, global_pool="token", checkpoint_path=str(tmp_path / "t.safetensors"))
    merged = timm.create_model(model.name, **options).eval()
    plain = vit.load(model.name, str(tmp_path / "w.safetensors")).vit
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "p")
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["r"] == 3
    with torch.no_grad():
        torch.testing.assert_close(merged.forward_features(IMAGES), expected, **ONE)
        torch.testing.assert_close(adapted.forward_features(IMAGES), expected, **ONE)


def test_a_half_precision_file_does_not_round_the_update_away(files, tmp_path, run):
    half = {k: v.bfloat16() for k, v in load_file(files / "timm.safetensors").items()}
    save_file(half, tmp_path / "half.safetensors")
    options = (
        "--weights",
        tmp_path / "half.safetensors",
        "--lora",
        files / "lora.safetensors",
        "--to",
        "timm",
    )
    assert run("convert", "export", tmp_path / "t.safetensors", *options)[0] == 0
    out, name = load_file(tmp_path / "t.safetensors"), "blocks.2.attn.qkv"
    A, B = (load_file(files / "lora.safetensors")[f"{name}.lora_{part}"] for part in "AB")
    expected = half[f"{name}.weight"].float()
    expected[:WIDTH] += B[:WIDTH] @ A[:4] * 0.5
    expected[2 * WIDTH :] += B[WIDTH:] @ A[4:] * 0.5
    torch.testing.assert_close(out[f"{name}.weight"], expected)
    assert out["blocks.2.mlp.fc1.weight"].dtype == torch.bfloat16


def test_the_model_card(files, tmp_path, run):
    """What it is made of, how it was tuned, what it scores, and a line that loads it."""
    shutil.copy(files / "lora.safetensors", tmp_path)
    torch.save({"options": {"iters": 50000, "data": {"detection": "abc"}}}, tmp_path / "last.pt")
    (tmp_path / "result.json").write_text('{"top1": 12.5}')
    dst = tmp_path / "out" / "vit.safetensors"
    options = (
        "--weights",
        files / "timm.safetensors",
        "--lora",
        tmp_path / "lora.safetensors",
        "--to",
        "timm",
    )
    code, _, err = run("convert", "export", dst, *options, "--results", tmp_path / "result.json")
    assert code == 0, err
    card = dst.with_suffix(".md").read_text()
    for part in (
        "eva_mini",
        '"step": 7',
        '"rank": 4',
        '"iters": 50000',
        '"top1": 12.5',
        "timm.safetensors | ",
    ):
        assert part in card
    call = next(line.strip() for line in card.splitlines() if "create_model" in line)
    with torch.no_grad():
        torch.testing.assert_close(eval(call).eval().forward_features(IMAGES), tuned(files), **ONE)


# --- what is refused


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_a_command_is_refused(tmp_path, run, zipped):
    torch.save(
        {"model": Hostile(tmp_path / "owned")}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped
    )
    code, _, err = run("convert", "import", tmp_path / "w.pt", tmp_path / "ours.safetensors")
    assert code == 2 and "posix.system" in err and len(err.splitlines()) == 1
    with pytest.raises(ValueError, match="posix.system"):
        vit.load("eva_mini", str(tmp_path / "w.pt"))
    assert not (tmp_path / "owned").exists() and not (tmp_path / "ours.safetensors").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # it would have
    assert (tmp_path / "owned").exists()


def broken(files: Path, folder: Path, how: str) -> tuple[Path, tuple]:
    """A file that must not be converted, and options."""
    state = load_file(files / "timm.safetensors")
    src, options = folder / "bad.safetensors", ()
    if how == "another model":
        state = timm.create_model("resnet10t").state_dict()
    elif how == "another ViT":
        state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
        options = ("--model", "eva_mini")
    elif how == "missing":
        del state["blocks.3.attn.q_bias"]
    elif how == "extra":
        state |= {f"blocks.0.gamma_{i}": torch.ones(1) for i in range(30)}
    elif how in ("wrong rank", "half a LoRA", "LoRA of another"):
        names = {k for k in load_file(files / "lora.safetensors")}
        state = {f"visual.{k}": torch.ones((8, 192) if k.endswith("A") else (384, 4)) for k in names}
        if how == "wrong rank":
            state["visual.blocks.2.attn.qkv.lora_A"] = torch.ones(6, 192)
        elif how == "half a LoRA":
            del state["visual.blocks.5.attn.qkv.lora_B"]
        else:
            options = ("--model", "eva_g")
    elif how == "short head":
        state = release_head("detection")
        del state["visft_heads.transformer.enc2dec_proj.bias"]
    elif how == "head and more":
        state = {**release_head("detection"), "visft_heads.pose.weight": torch.ones(1)}
    elif how == "other names than --from says":
        options = ("--from", "lavis")
    save_file({k: v.contiguous().clone() for k, v in state.items()}, src)
    if how == "truncated":
        src.write_bytes(src.read_bytes()[:-1000])
    elif how == "truncated torch":
        torch.save(state, src := folder / "bad.pt")
        src.write_bytes(src.read_bytes()[:-1000])
    return src, options


BAD = {
    "another model": "no vision tower",
    "another ViT": "does not fit --model eva_mini",
    "missing": "missing blocks.3.attn.q_bias",
    "extra": "and 26 more",
    "wrong rank": r"blocks.2.attn.qkv.lora_A is \(6, 192\), expected \(8, 192\)",
    "half a LoRA": "missing blocks.5.attn.qkv.lora_B",
    "LoRA of another": "--model eva_g has width 1408",
    "short head": "missing enc2dec_proj.bias",
    "head and more": "pose.weight",
    "other names than --from says": "width 0, 0 blocks",
    "truncated": "truncated",
    "truncated torch": "truncated",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_files_leave_the_target_untouched(files, tmp_path, run, how):
    src, options = broken(files, tmp_path, how)
    dst = tmp_path / "out" / "dst.safetensors"
    dst.parent.mkdir()
    dst.write_bytes(b"as it was")
    code, _, err = run("convert", "import", src, dst, *options)
    assert code == 2, err
    assert re.search(BAD[how], err), err
    assert len(err.splitlines()) <= 10
    assert dst.read_bytes() == b"as it was" and list(dst.parent.iterdir()) == [dst]


def test_exports_that_cannot_be(files, tmp_path, run, monkeypatch):
    other = vit.load("vit_tiny_patch16_224", "random")
    lora.attach(other.vit, rank=2)
    lora.save(other.vit, tmp_path / "other.safetensors", backbone=other.name)
    mini, tuned_by = ("--weights", files / "timm.safetensors"), ("--lora", files / "lora.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for dst, options, said in (
        ("t.safetensors", (*mini, "--lora", tmp_path / "other.safetensors", "--to", "timm"), "vit_tiny"),
        ("t.safetensors", (*mini, *tuned_by, "--to", "open_clip"), "needs a whole open_clip or eva_clip"),
        ("t.safetensors", ("--weights", files / "clip.safetensors", *tuned_by, "--to", "blip2"), "blip2"),
        ("t.bin", (*mini, *tuned_by, "--to", "timm"), ".safetensors file"),
        ("full", (*mini, *tuned_by, "--to", "peft"), "there already"),
        ("p", (*mini, "--to", "peft"), "pass --lora"),
        (
            "t.safetensors",
            (*mini, "--lora", files / "timm.safetensors", "--to", "timm"),
            "not one of our LoRA",
        ),
        ("t.safetensors", (*mini, *tuned_by, "--to", "timm", "--results", "no.json"), "no.json"),
        ("t.safetensors", ("--weights", tmp_path / "no", "--to", "timm"), "no weights at"),
    ):
        code, _, err = run("convert", "export", tmp_path / dst, *options)
        assert code == 2 and said in err, (said, err)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    code, _, err = run("convert", "export", tmp_path / "t.safetensors", *mini, *tuned_by, "--to", "timm")
    assert code == 2 and "the disk has 0.0 GB" in err
    assert {p.name for p in tmp_path.iterdir()} == {"other.safetensors", "full"}


@pytest.mark.parametrize("dst, to", [("t.safetensors", "timm"), ("t.pt", "eva_clip"), ("t", "peft")])
def test_ctrl_c_leaves_nothing(files, tmp_path, run, monkeypatch, dst, to):
    """In the middle of writing: half of it is there when the signal comes."""

    def write_half(tensors, path, **_):
        path.write(b"half") if hasattr(path, "write") else Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(convert, "save_file", write_half)
    monkeypatch.setattr("files.save_file", write_half)
    monkeypatch.setattr(torch, "save", write_half)
    if "." in dst:
        (tmp_path / dst).write_bytes(b"as it was")
    before = sorted(tmp_path.iterdir())
    options = ("--weights", files / "timm.safetensors", "--lora", files / "lora.safetensors", "--to", to)
    code, _, err = run("convert", "export", tmp_path / dst, *options)
    assert code == 130 and err.startswith("convert.py: interrupted") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert not before or before[0].read_bytes() == b"as it was"


@pytest.mark.parametrize("dst, to", [("t.safetensors", "timm"), ("t.pt", "eva_clip"), ("t", "peft")])
def test_a_disk_that_fills_up_leaves_nothing(files, tmp_path, run, dst, to):
    """A limit on the size of files stands for the full disk."""
    target = tmp_path / dst
    if "." in dst:
        target.write_bytes(b"as it was")
    before = sorted(tmp_path.iterdir())
    options = ("--weights", files / "timm.safetensors", "--lora", files / "lora.safetensors", "--to", to)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code, _, err = run("convert", "export", target, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "not written" in err and (to == "peft" or "File too large" in err), err
    assert sorted(tmp_path.iterdir()) == before
    assert not target.exists() or target.read_bytes() == b"as it was"
