"""The backbone against timm and transformers."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import Blip2VisionConfig, Blip2VisionModel

import backbone as vit

ROPE = (  # each kind of timm's
    "eva02_tiny_patch14_224",  # the grid of pretraining, stretched
    "vit_pe_core_tiny_patch16_384",  # the same, but counted from 1, and x before y
    "vit_medium_patch16_rope_reg1_gap_256",  # no [CLS], one register
    "vit_small_patch16_dinov3",  # from -1 to 1; its pairs are halves of a head; four registers
    "vit_small_patch16_rope_224",  # counted from the corner
    "vit_small_patch16_rope_mixed_224",  # frequencies of its own for each block and head
)


@pytest.fixture(scope="module")
def mini() -> vit.Backbone:
    backbone = vit.load("eva_mini", "random", seed=3)
    torch.nn.init.normal_(backbone.vit.pos_embed, generator=torch.Generator().manual_seed(0))
    return backbone


@pytest.fixture
def narrow(monkeypatch):
    """narrow(name) -> a ViT of two blocks of width 64, no weight as timm starts it (LayerScale: 1e-5)."""
    create = timm.create_model
    sizes = dict(depth=2, embed_dim=64, num_heads=4)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**sizes, **options}))

    def build(name: str, **options) -> vit.Backbone:
        torch.manual_seed(0)
        backbone = vit.Backbone(name, **options)
        for key, p in backbone.vit.named_parameters():
            if p.ndim == 1:
                torch.nn.init.uniform_(p, 0.5, 1.5)
            elif not key.startswith("rope"):
                torch.nn.init.normal_(p, std=0.2 if key.startswith("blocks") else 0.5)
        return backbone

    return build


def timms_features(backbone: vit.Backbone, images: torch.Tensor, **options) -> torch.Tensor:
    """(B, prefix + H * W, D) of timm's own model without pooling, where the last norm is always `norm`."""
    options |= dict(num_classes=0, global_pool="", dynamic_img_size=True)
    theirs = timm.create_model(vit.TIMM_NAMES.get(backbone.name, backbone.name), **options).eval()
    state = {k.replace("fc_norm.", "norm."): v for k, v in backbone.vit.state_dict().items()}
    if options.get("class_token") is False:
        state = {k: v for k, v in state.items() if k not in ("cls_token", "reg_token")}
        if "pos_embed" in state:
            state["pos_embed"] = state["pos_embed"][:, -theirs.pos_embed.shape[1] :]
    theirs.load_state_dict(state)
    with torch.no_grad():
        return theirs.forward_features(images)


def tokens(f: vit.Features) -> torch.Tensor:
    return f.grid.flatten(2).transpose(1, 2)  # (B, H * W, D)


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
    "name, prefix",
    [
        ("eva_mini", 1),
        ("vit_tiny_patch16_224", 1),
        ("vit_base_patch32_clip_224", 1),  # OpenAI's: a norm before the blocks
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_medium_patch16_reg1_gap_256", 1),  # a register but no [CLS]; its norm is behind the pooling
        ("vit_base_patch16_siglip_224", 0),
        ("eva02_tiny_patch14_224", 1),
        ("vit_small_patch16_dinov3", 5),
        ("vit_small_patch16_rope_mixed_224", 1),
    ],
)
def test_features_are_timms_at_the_native_size(narrow, name, prefix):
    backbone = narrow(name)
    images = torch.randn(1, 3, *backbone.vit.patch_embed.img_size)
    f = backbone(images)
    expected = timms_features(backbone, images)
    assert torch.equal(tokens(f), expected[:, prefix:])
    assert expected[:, prefix:].std() > 0.1
    if name in ("vit_medium_patch16_reg1_gap_256", "vit_base_patch16_siglip_224"):
        assert f.cls is None and not backbone.has_cls
    else:
        assert torch.equal(f.cls, expected[:, 0])


@pytest.mark.parametrize("H, W", [(5, 8), (11, 6)])
@pytest.mark.parametrize("name", ROPE)
def test_rotary_positions_are_timms_at_other_sizes(narrow, name, H, W):
    """Learned positions, which timm resizes otherwise, are the same everywhere here."""
    backbone = narrow(name)
    if backbone.vit.pos_embed is not None:
        with torch.no_grad():
            backbone.vit.pos_embed[:] = backbone.vit.pos_embed[:, -1:].clone()
    images = torch.randn(1, 3, H * backbone.patch, W * backbone.patch)
    expected = timms_features(backbone, images)[:, backbone.vit.num_prefix_tokens :]
    torch.testing.assert_close(tokens(backbone(images)), expected, atol=1e-5, rtol=1e-5)  # fp32


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


@pytest.mark.parametrize("name", ["eva_mini", *ROPE])
def test_an_images_features_and_gradients_do_not_depend_on_its_batch(narrow, name):
    """Padding is not attended, and the positions are those of each image alone. So 2 x 1 = 1 x 2 images."""
    backbone = narrow(name)
    patch, weight = backbone.patch, backbone.vit.blocks[0].norm1.weight.requires_grad_()
    sizes = [(18 * patch, 25 * patch), (20 * patch, 14 * patch + patch // 2)]  # fourteen and a half patches
    padded = [torch.zeros(3, -(-h // patch) * patch, -(-w // patch) * patch) for h, w in sizes]
    images, valid = torch.randn(2, 3, 20 * patch, 25 * patch) * 9, torch.zeros(2, 20 * patch, 25 * patch) > 0
    for i, (h, w) in enumerate(sizes):
        padded[i][:, :h, :w] = torch.randn(3, h, w)
        images[i, :, : padded[i].shape[1], : padded[i].shape[2]] = padded[i]
        valid[i, :h, :w] = True
    together = backbone(images, valid)
    assert together.valid.sum((1, 2)).tolist() == [18 * 25, 20 * 15]
    gradient = 0
    for i, image in enumerate(padded):
        alone = backbone(image[None])
        H, W = alone.grid.shape[2:]
        torch.testing.assert_close(together.grid[i, :, :H, :W], alone.grid[0], atol=1e-5, rtol=1e-5)  # fp32
        if backbone.has_cls:
            torch.testing.assert_close(together.cls[i], alone.cls[0], atol=1e-5, rtol=1e-5)
        gradient += torch.autograd.grad(alone.grid.square().mean((1, 2, 3)).sum(), weight)[0]
    means = [(g * v).square().sum() / v.sum() for g, v in zip(together.grid, together.valid, strict=True)]
    of_both = torch.autograd.grad(sum(means) / backbone.dim, weight)[0]
    torch.testing.assert_close(of_both, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name, without",
    [
        ("eva_mini", {}),
        ("vit_small_patch14_reg4_dinov2", {"reg_tokens": 0}),
        ("vit_small_patch16_dinov3", {"num_reg_tokens": 0}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("vit_base_patch16_siglip_224", {}),  # never had any
    ],
)
def test_without_cls_equals_timms_model_without_a_class_token(narrow, name, without):
    """And without registers: nothing but patches."""
    backbone = narrow(name, use_cls=False)
    images = torch.randn(1, 3, *backbone.vit.patch_embed.img_size)
    f = backbone(images)
    assert f.cls is None
    assert torch.equal(tokens(f), timms_features(backbone, images, class_token=False, **without))


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


@pytest.mark.parametrize(
    "name",
    [
        "eva_mini",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "vit_small_patch16_rope_mixed_224",
        "vit_base_patch16_siglip_224",  # its file has an attention pool
        "vit_medium_patch16_reg1_gap_256",  # and this one a norm behind the pooling
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_from_a_file(narrow, name, dtype, tmp_path):
    """The file path builds on meta: what is not in the file (key bias, RoPE tables) must be made anew."""
    backbone = narrow(name)
    state = timm.create_model(name, num_classes=2).state_dict()
    assert state.keys() > backbone.vit.state_dict().keys()
    state |= backbone.vit.state_dict()
    save_file(state, tmp_path / "w.safetensors")
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
    for name, told in (
        ("resnet18", "timm cannot build it as a plain ViT"),
        ("beit_base_patch16_224", "timm cannot build it as a plain ViT"),
        ("swin_tiny_patch4_window7_224", "not a plain ViT of timm's but a SwinTransformer"),
        ("deit_tiny_distilled_patch16_224", "not a plain ViT of timm's but a VisionTransformerDistilled"),
        ("vit_tiny_r_s16_p8_224", "patches from HybridEmbed, not one convolution"),  # stride 32, not 8
        ("vit_base_r50_s16_224", "patches from HybridEmbed, not one convolution"),
    ):
        with pytest.raises(ValueError, match=f"^--model {name}: .*{told}.*$"), torch.device("meta"):
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


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
def test_weights_are_found_in_what_others_wrap_them_in(mini, tmp_path, wrapper):
    """Of timm and MAE, DeepSpeed, open_clip and Lightning; names as DistributedDataParallel has them."""
    state = mini.vit.state_dict()
    torch.save({wrapper: {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "w.pt")
    loaded = vit.load("eva_mini", str(tmp_path / "w.pt")).vit.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert not mini.training and not mini.vit.training
