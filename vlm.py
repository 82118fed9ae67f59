"""LLaVA, PaliGemma and Idefics3 with a vision tower M that ViSFT has tuned; the rest of them stays as it was.

    vlm = Vlm("llava-hf/llava-1.5-7b-hf", torch.float16, "cuda")    # or a folder; asked as blip2.Blip2 is
    set_M, notes = vlm.attach("lora.safetensors")       # set_M("after"): M with dW; "before": as it was
    seen = vlm.see(images)                      # (B, Q, D_lm): M's tokens, as the language model sees them
    prompts, notes = vlm.prompts("{}\\nAnswer the question using a single word or phrase.", ["Why?"] * B)
    texts = vlm.generate(seen, prompts, GENERATION)

Models, processors and chat templates are transformers', beyond the paper. What is done here instead of in
their `generate`: M runs once per image however many questions go with it, and an image is seen as one view:
the tiles that LLaVA-NeXT and Idefics3 cut it into besides, which its features are not shared among, are not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

import lora
from blip2 import check_loading, finite, open_config, spare_block
from files import shown

CAPTION = "Provide a one-sentence caption for the provided image."
LLAVA = "{}\nAnswer the question using a single word or phrase.", CAPTION
IDEFICS = "{}\nGive a very brief answer.", CAPTION
# model type -> its authors' prompts for a short answer and for a caption; PAPER.md has their sources
PROMPTS = {"llava": LLAVA, "llava_next": LLAVA, "paligemma": ("answer en {}", "caption en")}
PROMPTS |= {"idefics3": IDEFICS, "smolvlm": IDEFICS}
TOWERS = "clip_vision_model", "siglip_vision_model", "idefics3_vision", "smolvlm_vision"  # SigLIP's, three


class Vlm:
    """A frozen image-text-to-text model of transformers'.

    path: a folder, or a name on the hub; dtype: of all of it, cast as it is read: never two copies
    transform: PIL image -> (3, h, w), by the model's own processor
    Raises FileNotFoundError, or ValueError for a model of another kind or weights that are not all there.
    """

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device | str):
        self.config, self.processor, self.image_tokens = read(path)
        if (dtype, self.config.dtype) == (torch.float16, torch.bfloat16):
            why = "its weights are bf16, whose range fp16 has not"
            raise ValueError(f"--vlm {path}: {why}: pass --backbone-dtype bf16")
        load = AutoModelForImageTextToText.from_pretrained
        self.model, loading = load(path, dtype=dtype, output_loading_info=True)
        check_loading("--vlm", path, loading)
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.kind = self.processor.tokenizer, self.config.model_type
        self.dtype, self.device = dtype, self.model.device
        self.files = [str(p) for p in sorted(Path(path).glob("*.safetensors"))]  # if it is a folder
        self.transform = partial(view, self.processor.image_processor)
        version = f"{path} {getattr(self.config, '_commit_hash', None) or ''}".strip()
        self.protocol = {"vlm": version, "chat": chat(self.processor, "{}"), "views of an image": 1}

    # --- M and dW

    def attach(self, path: str | Path | None) -> tuple[Callable[[str], None], list[str]]:
        """Load dW, if any, into M; returns a function that sets M to `before` or `after`, and notes.

        LLaVA reads M before its last block, whose dW has no effect. Raises ValueError if dW does not fit.
        """
        tower, notes = lora.attentions(self.model), []
        if path:
            lora.load(tower, path)
            depth, layers = len(tower["blocks"]), getattr(self.config, "vision_feature_layer", None)
            layers = [depth] if layers is None else [layers] if isinstance(layers, int) else layers
            read = max(layer % (depth + 1) for layer in layers)  # blocks; 0 is what goes into the first
            if read < depth:
                idle = f"dW of blocks.{read}." + f" to blocks.{depth - 1}." * (depth - read > 1)
                notes.append(
                    f"{path}: {idle} has no effect: {self.kind} reads M after {read} of {depth} blocks"
                )
        if self.kind in ("llava_next", "idefics3", "smolvlm"):
            notes.append(f"{self.kind}: an image is one view, without the tiles that its authors add")

        def set_M(variant: str) -> None:
            lora.switch(tower, on=variant == "after")

        return set_M, notes

    @torch.no_grad()
    def see(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, Q, D_lm): what the language model sees of the images, by M as it is set.

        Raises FloatingPointError, or ValueError if a prompt has places for another number of tokens.
        """
        x, inner = images.to(self.device, self.dtype), self.model.model
        if self.kind == "llava_next":  # its own wants tiles; without them it is LLaVA's, and a line break
            f = torch.stack([*LlavaModel.get_image_features(inner, x).pooler_output])
            f = torch.cat([f, inner.image_newline.expand(len(f), 1, -1)], 1)
        else:
            x = x[:, None] if self.kind in ("idefics3", "smolvlm") else x  # (B, 1, 3, h, w)
            f = torch.stack([*inner.get_image_features(x).pooler_output])
        if f.shape[1] != (places := self.image_tokens.count(self.config.image_token_id)):
            why = f"M gives {f.shape[1]} tokens for {places} places in a prompt"
            raise ValueError(f"{why}: is processor_config.json this model's?")
        return finite(f)

    # --- the language model behind M

    def prompts(self, template: str, questions: Sequence[str]) -> tuple[list[str], list[str]]:
        """The template with each question in the place of its {}; notes: none, nothing is cut.

        Raises ValueError for a question with the image token in it.
        """
        token = self.processor.image_token
        if other := [question for question in (template, *questions) if token in question]:
            raise ValueError(f"{shown(other[0])} has {token} in it, which stands for the image")
        return [template.replace("{}", question) for question in questions], []

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The chat, with as many image tokens as M has for an image, and what the processor puts around."""
        found = []
        for prompt in prompts:
            ids = tokenize(self.processor, prompt)
            at = ids.index(self.config.image_token_id)
            found.append(ids[:at] + self.image_tokens + ids[at + 1 :])
        return found

    @torch.no_grad()
    def generate(self, seen: Tensor, prompts: Sequence[str], settings: dict, batch: int = 16) -> list[str]:
        """The language model's answers.

        seen: (n, Q, D_lm); settings: of transformers' GenerationConfig; batch: prompts at a time
        """
        texts = []
        for at in range(0, len(prompts), batch):
            tokens = [torch.tensor(t) for t in self.prompt_tokens(prompts[at : at + batch])]
            generation = self._generation(settings)
            ids = pad_sequence(tokens, True, generation.pad_token_id, "left").to(self.device)  # (b, T)
            mask = pad_sequence([torch.ones_like(t) for t in tokens], True, 0, "left").to(self.device)
            f = seen[at : at + batch]  # what transformers' own would compute anew for each prompt
            f = BaseModelOutputWithPooling(pooler_output=f if self.kind == "paligemma" else [*f])
            given = dict(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": f})
            if self.kind == "paligemma":  # a prompt attends to all of itself
                given["token_type_ids"] = torch.zeros_like(ids)
            out = self.model.generate(**given, generation_config=generation)
            texts += self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _generation(self, settings: dict) -> GenerationConfig:
        own = self.model.generation_config
        stop = self.tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else stop[0] if isinstance(stop, list) else stop
        return GenerationConfig(do_sample=False, eos_token_id=stop, pad_token_id=pad, **settings)


# --- what can be refused before anything is loaded


def check(path: str, lora_file: str | None, kind: str) -> dict:
    """Refuse what cannot work; returns the authors' prompt and decoding for questions, or kind `caption`.

    All of them decode greedily; LLaVA's scripts write at most 128 tokens.
    """
    config, *_ = read(path)
    if lora_file:
        spare_block(lora_file, config, spare=0)
    prompt = PROMPTS[config.model_type][kind == "caption"]
    return {"prompt": prompt, "beams": 1, "min_new_tokens": 0, "max_new_tokens": 128, "length_penalty": 1.0}


def read(path: str) -> tuple[transformers.PretrainedConfig, ProcessorMixin, list[int]]:
    """The model's config and processor, and the tokens of an image, before anything else is loaded.

    Raises as Vlm does.
    """
    config = open_config("--vlm", path, "llava-hf/llava-1.5-7b-hf")
    if config.model_type not in PROMPTS:
        raise ValueError(f"--vlm {path} is {config.model_type}; supported are {', '.join(PROMPTS)}")
    if (tower := config.vision_config.model_type) not in TOWERS:
        raise ValueError(f"--vlm {path}: its vision tower is {tower}; known are {', '.join(TOWERS)}")
    try:
        processor = AutoProcessor.from_pretrained(path)
        if config.model_type != "paligemma" and not processor.chat_template:
            raise ValueError("no chat template: put its authors' chat_template.jinja beside config.json")
        if hasattr(processor.image_processor, "do_image_splitting"):
            processor.image_processor.do_image_splitting = False
        check_views(config, processor)
        return config, processor, find_image_tokens(config, processor)
    except Exception as error:  # files that are not there, packages that it needs, templates of others
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--vlm {path}: its processor: {why}") from error


def check_views(config: transformers.PretrainedConfig, processor: ProcessorMixin) -> None:
    """Raises ValueError if images become tiles, which LLaVA-NeXT's alone may, or of unlike sizes."""
    views = [_views(processor.image_processor, Image.new("RGB", size)) for size in ((64, 64), (320, 64))]
    if config.model_type != "llava_next" and max(map(len, views)) > 1:
        raise ValueError(f"it cuts an image into tiles, here {len(views[1])}")
    if views[0].shape[1:] != views[1].shape[1:]:
        shapes = " and ".join(str(tuple(v.shape[1:])) for v in views)
        raise ValueError(f"it makes images of unlike sizes: {shapes}")


def find_image_tokens(config: transformers.PretrainedConfig, processor: ProcessorMixin) -> list[int]:
    """What the processor puts in the place of the image token.

    Raises ValueError if the rest of a prompt is not as `chat` has it.
    """
    picture, image_token = Image.new("RGB", (64, 48)), config.image_token_id
    if config.model_type == "paligemma":
        theirs = processor(text=f"{processor.image_token}Why?", images=picture)
    else:
        options = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
        theirs = processor.apply_chat_template(turn("Why?", picture), **options)
    whole, ids = [int(i) for i in theirs["input_ids"][0]], tokenize(processor, "Why?")
    at = ids.index(image_token) if ids.count(image_token) == 1 else 0
    end = len(whole) - (len(ids) - at - 1)
    if whole[:at] + ids[at : at + 1] + whole[end:] != ids or image_token not in whole[at:end]:
        raise ValueError("it makes other prompts of a chat than its tokenizer alone")
    if config.model_type == "llava_next":  # one view, and a line break
        vision = config.vision_config
        return [image_token] * ((vision.image_size // vision.patch_size) ** 2 + 1)
    return whole[at:end]


# --- prompts and images


def chat(processor: ProcessorMixin, prompt: str) -> str:
    """The prompt as the model has learned it: in its chat template, or PaliGemma's own form."""
    if isinstance(processor, transformers.PaliGemmaProcessor):
        return f"{processor.image_token}{processor.tokenizer.bos_token}{prompt}\n"
    return processor.apply_chat_template(turn(prompt), add_generation_prompt=True)


def tokenize(processor: ProcessorMixin, prompt: str) -> list[int]:
    """The chat's tokens, with one for the image."""
    text, bos = chat(processor, prompt), processor.tokenizer.bos_token
    return processor.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids


def turn(prompt: str, picture: Image.Image | None = None) -> list[dict]:
    """A user's turn of an image and a text, as chat templates take it."""
    image = {"type": "image"} if picture is None else {"type": "image", "image": picture}
    return [{"role": "user", "content": [image, {"type": "text", "text": prompt}]}]


def view(processor, image: Image.Image) -> Tensor:
    """(3, h, w): the whole image, as an image processor has it before any tiles."""
    return _views(processor, image)[0]


def _views(processor, image: Image.Image) -> Tensor:
    """(n, 3, h, w), the whole image first."""
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    return pixels.flatten(0, -4)
