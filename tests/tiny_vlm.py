"""Random LLaVAs and their kin of some 300,000 parameters with their processors: no download."""

from pathlib import Path

import torch
import transformers as hf

from tests.tiny_blip2 import byte_tokenizer

SIDE, BLOCKS, WIDTH = 56, 3, 96  # of the tower; 4 x 4 patches
CHATS = {
    "llava": "USER: <image>\n{text} ASSISTANT:",
    "idefics3": "<|im_start|>User:<image>{text}<end_of_utterance>\nAssistant:",
}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ '@'.replace('{text}', c['text']) }}{% endif %}{% endfor %}{% endfor %}"
)


def template(chat: str) -> str:
    """A chat template that writes one turn of an image and a text so."""
    return TEMPLATE.replace("@", chat.replace("\n", "\\n"))


def write(path: str | Path, kind: str = "llava", seed: int = 1, width: int = 64, layers: int = 2) -> Path:
    """A model folder. kind: llava, llava_next, paligemma, idefics3 or smolvlm.

    width, layers: of the language model
    """
    extra = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>"]
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    if kind in ("idefics3", "smolvlm"):
        names |= dict(bos_token="<|im_start|>", eos_token="<end_of_utterance>")
    start = "$A" if kind == "paligemma" else f"{names['bos_token']} $A"
    tokenizer = byte_tokenizer(["<s>", "<pad>", "</s>", "<unk>", *extra], start, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *extra]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    text = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, vocab_size=512)
    text |= dict(
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, head_dim=width // 4
    )
    text |= dict(pad_token_id=1, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id)
    vision = dict(hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=4, intermediate_size=64)
    side, patch = (16, 4) if kind == "smolvlm" else (SIDE, 14)  # transformers 5.20: as many tokens as pixels
    vision |= dict(image_size=side, patch_size=patch)
    crop = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    if kind in ("llava", "llava_next"):
        vision = hf.CLIPVisionConfig(**vision)
        config_class = hf.LlavaConfig if kind == "llava" else hf.LlavaNextConfig
        more = dict(image_grid_pinpoints=[[56, 112], [112, 56]]) if kind == "llava_next" else {}
        config = config_class(
            vision_config=vision, text_config=hf.LlamaConfig(**text), image_token_index=image_token, **more
        )
        images = (
            hf.CLIPImageProcessor(**crop) if kind == "llava" else hf.LlavaNextImageProcessor(**crop, **more)
        )
        processor_class = hf.LlavaProcessor if kind == "llava" else hf.LlavaNextProcessor
        options = dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
        processor = processor_class(images, tokenizer, chat_template=template(CHATS["llava"]), **options)
    elif kind == "paligemma":
        vision = hf.SiglipVisionConfig(**vision, vision_use_head=False, projection_dim=width)
        config = hf.PaliGemmaConfig(
            vision_config=vision,
            text_config=hf.GemmaConfig(**text),
            image_token_index=image_token,
            projection_dim=width,
        )
        images = hf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
        images.image_seq_length = 16
        processor = hf.PaliGemmaProcessor(images, tokenizer)
    else:
        classes = (hf.Idefics3VisionConfig, hf.Idefics3Config)
        if kind == "smolvlm":
            classes = (hf.SmolVLMVisionConfig, hf.SmolVLMConfig)
        config = classes[1](
            vision_config=classes[0](**vision).to_dict(), text_config=hf.LlamaConfig(**text).to_dict(),
            scale_factor=2, image_token_id=image_token, pad_token_id=1,
        )  # fmt: skip
        sizes = dict(size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side})
        images = hf.Idefics3ImageProcessor(**sizes)
        chat = template(CHATS["idefics3"])
        processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=chat)
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    for name, p in model.named_parameters():
        if "vision" not in name and p.ndim > 1:  # else the language model hardly sees the image
            torch.nn.init.normal_(p, std=1.0 if "proj" in name and "self_attn" not in name else 0.3)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return Path(path)
