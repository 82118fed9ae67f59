"""BLIP-2 with dW in its vision tower, against transformers' own forward and generate; tiny random models."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, Blip2Processor, BlipImageProcessor

import backbone
import blip2
import lora
from tests import tiny_blip2

SETTINGS = dict(num_beams=5, max_new_tokens=10, min_new_tokens=1, length_penalty=0.0)
PROMPTS = [
    "Question: what is this? Short answer:",
    "a photo of",
    "Question: how many dogs are there in the picture near the yellow bus? Short answer:",
    "yes",
    "",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("blip2")
    return {kind: tiny_blip2.write(root / kind, kind) for kind in ("opt", "t5", "retrieval")}


@pytest.fixture(scope="module")
def models(folders):
    return {k: blip2.Blip2(str(p), torch.float32, "cpu", k == "retrieval") for k, p in folders.items()}


@pytest.fixture
def images():
    return torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def lora_file(path, depth: int, width: int = 96, seed: int = 0):
    """dW of a timm EVA of the tower's width, as stage 2 would have written it."""
    size = dict(patch_size=14, embed_dim=width, depth=depth, num_heads=4, num_classes=0)
    backbone.register_models()
    vit = lora.attach(timm.create_model("eva_mini", **size), rank=4, alpha=4)
    torch.manual_seed(seed)
    for p in lora.parameters(vit).values():
        nn.init.normal_(p, std=0.3)
    lora.save(vit, path, backbone="eva_g")
    return path


# --- generation


def theirs(model: blip2.Blip2, folder, images, prompts) -> list[str]:
    """transformers' processor and generate, one image at a time; its output repeats OPT's prompt."""
    processor = Blip2Processor(
        BlipImageProcessor(), AutoTokenizer.from_pretrained(folder), tiny_blip2.QUERIES
    )
    texts = []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = processor(images=Image.new("RGB", (56, 56)), text=prompt, return_tensors="pt")
        inputs["pixel_values"] = image[None]
        stop = processor.tokenizer("\n", add_special_tokens=False).input_ids[0] if model.is_opt else 2
        out = model.model.generate(**inputs, **SETTINGS, do_sample=False, eos_token_id=stop, pad_token_id=1)
        out = out[:, inputs["input_ids"].shape[1] :] if model.is_opt else out
        texts.append(processor.tokenizer.decode(out[0], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_batched_answers_are_transformers_one_by_one(models, folders, images, kind):
    """Different lengths in a batch (left padding for OPT), the same tokens, the same answers."""
    model = models[kind]
    expected = theirs(model, folders[kind], images, PROMPTS)
    queries = model.queries(model.vision(images))
    assert model.generate(queries, PROMPTS, SETTINGS) == expected
    assert model.generate(queries, PROMPTS, SETTINGS, batch=2) == expected
    assert len(set(expected)) >= 3, expected  # they do depend on image and prompt


def test_answers_stop_at_a_line_break(models, images):
    """LAVIS's stop for OPT. The model is made to say one word and then a line break, for ever."""
    model = models["opt"]
    newline = model.tokenizer("\n", add_special_tokens=False).input_ids[0]
    assert model._generation(SETTINGS).eos_token_id == newline
    queries = model.queries(model.vision(images[:1]))
    long = model.generate(queries, ["a photo of"], {"max_new_tokens": 12, "num_beams": 1})
    ids = model.tokenizer(long[0], add_special_tokens=False).input_ids
    bias = torch.zeros(model.config.text_config.vocab_size)
    bias[newline] = 1e4
    head = model.model.language_model.lm_head
    hook = head.register_forward_hook(lambda m, x, y: y + bias)
    try:
        assert model.generate(queries, ["a photo of"], {"max_new_tokens": 12, "num_beams": 1}) == [""]
        forced = {"max_new_tokens": 12, "min_new_tokens": 3, "num_beams": 1}
        assert len(model.generate(queries, ["a photo of"], forced)[0]) < len(long[0])
    finally:
        hook.remove()
    assert len(ids) > 3


def test_prompts_have_lavis_tokens_whatever_the_tokenizer_adds(models):
    opt, t5 = models["opt"], models["t5"]
    plain = opt.tokenizer("a photo of", add_special_tokens=False).input_ids
    assert opt.prompt_tokens(["a photo of", ""]) == [[2, *plain], [2]]
    assert t5.prompt_tokens(["a photo of"])[0][-1] == 2
    long = "Question: " + "how many " * 40 + "Short answer:"
    cut = opt.prompt_tokens([long])[0]
    assert len(cut) == 32 and cut[1:] == opt.tokenizer(long, add_special_tokens=False).input_ids[:31]
    assert len(t5.prompt_tokens([long])[0]) == 32
    _, notes = opt.prompts("{}", [long, "a photo of"])
    assert notes == ["1 prompts were cut to 32 tokens"] and opt.prompts("a photo of", [""])[1] == []


def test_images_are_what_lavis_makes_of_them(models):
    """Squashed to a square; transformers' image processor does the same in other steps (1 grey level off)."""
    pixels = torch.rand(3, 40, 90, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())
    processor = BlipImageProcessor(size={"height": 56, "width": 56})
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (models["opt"].transform(image) - expected).abs().max() < 0.02  # a grey level is 0.015


def test_lavis_text_processors_by_hand():
    assert (
        blip2.clean_question('What is "this"? (a) *red* #1 box: yes; no~.')
        == "what is this? a red 1 box yes no"
    )
    assert blip2.clean_caption("A man, riding.A horse!!") == "a man, riding a horse"
    assert blip2.clean_question("a " * 60) == "a " * 49 + "a"


# --- dW


def test_lora_of_forty_blocks_on_thirty_nine(models, folders, tmp_path, images):
    """dW of one block more than BLIP-2 has: the last is left out, and said; the rest acts as merged."""
    model = blip2.Blip2(str(folders["opt"]), torch.float32, "cpu")
    plain = model.vision(images)
    become, notes = model.attach(lora_file(tmp_path / "lora.safetensors", tiny_blip2.BLOCKS + 1))
    assert len(notes) == 1 and "blocks.3. left out: BLIP-2 stops after 3 blocks" in notes[0]
    become("before")
    assert torch.equal(model.vision(images), plain)
    become("after")
    tuned = model.vision(images)
    assert (tuned - plain).abs().max() > 0.1

    size = dict(patch_size=14, embed_dim=96, depth=tiny_blip2.BLOCKS + 1, num_heads=4, num_classes=0)
    backbone.register_models()
    vit = timm.create_model("eva_mini", **size)
    lora.load(vit, tmp_path / "lora.safetensors")
    other = blip2.Blip2(str(folders["opt"]), torch.float32, "cpu")
    for ours, block in zip(other.model.vision_model.encoder.layers, vit.blocks, strict=False):
        ours.self_attn.qkv.weight.data += (
            block.attn.qkv.delta()
        )  # W + (alpha / r) B A in transformers' own place
    torch.testing.assert_close(other.vision(images), tuned, rtol=1e-4, atol=1e-4)


def test_lora_of_as_many_blocks_leaves_nothing_out(folders, tmp_path):
    model = blip2.Blip2(str(folders["retrieval"]), torch.float32, "cpu", retrieval=True)
    _, notes = model.attach(lora_file(tmp_path / "lora.safetensors", tiny_blip2.BLOCKS))
    assert notes == [] and model.attach(None)[1] == []


@pytest.mark.parametrize("depth, width", [(tiny_blip2.BLOCKS + 2, 96), (tiny_blip2.BLOCKS - 1, 96), (3, 48)])
def test_lora_that_does_not_fit_is_refused(models, tmp_path, depth, width):
    path = lora_file(tmp_path / "lora.safetensors", depth, width)
    with pytest.raises(ValueError, match=f"of {depth} blocks of width {width}.*has 3 of 96"):
        blip2.spare_block(path, models["opt"].config)


# --- loading


def test_half_precision_is_of_the_two_large_parts(folders, models, images):
    model = blip2.Blip2(str(folders["opt"]), torch.bfloat16, "cpu")
    assert {p.dtype for p in model.model.vision_model.parameters()} == {torch.bfloat16}
    parts = {name.partition(".")[0]: p.dtype for name, p in model.model.named_parameters()}
    assert parts == {
        "vision_model": torch.bfloat16,
        "language_model": torch.bfloat16,
        "qformer": torch.float32,
        "query_tokens": torch.float32,
        "language_projection": torch.float32,
    }
    first = blip2.Blip2(str(folders["retrieval"]), torch.bfloat16, "cpu", retrieval=True)
    assert {p.dtype for n, p in first.model.named_parameters() if "vision_model" not in n} == {torch.float32}
    f, exact = model.vision(images), models["opt"].vision(images)
    assert f.dtype == torch.bfloat16 and (f.float() - exact).norm() < 0.03 * exact.norm()  # 8 bits
    assert len(model.generate(model.queries(f), PROMPTS, SETTINGS)) == 5


def test_models_of_another_kind_are_refused_by_name(folders, tmp_path):
    with pytest.raises(
        ValueError, match="is Blip2ForImageTextRetrieval .*, not Blip2ForConditionalGeneration"
    ):
        blip2.read_config(str(folders["retrieval"]), retrieval=False)
    with pytest.raises(ValueError, match="not Blip2ForImageTextRetrieval such as Salesforce/blip2-itm-vit-g"):
        blip2.read_config(str(folders["opt"]), retrieval=True)
    config = json.loads((folders["opt"] / "config.json").read_text())
    for change, told in (
        ({"model_type": "bert", "architectures": ["BertModel"]}, r"is BertModel \(bert\)"),
        ({"text_config": {"model_type": "gpt2"}}, "its language model is gpt2; opt and t5 are supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=told):
            blip2.read_config(str(tmp_path), retrieval=False)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        blip2.read_config(str(tmp_path), retrieval=False)


def test_missing_weights_are_refused(folders, tmp_path):
    model = blip2.Blip2(str(folders["opt"]), torch.float32, "cpu").model
    state = {k: v for k, v in model.state_dict().items() if "language_projection" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="2 weights are missing or do not fit"):
        blip2.Blip2(str(tmp_path), torch.float32, "cpu")


def test_broken_features_stop_the_run(folders, images):
    model = blip2.Blip2(str(folders["opt"]), torch.float32, "cpu")
    model.model.vision_model.post_layernorm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        model.vision(images)


# --- retrieval

CAPTIONS = [
    "A red star!",
    "two people riding their bikes on the street",
    "a yellow bus",
    "dogs",
    "black wood. white",
]


def test_contrast_and_match_are_transformers(models, images):
    model = models["retrieval"]
    tokens, f = model.caption_tokens(CAPTIONS), model.vision(images)
    similarity = blip2.contrast(model.image_features(f), model.text_features(tokens, batch=2))  # (T, I)
    every = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    matched = model.match_pairs(f, tokens, every, batch=7).view(5, 5)
    for t, caption in enumerate(CAPTIONS):
        ids = model.tokenizer([blip2.clean_caption(caption)], return_tensors="pt")
        ids = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
        for i in range(5):
            one = images[i : i + 1]
            itc = model.model(pixel_values=one, **ids).logits_per_image
            itm = model.model(pixel_values=one, **ids, use_image_text_matching_head=True).logits_per_image
            torch.testing.assert_close(similarity[t, i], itc[0, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(matched[t, i], itm[0, 1], rtol=1e-4, atol=1e-4)


def test_captions_are_cut_as_in_lavis(models):
    tokens = models["retrieval"].caption_tokens(["how many dogs " * 20])[0]
    assert len(tokens) == 35 and tokens[0] == 0 and tokens[-1] == 1  # [CLS] ... [SEP]


def test_candidates_and_rerank_by_hand():
    """3 captions, 2 images, the best one of each: a caption's candidates are not an image's."""
    similarity = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    of_caption, of_image = blip2.candidates(similarity, k=1)
    assert of_caption.tolist() == [[True, False], [False, True], [True, False]]
    assert of_image.tolist() == [[True, False], [False, False], [False, True]]
    matched = torch.tensor([[1.0, 9.0], [9.0, 2.0], [3.0, 4.0]])
    expected = torch.tensor([[1.9, -100], [-100, 2.3], [3.8, -100]])
    torch.testing.assert_close(blip2.rerank(similarity, of_caption, matched), expected)
    everything = blip2.candidates(similarity)  # 128 of fewer: all
    assert everything[0].all() and everything[1].all()


def test_retrieval_end_to_end_is_a_brute_force_count(folders, tmp_path, run):
    """Every pair, then two of each ranking re-ranked: recalls counted one by one from the scores above."""
    rng, items = np.random.default_rng(0), []
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
        words = " ".join(tiny_blip2.TEXT).split()
        captions = [" ".join(rng.choice(words, 6)) for _ in range(2)]
        items.append({"image": f"{i}.jpg", "caption": captions})
    (tmp_path / "captions.json").write_text(json.dumps(items))
    file = lora_file(tmp_path / "lora.safetensors", tiny_blip2.BLOCKS + 1)
    options = ["--captions", tmp_path / "captions.json", "--images", tmp_path, "--out", tmp_path / "out"]
    options += ["--blip2", folders["retrieval"], "--compare", file, "--workers", 0, "--batch", 3]
    model = blip2.Blip2(str(folders["retrieval"]), torch.float32, "cpu", retrieval=True)
    become, _ = model.attach(file)
    tokens = model.caption_tokens([caption for item in items for caption in item["caption"]])
    x = torch.stack([model.transform(Image.open(tmp_path / item["image"])) for item in items])
    for k in (128, 2):
        code, out, err = run("eval_zeroshot", "retrieval", *options, "--rerank", k)
        assert code == 0 and "left out" in out, err
        rows = json.loads((tmp_path / "out/result.json").read_text())["rows"]
        rows = {row["metric"]: row for row in rows}
        for variant in ("before", "after"):
            become(variant)
            f = model.vision(x)
            itc = blip2.contrast(model.image_features(f), model.text_features(tokens))  # (T, I)
            itm = itc + torch.stack([model.match(f, [t] * len(f)) for t in tokens])
            found = dict.fromkeys(("ITC TR@1", "ITC IR@1", "ITM TR@1", "ITM IR@1"), 0)
            for i in range(8):  # of the k captions nearest to an image, the best by ITM + ITC
                near = itc[:, i].argsort(descending=True)[:k]
                found["ITC TR@1"] += int(near[0]) // 2 == i
                found["ITM TR@1"] += int(near[itm[near, i].argmax()]) // 2 == i
            for t in range(16):
                near = itc[t].argsort(descending=True)[:k]
                found["ITC IR@1"] += int(near[0]) == t // 2
                found["ITM IR@1"] += int(near[itm[t, near].argmax()]) == t // 2
            for metric, hits in found.items():
                assert rows[metric][variant] == pytest.approx(100 * hits / (8 if "TR" in metric else 16))
    assert rows["ITC IR@5"]["n"] == 16 and rows["ITM TR@5"]["n"] == 8

    code, _, err = run("eval_zeroshot", "retrieval", *options, "--clip-weights", "random")
    assert code == 2 and "--clip-weights has no effect with --blip2" in err
    code, _, err = run("eval_zeroshot", "retrieval", *options[:-8], "--blip2", folders["opt"])
    assert code == 2 and "not Blip2ForImageTextRetrieval" in err
