#!/usr/bin/env python3
"""Distil from a teacher of a published family at its true widths into a CLIP + Qwen2.5-0.5B-shaped student, with few layers.

    pip install -e .[test,vocabularies]                       # real vocabularies; of the others the true size is built
    python scripts/bench/families.py smolvlm                  # draws the data, builds the models, trains 20 steps, prints a row
    python scripts/bench/families.py --list
    python scripts/bench/families.py --table                  # docs/results/families.md's table of all rows so far

Random weights: what is shown is that configuration, processor, chat template, vocabulary, lengths and losses go together at the
sizes at which people use them, not what such a model would teach. Data: 64 drawn photographs of 64 x 64 to 4000 x 3000
pixels, one row without a picture, one of several turns, one whose picture is broken. What is trained, how much of it and what is
left out is read from the run's own files, and the script ends with 1 where the loss does not fall or a sample is missing without
a reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402

from mmkd.towers.templates import CHAT_TEMPLATES  # noqa: E402

STEPS, BATCH = 20, 2
SIZES = [(64, 64), (96, 320), (640, 480), (1024, 768), (800, 1333), (1920, 1080), (3024, 4032), (4000, 3000)]
TEMPLATES = ROOT / "tests" / "chat_templates"
QWEN = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
)  # fmt: skip
QWEN_ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN_NAMES = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>", "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 2, "patch_size": 14}  # fmt: skip
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Family:
    """One published model: configuration with its own widths and few layers, vocabulary, template and processor.

    of: the model whose widths these are.  control: its control tokens, behind the `size` words of `vocabulary` (and `fill`).
    names: what configuration, tokenizer and processor call them.  keys: what a user gives the teacher in the recipe.
    stop: what ends an answer, where that is not the eos token alone.  adds_bos: whether the tokenizer begins a text with its bos.
    """

    of: str
    kind: str
    config: dict[str, Any]
    template: str
    image_processor: tuple[str, dict[str, Any]]
    processor: tuple[str, dict[str, Any]]
    video_processor: str | None = None
    vocabulary: str = "qwen"
    size: int = 151643
    fill: int = 0
    control: tuple[str, ...] = QWEN
    ends: dict[str, str] = field(default_factory=lambda: dict(QWEN_ENDS))
    names: dict[str, str] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    adds_bos: bool = False


def _qwen_text(width: int, inner: int, heads: int, pairs: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "num_key_value_heads": pairs,
        "num_hidden_layers": 1, "vocab_size": 151936, "max_position_embeddings": 32768,
        "tie_word_embeddings": True, **more}  # fmt: skip


def _mrope(*section: int, theta: float = 1e6, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section), **more}}


_QWEN_VL: dict[str, Any] = {
    "processor": ("Qwen2VLProcessor", {}), "video_processor": "Qwen2VLVideoProcessor", "template": "qwen2_vl",
    "names": QWEN_NAMES, "keys": {"processor": {"max_pixels": 100352}},
}  # fmt: skip
_ONEVISION = (*QWEN[:3], "<image>", "<video>")

FAMILIES = {
    "llava-1.5": Family(
        "LLaVA-1.5-7B", "llava",
        {
            "text_config": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
                "num_hidden_layers": 1, "vocab_size": 32064, "max_position_embeddings": 4096},
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14,
                "num_attention_heads": 16, "num_hidden_layers": 3, "image_size": 336, "projection_dim": 768},
        },
        "llava", ("CLIPImageProcessor", {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
        ("LlavaProcessor", {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
        vocabulary="sentencepiece", size=32000, control=("<unk>", "<s>", "</s>", "<image>", "<pad>"),
        ends={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        names={"image_token": "<image>"}, adds_bos=True,
    ),
    "llava-onevision": Family(
        "LLaVA-OneVision-0.5B", "llava_onevision",
        {"text_config": {"model_type": "qwen2", **_qwen_text(896, 4864, 14, 2, vocab_size=152000)},
         "vision_config": {**SIGLIP, "image_size": 384, "vision_use_head": False}, "tie_word_embeddings": True},
        "llava_onevision", ("LlavaOnevisionImageProcessor", {}),
        ("LlavaOnevisionProcessor", {"num_image_tokens": 729, "vision_feature_select_strategy": "full"}),
        video_processor="LlavaOnevisionVideoProcessor", control=_ONEVISION,
        names={"image_token": "<image>", "video_token": "<video>"},
        keys={"processor": {"image_grid_pinpoints": [[384, 384]]}},
    ),
    "qwen2-vl": Family(
        "Qwen2-VL-2B", "qwen2_vl",
        {"text_config": {**_qwen_text(1536, 8960, 12, 2), **_mrope(16, 24, 24)}, "tie_word_embeddings": True,
         "vision_config": {"depth": 2, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16}},
        image_processor=("Qwen2VLImageProcessor", {}), **_QWEN_VL,
    ),
    "qwen2.5-vl": Family(
        "Qwen2.5-VL-3B", "qwen2_5_vl",
        {"text_config": {**_qwen_text(2048, 11008, 16, 2), **_mrope(16, 24, 24)}, "tie_word_embeddings": True,
         "vision_config": {"depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
            "fullatt_block_indexes": [1]}},
        image_processor=("Qwen2VLImageProcessor", {}), **{**_QWEN_VL, "processor": ("Qwen2_5_VLProcessor", {})},
    ),
    "qwen3-vl": Family(
        "Qwen3-VL-2B", "qwen3_vl",
        {"text_config": {**_qwen_text(2048, 6144, 16, 8, head_dim=128),
            **_mrope(24, 20, 20, theta=5e6, mrope_interleaved=True)},
         "tie_word_embeddings": True,
         "vision_config": {"depth": 2, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
            "patch_size": 16, "deepstack_visual_indexes": [0]}},
        image_processor=("Qwen2VLImageProcessor", {"patch_size": 16, "min_pixels": 65536, "max_pixels": 16777216,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}),
        **{**_QWEN_VL, "processor": ("Qwen3VLProcessor", {}), "video_processor": "Qwen3VLVideoProcessor", "template": "qwen3_vl"},
    ),
    "internvl3": Family(
        "InternVL3-2B", "internvl",
        {"text_config": {"model_type": "qwen2", **_qwen_text(1536, 8960, 12, 2, vocab_size=151675, tie_word_embeddings=False)},
         "vision_config": {"model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096,
            "image_size": [448, 448], "num_attention_heads": 16, "num_hidden_layers": 2, "patch_size": [14, 14]}},
        "internvl3", ("GotOcr2ImageProcessor", {"crop_to_patches": True, "max_patches": 12, "min_patches": 1,
            "size": {"height": 448, "width": 448}}),
        ("InternVLProcessor", {"image_seq_length": 256}), video_processor="InternVLVideoProcessor",
        control=(*QWEN, "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
            "<video>"),
        names={"image_token": "<IMG_CONTEXT>", "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>",
            "end_image_token": "</img>", "video_token": "<video>"},
        keys={"processor": {"crop_to_patches": False}},
    ),
    "smolvlm": Family(
        "SmolVLM2-2.2B", "smolvlm",
        {"text_config": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_key_value_heads": 32, "num_hidden_layers": 1, "vocab_size": 49280, "max_position_embeddings": 8192},
         "vision_config": {**SIGLIP, "model_type": "smolvlm_vision", "image_size": 384}, "scale_factor": 3},
        "smolvlm", ("SmolVLMImageProcessor", {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}),
        ("SmolVLMProcessor", {"image_seq_len": 81}), video_processor="SmolVLMVideoProcessor", size=49152,
        control=("<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>",
            *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))),
        ends={"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"},
        names={"image_token": "<image>"}, keys={"processor": {"do_image_splitting": False}},
    ),
    "paligemma": Family(
        "PaliGemma-3B-224", "paligemma",
        {"text_config": {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
            "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 1, "vocab_size": 257216},
         "vision_config": {**SIGLIP, "image_size": 224, "vision_use_head": False, "projection_dim": 2048},
         "projection_dim": 2048},
        "paligemma", ("SiglipImageProcessor", {"size": {"height": 224, "width": 224}, "image_seq_length": 256}),
        ("PaliGemmaProcessor", {}), vocabulary="sentencepiece", size=32000, fill=256000,
        control=(*GEMMA.values(), *(f"<loc{n:04}>" for n in range(1024)), *(f"<seg{n:03}>" for n in range(128)), "<image>"),
        ends=GEMMA, names={"image_token": "<image>"}, keys={"chat_template": "paligemma"}, stop=("<eos>",),
    ),
    "gemma-3": Family(
        "Gemma-3-4B", "gemma3",
        {"text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "num_hidden_layers": 1, "vocab_size": 262208, "sliding_window": 1024},
         "vision_config": {**SIGLIP, "num_hidden_layers": 1, "image_size": 896, "vision_use_head": False},
         "mm_tokens_per_image": 256},
        "gemma3", ("Gemma3ImageProcessor", {"size": {"height": 896, "width": 896}, "image_seq_length": 256}),
        ("Gemma3Processor", {"image_seq_length": 256}), vocabulary="sentencepiece", size=32000, fill=262000,
        control=(*GEMMA.values(), "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        ends=GEMMA, stop=("<eos>", "<end_of_turn>"), adds_bos=True,
        names={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    ),
}  # fmt: skip


# ---- models ----------------------------------------------------------------------------------------------------------


def build_teacher(family: Family, folder: Path) -> None:
    """Writes the family's folder as its publishers lay it out, with random weights, and beside it how many there are."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = _tokenizer(family.vocabulary, family.size, family.fill, family.control, family.ends, family.names)
    if family.adds_bos:
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in {**family.ends, **family.names}.items()}
    config = AutoConfig.for_model(family.kind, **_with_ids(family, ids))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # Gemma 3 begins with a projection of zeros
            torch.nn.init.normal_(parameter, std=0.02)
    stop = tokenizer.convert_tokens_to_ids(list(family.stop)) or tokenizer.eos_token_id
    for name, value in {"eos_token_id": stop, "bos_token_id": ids.get("bos_token"), "pad_token_id": ids["pad_token"]}.items():
        setattr(model.generation_config, name, value)
    name, options = family.image_processor
    parts = {"image_processor": getattr(transformers, name)(**options), "tokenizer": tokenizer}
    if family.video_processor is not None:
        parts["video_processor"] = getattr(transformers, family.video_processor)()
    name, options = family.processor
    processor = getattr(transformers, name)(**parts, **options)
    file = TEMPLATES / f"{family.template}.jinja"
    if file.is_file():  # PaliGemma is published without one
        processor.chat_template = tokenizer.chat_template = file.read_text(encoding="utf-8")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    (folder.parent / "parameters.json").write_text(json.dumps(count), encoding="utf-8")


def _with_ids(family: Family, ids: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with the vocabulary's ids, under each name that the family's configuration has for them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[family.kind]().to_dict()
    keys = {f"{name}_{end}": number for name, number in ids.items() for end in ("id", "index")}
    ends = {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token") if name in ids}
    text = {**family.config["text_config"], **ends}
    return {**family.config, "text_config": text, **{key: number for key, number in keys.items() if key in known}}


def build_student_parts(folder: Path) -> None:
    """CLIP's vision encoder at B/16's widths and a language model at those of Qwen2.5-0.5B, two layers each."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

    if (folder / "language" / "tokenizer_config.json").exists():
        return
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(patch_size=16, num_hidden_layers=2)).save_pretrained(folder / "vision")
    CLIPImageProcessor().save_pretrained(folder / "vision")
    tokenizer = _tokenizer("qwen", 151643, 0, QWEN, QWEN_ENDS, {})
    config = Qwen2Config(**{**_qwen_text(896, 4864, 14, 2), "num_hidden_layers": 2}, eos_token_id=tokenizer.eos_token_id)
    Qwen2ForCausalLM(config).save_pretrained(folder / "language")
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    tokenizer.save_pretrained(folder / "language")


def _tokenizer(
    name: str, size: int, fill: int, control: tuple[str, ...], ends: Mapping[str, str], names: Mapping[str, str]
) -> Any:  # fmt: skip
    from vocabularies import vocabulary

    try:
        return vocabulary(name, size=size, fill=fill, control=control, named=names, **ends)
    except BaseException as error:  # the tests' skip, which is no Exception
        raise SystemExit(str(error)) from None


# ---- data ------------------------------------------------------------------------------------------------------------


def draw_data(folder: Path) -> int:
    """64 photographs with a question each, a row without a picture, one of two turns, a broken picture; how many rows."""
    pictures = folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(64):
        name, colour = f"photo_{number:02}.jpg", ("red", "green", "blue", "yellow")[number % 4]
        if not (pictures / name).exists():
            _photograph(SIZES[number % len(SIZES)], colour, rng).save(pictures / name, quality=85)
        rows.append(_row(number, name, [("What colour is the large disc?", f"The large disc is {colour}.")]))
    rows.append(_row(64, None, [("Which colour do red and green light make?", "Together they make yellow.")]))
    talk = [("What colour is the large disc?", "The large disc is red."), ("And what lies behind it?", "A noisy slope of grey.")]
    rows.append(_row(65, "photo_00.jpg", talk))
    (pictures / "broken.jpg").write_bytes((pictures / "photo_02.jpg").read_bytes()[:2000])
    rows.append(_row(66, "broken.jpg", [("What colour is the large disc?", "The large disc is blue.")]))
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return len(rows)


def _photograph(size: tuple[int, int], colour: str, rng: np.random.Generator) -> Image.Image:
    """A slope of grey with noise as a sensor has it, and a disc."""
    width, height = size
    slope = np.linspace(60, 190, width)[None, :] * np.linspace(0.7, 1.1, height)[:, None]
    noise = rng.normal(0, 8, (height, width)).astype(np.float32)
    grey = (slope + noise).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(np.repeat(grey[..., None], 3, axis=2))
    side = min(size)
    left, top = int(rng.integers(0, width - side // 2)), int(rng.integers(0, height - side // 2))
    ImageDraw.Draw(picture).ellipse((left, top, left + side // 2, top + side // 2), fill=colour)
    return picture


def _row(number: int, picture: str | None, talk: Sequence[tuple[str, str]]) -> dict[str, Any]:
    turns = [{"from": speaker, "value": text} for pair in talk for speaker, text in zip(("human", "gpt"), pair, strict=True)]
    if picture is None:
        return {"id": str(number), "conversations": turns}
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return {"id": str(number), "image": picture, "conversations": turns}


# ---- the run ---------------------------------------------------------------------------------------------------------


def recipe_of(name: str, family: Family, output: Path) -> dict[str, Any]:
    """What a user would write for this pair."""
    same = family.vocabulary == "qwen" and family.size == 151643
    spans = {} if same else {"alignment": "spans"}
    vision, language = f"local-dir:{output / 'student/vision'}", str(output / "student/language")
    return {
        "title": f"{family.of}'s widths into CLIP + Qwen2.5-0.5B's",
        "output": str(output / name / "run"),
        "teacher": {"model": str(output / name / "teacher"), "dtype": "float32", **spans, **family.keys},
        "student": {"assemble": {"vision": {"source": vision}, "language": {"source": language}}},
        "stages": {"distil": {
            "data": [{"format": "llava", "root": str(output / "data"), "files": {"images": "images"}}],
            "terms": {"cross_entropy": 1.0, "teacher": {"kind": "forward_kl" if same else "spans"}},
            "steps": STEPS, "optimiser": {"batch_size": BATCH, "learning_rate": 1.0e-3}, "log_every": 1,
        }},
        "control": False,
        "guards": {"teacher_is_better": False, "samples": 2},  # random weights teach nothing
    }  # fmt: skip


def run(name: str, family: Family, output: Path) -> dict[str, Any]:
    """Builds the models, trains; returns the row of the table."""
    folder = output / name
    rows = draw_data(output / "data")
    apart(build_student_parts, output / "student")
    print(f"{name}: building {family.of}'s widths", flush=True)
    if not (folder / "parameters.json").exists():
        apart(build_teacher, family, folder / "teacher")
    recipe = recipe_of(name, family, output)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    started = time.monotonic()
    peak = apart(distil, folder)
    return {
        "family": name, "of": family.of, "parameters": json.loads((folder / "parameters.json").read_text(encoding="utf-8")),
        "vocabulary": family.config["text_config"]["vocab_size"], "keys": family.keys, "rows": rows,
        "term": recipe["stages"]["distil"]["terms"]["teacher"]["kind"],
        "seconds": round(time.monotonic() - started), "peak_gb": round(peak / 2**20, 1),
    } | json.loads((folder / "lengths.json").read_text(encoding="utf-8")) | _training(folder / "run")  # fmt: skip


def apart(function: Callable[..., Any], *arguments: Any) -> int:
    """Calls it in a process of its own, so that its memory is its own; that memory's peak in KiB."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            function(*arguments)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            print("" if isinstance(error.code, int) else error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{function.__name__} ends with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss


def distil(folder: Path) -> None:
    """The command `mmkd distill`, which also writes how long the samples are that it prepares before training: all of them."""
    from mmkd.cli import main as command
    from mmkd.runs import run as runs
    from mmkd.runs import survey

    survey.SECONDS = survey.SECONDS_OF_LARGE = 300.0
    look = runs.preflight

    def looked(*arguments: Any, **options: Any) -> Any:
        surveys = look(*arguments, **{**options, "most": 1000})
        lengths = surveys["distil"][0].lengths
        found = {f"{role}_tokens": np.quantile(of.tokens, (0, 0.5, 1)).astype(int).tolist() for role, of in lengths.items()}
        (folder / "lengths.json").write_text(json.dumps(found), encoding="utf-8")
        print("\n".join(surveys["distil"][0].lines()), flush=True)
        return surveys

    runs.preflight = looked
    raise SystemExit(command(["distill", str(folder / "recipe.yaml"), "--restart"]))


def _training(folder: Path) -> dict[str, Any]:
    """Loss at the beginning and the end, and what was left out, from the files of a run."""
    log = [json.loads(line) for line in (folder / "log/student.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    skipped = folder / "log/student_skipped.jsonl"
    left_out = [json.loads(line) for line in skipped.read_text(encoding="utf-8").splitlines()] if skipped.exists() else []
    return {"first": float(np.mean(losses[:5])), "last": float(np.mean(losses[-5:])), "steps": len(losses),
        "left_out": [{"id": row.get("id"), "reason": row.get("reason")} for row in left_out]}  # fmt: skip


def problems(row: Mapping[str, Any]) -> list[str]:
    """What a row shows that should not be."""
    found = [] if row["last"] < row["first"] else [f"the loss does not fall: {row['first']:.3f} to {row['last']:.3f}"]
    if row["steps"] != STEPS:
        found.append(f"{row['steps']} of {STEPS} steps")
    if [each["id"] for each in row["left_out"]] != ["66"]:
        found.append(f"left out is {row['left_out']}; it should be the broken picture's row, 66, alone")
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown."""
    lines = [
        "| family | widths of | parameters here | vocabulary | keys of the teacher | term | tokens, teacher | tokens, student "
        "| left out | loss | peak memory | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tokens = [" / ".join(f"{number:,}" for number in row.get(f"{role}_tokens", [])) for role in ("teacher", "student")]
        out = ", ".join(f"{each['id']} ({each['reason'].partition(':')[0]})" for each in row["left_out"])
        keys = yaml.safe_dump(row["keys"], default_flow_style=True, width=1000).strip()[1:-1]
        keys = f"`{keys}`" if keys else ""
        lines.append(
            f"| `{row['family']}` | {row['of']} | {row['parameters'] / 1e6:,.0f} M | {row['vocabulary']:,} | {keys} "
            f"| {row['term']} | {tokens[0]} | {tokens[1]} | {out} | {row['first']:.2f} → {row['last']:.2f} "
            f"| {row['peak_gb']} GB | {row['seconds']} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all of them when none is named, one after the other")
    parser.add_argument("--output", type=Path, default=Path("runs/families"))
    parser.add_argument("--list", action="store_true", help="the families")
    parser.add_argument("--table", action="store_true", help="the table of all rows so far")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.families if name not in FAMILIES]:
        parser.error(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    if given.list:
        print("\n".join(f"{name:<16} {family.of}" for name, family in FAMILIES.items()))
        return 0
    output = given.output.resolve()
    if given.table:
        kept = [output / name / "row.json" for name in FAMILIES]
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in kept if path.exists()]))
        return 0
    wrong = []
    for name in given.families or FAMILIES:
        row = run(name, FAMILIES[name], output)
        (output / name / "row.json").write_text(json.dumps(row, indent=1), encoding="utf-8")
        print(table([row]), flush=True)
        wrong += [f"{name}: {problem}" for problem in problems(row)]
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
