"""The backbone against timm and transformers."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Blip2VisionConfig, Blip2VisionModel

import backbone as vit


@pytest.fixture(scope="module")
def mini() -> vit.Backbone:
    backbone = vit.load("eva_mini", "random", seed=3)
    torch.nn.init.normal_(backbone.vit.pos_embed, generator=torch.Generator().manual_seed(0))
    return backbone


def test_table_2_shapes_and_counts():
    """Paper Table 2; the counts are those of the published weights without the CLIP projection."""
    with torch.device("meta"):
        for name, depth, dim, mlp, count in (
            ("eva_g", 40, 1408, 6144, 1_011_146_112),
            ("eva_e", 64, 1792, 15360, 4_348_720_896),
        ):
            backbone = vit.Backbone(name)
            blocks = backbone.vit.blocks
            assert (len(blocks), backbone.dim, backbone.patch) == (depth, dim, 14)
            assert blocks[0].mlp.fc1.out_features == mlp and blocks[0].attn.num_heads == 16
            assert sum(p.numel() for p in backbone.parameters()) == count
            assert backbone.mean == (0.48145466, 0.4578275, 0.40821073)  # CLIP's, not ImageNet's


@pytest.mark.parametrize(
    "name", ["eva_mini", "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2"]
)
def test_features_are_timms_at_the_native_size(name):
    backbone = vit.load(name, "random")
    images = torch.randn(1, 3, *backbone.vit.patch_embed.img_size)
    f = backbone(images)
    expected = backbone.vit.forward_features(images)
    prefix = backbone.vit.num_prefix_tokens
    assert torch.equal(f.cls, expected[:, 0])
    assert torch.equal(f.grid.flatten(2).transpose(1, 2), expected[:, prefix:])


def test_other_sizes_agree_with_transformers():
    """transformers' BLIP-2 tower is the same ViT with plain bicubic position resizing, as in LAVIS."""
    torch.manual_seed(0)
    config = Blip2VisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=6, num_attention_heads=3, image_size=224,
        patch_size=14, layer_norm_eps=1e-6, initializer_range=0.02,
    )  # fmt: skip
    theirs = Blip2VisionModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.05)
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.projection": "attn.proj",
        "self_attn.qkv": "attn.qkv",
        "post_layernorm": "norm",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name.endswith("qkv.bias"):
            q, k, v = value.chunk(3)
            k.zero_()  # EVA has no key bias
            state[name.replace("qkv.bias", "q_bias")], state[name.replace("qkv.bias", "v_bias")] = q, v
        else:
            state[name] = value
    ours = vit.Backbone("eva_mini")
    ours.vit.load_state_dict(state)
    images = torch.randn(1, 3, 14 * 9, 14 * 20)
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        f = ours(images)
    torch.testing.assert_close(f.cls, expected[:, 0], atol=2e-5, rtol=1e-5)  # fp32, six blocks
    torch.testing.assert_close(f.grid.flatten(2).transpose(1, 2), expected[:, 1:], atol=2e-5, rtol=1e-5)


def test_an_images_features_do_not_depend_on_its_batch(mini):
    """Padding is not attended, and the positions stretch over the image alone."""
    a, b = torch.randn(3, 252, 350), torch.randn(3, 280, 203)
    images, valid = torch.zeros(2, 3, 280, 350), torch.zeros(2, 280, 350, dtype=torch.bool)
    for i, image in enumerate((a, b)):
        images[i, :, : image.shape[1], : image.shape[2]] = image
        valid[i, : image.shape[1], : image.shape[2]] = True
    together = mini(images, valid)
    assert together.valid.sum((1, 2)).tolist() == [18 * 25, 20 * 15]  # 203 px: fourteen and a half patches
    for i, image in enumerate((a, b)):
        h, w = image.shape[1:]
        alone = mini(F.pad(image, (0, -w % 14, 0, -h % 14))[None])
        H, W = alone.grid.shape[2:]
        torch.testing.assert_close(together.grid[i, :, :H, :W], alone.grid[0], atol=5e-5, rtol=1e-4)  # fp32
        torch.testing.assert_close(together.cls[i], alone.cls[0], atol=5e-5, rtol=1e-4)


def test_without_cls_equals_timms_model_without_a_class_token(mini):
    bare = timm.create_model(
        "eva_mini", num_classes=0, class_token=False, global_pool="", dynamic_img_size=True
    ).eval()
    state = {k: v for k, v in mini.vit.state_dict().items() if k != "cls_token"}
    bare.load_state_dict(state | {"pos_embed": state["pos_embed"][:, 1:]})
    images = torch.randn(1, 3, 224, 224)
    mini.use_cls = False
    try:
        f = mini(images)
    finally:
        mini.use_cls = True
    assert f.cls is None
    assert torch.equal(f.grid.flatten(2).transpose(1, 2), bare.forward_features(images))


def test_recomputation_gives_the_same_gradients(mini):
    images = torch.randn(2, 3, 56, 70)
    gradients = []
    for blocks in (0, 6):
        mini.recompute = blocks
        x = images.clone().requires_grad_()
        mini(x).grid.square().sum().backward()
        gradients.append(x.grad)
    mini.recompute = 0
    assert torch.equal(*gradients)


def test_recomputation_keeps_the_autocast_type():
    """A recomputation in another type would give gradients of another function."""
    backbone = vit.load("eva_mini", "random", torch.bfloat16)
    images = torch.randn(1, 3, 56, 56)
    gradients = []
    for blocks in (0, 6):
        backbone.recompute = blocks
        x = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            f = backbone(x)
        assert f.grid.dtype == torch.float32
        f.grid.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["eva_mini", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_from_a_file(name, dtype, tmp_path):
    """The file path builds on meta: what is not in the file (key bias, RoPE tables) must be made anew."""
    backbone = vit.load(name, "random")
    state = backbone.vit.state_dict()
    save_file(state | {"head.weight": torch.zeros(2, 192)}, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pt")
    images = torch.randn(1, 3, 224, 224).to(dtype)
    expected = backbone.to(dtype)(images).grid
    for file in ("w.safetensors", "w.pt"):
        loaded = vit.load(name, str(tmp_path / file), dtype)
        assert torch.equal(loaded(images).grid, expected)
        assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())


def test_weights_from_a_whole_clip_model(tmp_path):
    mini = vit.load("eva_mini", "random", seed=3).vit.state_dict()
    state = {f"visual.trunk.{name}": value for name, value in mini.items()}
    file = tmp_path / "clip.safetensors"
    save_file({**state, "visual.trunk.head.weight": torch.zeros(8, 192), "logit_scale": torch.ones(1)}, file)
    loaded = vit.load("eva_mini", str(file)).vit.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in mini.items())


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = vit.load("eva_mini", "random", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(
        one.vit.blocks[5].attn.qkv.weight,
        vit.load("eva_mini", "random", seed=1).vit.blocks[5].attn.qkv.weight,
    )
    assert not torch.equal(one.vit.cls_token, vit.load("eva_mini", "random", seed=2).vit.cls_token)


def test_bad_names_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no_such_vit"):
        vit.Backbone("no_such_vit")
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        with pytest.raises(ValueError, match="plain ViT"):
            vit.Backbone(name)
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        vit.load("eva_mini", str(tmp_path / "nowhere.pt"))
    state = vit.load("eva_mini", "random").vit.state_dict()
    del state["norm.bias"]
    state["blocks.0.norm1.weight"] = torch.ones(5)
    save_file(state | {"extra": torch.ones(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="(?s)norm.bias.*extra.*blocks.0.norm1.weight"):
        vit.load("eva_mini", str(tmp_path / "bad.safetensors"))
    with pytest.raises(ValueError, match="multiples of 14"):
        vit.load("eva_mini", "random")(torch.zeros(1, 3, 100, 112))
