"""LLaVA and its kin with dW in their towers, against transformers' own generate; tiny random models."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import lora
import vlm
from data import vqa
from tests import tiny_vlm
from tests.test_blip2 import lora_file
from tests.test_vqa import answers_of, write_set

KINDS = ["llava", "paligemma", "idefics3", "smolvlm"]
PROMPTS = [
    "what is this?",
    "how many dogs are there in the picture near the yellow bus?",
    "a photo of",
    "yes",
    "",
]
GREEDY = dict(num_beams=1, max_new_tokens=8, min_new_tokens=0)
BEAMS = dict(num_beams=3, max_new_tokens=6, min_new_tokens=2, length_penalty=0.5, repetition_penalty=1.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlm")
    return {kind: tiny_vlm.write(root / kind, kind) for kind in [*KINDS, "llava_next"]}


@pytest.fixture(scope="module")
def models(folders):
    return {kind: vlm.Vlm(str(folder), torch.float32, "cpu") for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    shapes = [(50, 70), (90, 40), (56, 56), (20, 130), (200, 60)]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def see(model: vlm.Vlm, pictures) -> torch.Tensor:
    return model.see(torch.stack([model.transform(picture) for picture in pictures]))


# --- answers


def theirs(model: vlm.Vlm, folder, pictures, prompts, settings: dict) -> list[str]:
    """transformers' own model, processor, chat template and generate, one picture at a time."""
    processor = hf.AutoProcessor.from_pretrained(folder)
    own, texts = hf.AutoModelForImageTextToText.from_pretrained(folder), []
    for picture, prompt in zip(pictures, prompts, strict=True):
        if "paligemma" in str(folder):
            given = processor(text=f"<image>{prompt}", images=picture, return_tensors="pt")
        else:
            turn = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
            options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
            if hasattr(processor.image_processor, "do_image_splitting"):
                options["processor_kwargs"] = {"do_image_splitting": False}
            chat = [{"role": "user", "content": turn}]
            given = processor.apply_chat_template(chat, **options)
        given = {name: value for name, value in given.items() if name != "labels"}
        out = own.generate(**given, **settings, do_sample=False, pad_token_id=1)
        new = out[0, given["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_answers_are_transformers_one_by_one(models, folders, pictures, kind, settings):
    """Unlike lengths in a batch, the same tokens, the same answers."""
    model = models[kind]
    expected = theirs(model, folders[kind], pictures, PROMPTS, settings)
    seen = see(model, pictures)
    for batch in (1, 2, 5):
        assert model.generate(seen, PROMPTS, settings, batch) == expected
    assert len(set(expected)) >= 4, expected  # they do depend on image and prompt


def test_llava_next_sees_one_view_and_a_line_break(models, pictures):
    """Its own packing of an image without tiles, of features picked and projected by hand."""
    model = models["llava_next"]
    inner, x = model.model.model, torch.stack([model.transform(picture) for picture in pictures])
    squashed = pictures[0].resize((56, 56), Image.Resampling.BICUBIC)  # the whole picture
    assert (x[0] - model.transform(squashed)).abs().max() < 0.05  # three grey levels
    hidden = inner.vision_tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]
    views = [inner.multi_modal_projector(f)[None] for f in hidden]
    expected, _ = inner.pack_image_features(views, [(56, 56)] * 5, "default", inner.image_newline)
    seen = model.see(x)
    torch.testing.assert_close(seen, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert seen.shape == (5, 17, 64) and len(set(model.generate(seen, PROMPTS, GREEDY))) >= 4
    assert any("without the tiles" in note for note in model.attach(None)[1])


# --- dW


def merged(folder, path) -> vlm.Vlm:
    """Another model with W + (alpha / rank) B A written into its q and v, by the rows of the file."""
    model, (header, state) = vlm.Vlm(str(folder), torch.float32, "cpu"), lora.read(path)
    vision = getattr(model.model.model, "vision_tower", None) or model.model.model.vision_model
    for i, layer in enumerate(vision.encoder.layers):
        A, B = (state[f"blocks.{i}.attn.qkv.lora_{part}"].chunk(2) for part in "AB")
        for projection, a, b in zip((layer.self_attn.q_proj, layer.self_attn.v_proj), A, B, strict=True):
            projection.weight.data += header["alpha"] / header["rank"] * b @ a
    return model


@pytest.mark.parametrize("kind", [*KINDS, "llava_next"])
def test_lora_in_the_whole_model_is_lora_in_its_tower(folders, pictures, kind, tmp_path):
    """A file of a fused qkv, switched on and off on one set of weights; and merged into another."""
    model = vlm.Vlm(str(folders[kind]), torch.float32, "cpu")
    plain = see(model, pictures)
    path = lora_file(tmp_path / "lora.safetensors", tiny_vlm.BLOCKS, tiny_vlm.WIDTH)
    set_M, notes = model.attach(path)
    idle = "dW of blocks.2. has no effect"
    assert any(f"{idle}: {kind} reads M after 2 of 3" in note for note in notes) == kind.startswith("llava")
    set_M("before")
    assert torch.equal(see(model, pictures), plain)
    set_M("after")
    tuned = see(model, pictures)
    assert (tuned - plain).norm() > 0.01 * plain.norm()
    expected = see(merged(folders[kind], path), pictures)
    torch.testing.assert_close(tuned, expected, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    answers = model.generate(tuned, PROMPTS, GREEDY)
    assert answers == merged(folders[kind], path).generate(expected, PROMPTS, GREEDY)
    set_M("before")
    assert answers != model.generate(see(model, pictures), PROMPTS, GREEDY)


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_the_exported_model_answers_as_the_tuned_one(folders, pictures, kind, tmp_path, run):
    """convert.py's folder, whose processor is copied, opened as any other."""
    path = lora_file(tmp_path / "lora.safetensors", tiny_vlm.BLOCKS, tiny_vlm.WIDTH)
    words = ["--to", "transformers", "--weights", folders[kind], "--lora", path]
    code, _, err = run("convert", "export", tmp_path / "out", *words)
    assert code == 0, err
    model = vlm.Vlm(str(folders[kind]), torch.float32, "cpu")
    set_M, _ = model.attach(path)
    set_M("after")
    exported = vlm.Vlm(str(tmp_path / "out"), torch.float32, "cpu")
    tuned, seen = see(model, pictures), see(exported, pictures)
    torch.testing.assert_close(seen, tuned, rtol=1e-3, atol=1e-3 * float(tuned.abs().max()))
    assert exported.generate(seen, PROMPTS, GREEDY) == model.generate(tuned, PROMPTS, GREEDY)


def test_dw_of_a_block_that_is_not_read_changes_nothing(folders, pictures, tmp_path):
    model = vlm.Vlm(str(folders["llava"]), torch.float32, "cpu")
    plain = see(model, pictures)
    set_M, _ = model.attach(lora_file(tmp_path / "lora.safetensors", tiny_vlm.BLOCKS, tiny_vlm.WIDTH))
    set_M("after")
    found = lora.parameters(model.model)
    for name, value in found.items():
        value.data[:] = value if "layers.2." in name else 0.0
    assert len(found) == 4 * tiny_vlm.BLOCKS and torch.equal(see(model, pictures), plain)


def test_half_precision_is_of_all_of_it(folders, models, pictures, tmp_path):
    model = vlm.Vlm(str(folders["llava"]), torch.bfloat16, "cpu")
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    set_M, _ = model.attach(lora_file(tmp_path / "lora.safetensors", tiny_vlm.BLOCKS, tiny_vlm.WIDTH))
    set_M("before")
    seen, exact = see(model, pictures), see(models["llava"], pictures)
    assert seen.dtype == torch.bfloat16 and (seen.float() - exact).norm() < 0.05 * exact.norm()  # 8 bits
    assert len(model.generate(seen, PROMPTS, GREEDY)) == 5
    model.model.model.multi_modal_projector.linear_2.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        see(model, pictures)


# --- bad input


def changed(folder, tmp_path, file: str, change) -> str:
    """A copy of a model's folder with a JSON file changed."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return str(copy)


def test_models_that_cannot_serve_are_refused_by_name(folders, tmp_path):
    def pixtral(config):
        config["vision_config"] = {"model_type": "pixtral", "hidden_size": 64, "num_attention_heads": 4}

    for change, told in (
        (lambda config: config.update(model_type="bert"), "is bert; supported are llava, llava_next, pali"),
        (pixtral, "its vision tower is pixtral; known are clip_vision_model"),
    ):
        with pytest.raises(ValueError, match=told):
            vlm.read(changed(folders["llava"], tmp_path, "config.json", change))
        shutil.rmtree(tmp_path / "changed")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a name on the hub"):
        vlm.read("absent")
    bare = shutil.copytree(folders["llava"], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template: put its authors' chat_template.jinja"):
        vlm.read(str(bare))
    (bare / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="bare: its processor: "):
        vlm.read(str(bare))


def test_processors_of_tiles_or_unlike_sizes_are_refused(folders, tmp_path):
    def tiles(config):
        config["image_processor"] |= {"image_processor_type": "LlavaNextImageProcessor"}
        config["image_processor"]["image_grid_pinpoints"] = [[56, 112], [112, 56]]

    def uncut(config):
        config["image_processor"]["do_center_crop"] = False

    for change, told in (
        (tiles, "cuts an image into tiles, here 3"),
        (uncut, r"unlike sizes: \(3, 56, 56\) and"),
    ):
        path = changed(folders["llava"], tmp_path, "processor_config.json", change)
        with pytest.raises(ValueError, match=told):
            vlm.read(path)
        shutil.rmtree(path)


def test_prompts_that_are_not_the_processors_are_refused(folders, pictures, tmp_path):
    two = tiny_vlm.template("USER: <image><image>\n{text} ASSISTANT:")
    copy = shutil.copytree(folders["llava"], tmp_path / "two")
    (copy / "chat_template.jinja").write_text(two)
    with pytest.raises(ValueError, match="two: its processor: "):
        vlm.read(str(copy))
    (copy / "chat_template.jinja").write_text(tiny_vlm.template("USER: {text} ASSISTANT:"))
    with pytest.raises(ValueError, match="two: its processor: "):
        vlm.read(str(copy))

    def fewer(config):
        config["patch_size"] = 28

    path = changed(folders["llava"], tmp_path, "processor_config.json", fewer)
    with pytest.raises(ValueError, match="M gives 16 tokens for 4 places in a prompt"):
        see(vlm.Vlm(path, torch.float32, "cpu"), pictures)


def test_questions_with_the_image_token_are_refused(models):
    with pytest.raises(ValueError, match="'what is <image>' has <image> in it, which stands for the image"):
        models["llava"].prompts("{}", ["why", "what is <image>"])


def test_fp16_is_not_for_weights_of_bf16(folders, models, tmp_path):
    path = changed(folders["llava"], tmp_path, "config.json", lambda c: c.update(dtype="bfloat16"))
    with pytest.raises(ValueError, match="whose range fp16 has not: pass --backbone-dtype bf16"):
        vlm.Vlm(path, torch.float16, "cpu")


def test_missing_weights_are_refused(folders, models, tmp_path):
    copy = shutil.copytree(folders["llava"], tmp_path / "copy")
    state = {k: v for k, v in models["llava"].model.state_dict().items() if "linear_2" not in k}
    models["llava"].model.save_pretrained(copy, state_dict=state)
    with pytest.raises(ValueError, match="2 weights are missing or do not fit"):
        vlm.Vlm(str(copy), torch.float32, "cpu")


@pytest.mark.parametrize("depth, width", [(tiny_vlm.BLOCKS + 1, 96), (tiny_vlm.BLOCKS - 1, 96), (3, 48)])
def test_lora_that_does_not_fit_is_refused(folders, tmp_path, depth, width):
    path = lora_file(tmp_path / "lora.safetensors", depth, width)
    with pytest.raises(
        ValueError, match=f"of {depth} blocks of width {width}, the tower of llava has 3 of 96"
    ):
        vlm.check(str(folders["llava"]), path, "vqav2")


# --- the scripts

FOLLOWING = {"prompt": "{}\nAnswer the question using a single word or phrase.", "max_new_tokens": 128}


@pytest.mark.parametrize("kind, prompt", [("llava", FOLLOWING["prompt"]), ("paligemma", "answer en {}")])
def test_authors_prompts_are_the_defaults(folders, kind, prompt):
    found = vlm.check(str(folders[kind]), None, "textvqa")
    assert found["prompt"] == prompt and found["beams"] == 1
    caption = vlm.check(str(folders["llava"]), None, "caption")["prompt"]
    assert caption == "Provide a one-sentence caption for the provided image."
    assert vlm.PROMPTS.keys() == {*KINDS, "llava_next"}


def test_m_runs_once_for_an_image_and_variant(folders, tmp_path, run, monkeypatch):
    """Of 15 questions on 5 images, before and after: counted in transformers' own tower."""
    seen, tower = [], hf.CLIPVisionModel.forward

    def counted(self, pixel_values, *args, **kwargs):
        seen.append(len(pixel_values))
        return tower(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(hf.CLIPVisionModel, "forward", counted)
    file = lora_file(tmp_path / "lora.safetensors", tiny_vlm.BLOCKS, tiny_vlm.WIDTH)
    options = [*write_set(tmp_path / "set"), "--vlm", folders["llava"], "--max-new-tokens", 5]
    code, out, err = run("eval_vqa", *options, "--compare", file, "--out", tmp_path / "out")
    assert code == 0 and "dW of blocks.2. has no effect" in out, err
    assert sum(seen) == 2 * 5 and len(seen) == 2 * 3  # batches of 2 images
    before, after = (answers_of(tmp_path / "out", variant) for variant in ("before", "after"))
    assert before != after and len({row["answer"] for row in before}) > 3
    model = vlm.Vlm(str(folders["llava"]), torch.float32, "cpu")  # each question alone, on its own image
    for q, row in zip(vqa.read("vqav2", options[3], options[5]), before, strict=True):
        picture = Image.open(tmp_path / "set/images" / q.image)
        asked = [f"{q.text}\nAnswer the question using a single word or phrase."]
        assert q.id == row["question_id"]
        assert model.generate(see(model, [picture]), asked, GREEDY | {"max_new_tokens": 5}) == [row["answer"]]
    result = json.loads((tmp_path / "out/result.json").read_text())
    protocol = result["protocol"]
    assert protocol["prompt"] == FOLLOWING["prompt"] and protocol["vlm"] == str(folders["llava"])
    assert protocol["generation"] | {"num_beams": 1, "max_new_tokens": 5} == protocol["generation"]
    assert protocol["chat"] == "USER: <image>\n{} ASSISTANT:"
    assert any(str(folders["llava"]) in path for path in result["sha256"])


def test_captions_are_asked_for_as_llava_does(folders, tmp_path, run):
    rng, items = np.random.default_rng(0), []
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
        items.append({"image": f"{i}.jpg", "caption": ["a red star near a bus"]})
    (tmp_path / "captions.json").write_text(json.dumps(items))
    options = ["--vlm", folders["llava"], "--images", tmp_path, "--captions", tmp_path / "captions.json"]
    options += ["--workers", 0, "--max-new-tokens", 6, "--out", tmp_path / "out"]
    code, _, err = run("eval_caption", *options)
    assert code == 0, err
    given = json.loads((tmp_path / "out/results_before.json").read_text())
    model = vlm.Vlm(str(folders["llava"]), torch.float32, "cpu")
    files = [Image.open(tmp_path / f"{i}.jpg") for i in range(3)]
    asked = ["Provide a one-sentence caption for the provided image."] * 3
    expected = model.generate(see(model, files), asked, GREEDY | {"max_new_tokens": 6})
    assert [row["caption"] for row in given] == expected


def test_one_model_and_pictures_are_needed(folders, tmp_path, run):
    options = write_set(tmp_path / "set")
    code, _, err = run("eval_vqa", *options, "--vlm", folders["llava"], "--blip2", "x/y")
    assert code == 2 and "not allowed with argument" in err
    code, _, err = run("eval_vqa", *options[:6], "--vlm", folders["llava"], "--out", tmp_path / "out")
    assert code == 2 and "--images are needed" in err
    (tmp_path / "set/images/COCO_val2014_000000000002.jpg").unlink()
    code, _, err = run("eval_vqa", *options, "--vlm", folders["llava"], "--out", tmp_path / "out")
    assert code == 2 and "1 of 5 images are not in" in err
