"""Students as llama.cpp reads them: the language model (text.gguf), and encoder with projector (mmproj.gguf).

Written through the package `gguf`, tensor by tensor. What llama.cpp would compute otherwise is refused here, with the way out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from mmkd.errors import TowerError
from mmkd.towers.quantise import BLOCK
from mmkd.towers.tower import Tower

TEXT, PICTURES = "text.gguf", "mmproj.gguf"
ROTATED_IN_PAIRS = ("llama",)  # llama.cpp turns neighbouring numbers of a head for these, and halves for the others
ARCHITECTURES = ("llama", "qwen2", "qwen3")
LOSSY = {"f32": None, "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # formats of matrices, by gguf's names
# How llama.cpp calls the rule by which a byte-level tokenizer cuts words, by a piece of its pattern; ours have GPT-2's.
CUTS = {r"\p{N}{1,3}": "llama-bpe", r"\p{N}|": "qwen2"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
VISION_LAYER = {  # llama.cpp calls the first matrix of an encoder's feed-forward layer "down"
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1", "layer_norm2": "ln2", "mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up",
}  # fmt: skip


def refusals(tower: Tower) -> list[str]:
    """Why llama.cpp cannot run a student as transformers does, each with the way out; [] where it can."""
    config = tower.model.config
    if config.model_type != "llava":
        return [f"a model of type {config.model_type!r} is not put together by mmkd; convert it with llama.cpp's own script"]
    text, vision, found = config.get_text_config(), config.vision_config, []
    if text.model_type not in ARCHITECTURES:
        found.append(f"the language model is a {text.model_type}; take one of {', '.join(ARCHITECTURES)}")
    if vision.model_type == "clip_vision_model":
        found.append("llama.cpp puts CLIP's class token behind the patches, so that such encoders come out wrong; take a SigLIP")
    elif vision.model_type != "siglip_vision_model":
        found.append(f"the encoder is a {vision.model_type}, of which llama.cpp's LLaVA knows nothing; take a SigLIP")
    projector = getattr(tower.base, "multi_modal_projector", None)
    if not all(isinstance(getattr(projector, name, None), nn.Linear) for name in ("linear_1", "linear_2")):
        found.append("its projector is no MLP of two matrices; take `projector: mlp`")
    elif config.projector_hidden_act != "gelu":
        found.append(f"between its projector's matrices stands {config.projector_hidden_act}, not GELU; take `projector: mlp`")
    if not isinstance(config.vision_feature_layer, int):
        found.append(f"it reads several layers of its encoder ({config.vision_feature_layer}); take one")
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        found.append(f"its positions are scaled ({rope}); convert it with llama.cpp's own script")
    scale, cap = tower.logit_rule
    if scale != 1 or cap is not None:
        found.append(f"its logits are scaled or capped ({scale}, {cap})")
    backend = _backend(tower)
    if backend["model"]["type"] != "BPE" or "ByteLevel" not in json.dumps(backend["pre_tokenizer"]):
        found.append("its tokenizer is no byte-level BPE; convert it with llama.cpp's own script")
    return found


def write_gguf(tower: Tower, folder: Path, form: str = "f32") -> list[str]:
    """Writes TEXT and PICTURES into `folder`; returns what stays in float32 although `form` is a smaller format.

    form: of LOSSY, for the language model's matrices; embeddings and head are at least float16, norms and encoder float32.
    Raises TowerError for a student that llama.cpp would run otherwise than transformers.
    """
    if found := refusals(tower):
        raise TowerError("llama.cpp cannot run this model: " + "; and ".join(found))
    folder.mkdir(parents=True, exist_ok=True)
    left = _write_text(tower, folder / TEXT, form)
    _write_pictures(tower, folder / PICTURES)
    return left


# ---- language model --------------------------------------------------------------------------------------------------


def _write_text(tower: Tower, path: Path, form: str) -> list[str]:
    import gguf

    text = tower.model.config.get_text_config()
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, text.model_type)
    heads, width = text.num_attention_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_theta") or getattr(text, "rope_theta", 10000.0)
    writer.add_file_type({"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}[form])
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(float(rope))
    writer.add_vocab_size(len(tower.head.weight))
    _add_vocabulary(writer, tower)
    left = []
    for name, tensor in _text_tensors(tower, heads, text):
        kind = _kind(name, tensor, form)
        if kind is None:
            writer.add_tensor(name, tensor)
            if form in ("q4_0", "q8_0") and tensor.ndim == 2 and name.startswith("blk."):
                left.append(name)
        else:
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    _close(writer, part, path)
    return left


def _kind(name: str, tensor: np.ndarray, form: str) -> str | None:
    """gguf's name of the format of one tensor; None for float32."""
    if tensor.ndim < 2 or LOSSY[form] is None:
        return None
    if not name.startswith("blk."):
        return "F16"
    return LOSSY[form] if form == "f16" or tensor.shape[1] % BLOCK == 0 else None


def _text_tensors(tower: Tower, heads: int, text: Any) -> Iterator[tuple[str, np.ndarray]]:
    state = tower.language.state_dict()
    yield "token_embd.weight", _numbers(state["embed_tokens.weight"])
    yield "output_norm.weight", _numbers(state["norm.weight"])
    if not text.tie_word_embeddings:
        yield "output.weight", _numbers(tower.head.weight)
    turned = {"self_attn.q_proj": heads, "self_attn.k_proj": text.num_key_value_heads}
    for number in range(text.num_hidden_layers):
        for own, name in LAYER.items():
            for kind in ("weight", "bias"):
                if (tensor := state.get(f"layers.{number}.{own}.{kind}")) is not None:
                    values = _numbers(tensor)
                    if own in turned and text.model_type in ROTATED_IN_PAIRS:
                        values = _in_pairs(values, turned[own])
                    yield f"blk.{number}.{name}.{kind}", values


def _in_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """A head's rows with the numbers that are turned together side by side, not half a head apart."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _add_vocabulary(writer: Any, tower: Tower) -> None:
    tokenizer, backend = tower.tokenizer, _backend(tower)
    added = {entry["id"]: entry for entry in backend["added_tokens"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    rows = range(len(tower.head.weight))  # rows beyond the vocabulary are padding
    kinds = [_kind_of_token(n in by_id, added.get(n)) for n in rows]
    writer.add_tokenizer_model("gpt2")
    cut = json.dumps(backend["pre_tokenizer"], ensure_ascii=False).replace("\\\\", "\\")
    writer.add_tokenizer_pre(next((name for piece, name in CUTS.items() if piece in cut), "gpt-2"))
    writer.add_token_list([by_id.get(n, f"[PAD{n}]") for n in rows])
    writer.add_token_types(kinds)
    merges = backend["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ends = sorted(tower.stop_ids)
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    writer.add_pad_token_id(tower.pad_id)
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(begins)
    writer.add_chat_template(tower.processor.chat_template)


def _kind_of_token(known: bool, added: Mapping[str, Any] | None) -> int:
    if not known:
        return UNUSED
    return NORMAL if added is None else CONTROL if added["special"] else USER_DEFINED


def _backend(tower: Tower) -> Mapping[str, Any]:
    """What the tokenizer is made of."""
    return json.loads(tower.tokenizer.backend_tokenizer.to_str())


# ---- encoder and projector -------------------------------------------------------------------------------------------


def _write_pictures(tower: Tower, path: Path) -> None:
    import gguf

    config, images = tower.model.config, tower.processor.image_processor
    vision, layer = config.vision_config, config.vision_feature_layer
    depth = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer  # layers that are computed
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "clip")
    writer.add_type("mmproj")
    writer.add_file_type(0)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_string("clip.projector_type", "mlp")
    sizes = {
        "image_size": vision.image_size, "patch_size": vision.patch_size, "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size, "projection_dim": config.get_text_config().hidden_size,
        "block_count": depth, "attention.head_count": vision.num_attention_heads,
    }  # fmt: skip
    for name, value in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", [depth])
    writer.add_array("clip.vision.image_mean", [float(x) for x in images.image_mean])
    writer.add_array("clip.vision.image_std", [float(x) for x in images.image_std])
    writer.add_bool("clip.use_gelu", vision.hidden_act.startswith("gelu"))
    for name, tensor in _picture_tensors(tower, depth):
        writer.add_tensor(name, tensor)
    _close(writer, part, path)


def _picture_tensors(tower: Tower, depth: int) -> Iterator[tuple[str, np.ndarray]]:
    state = {name.removeprefix("vision_model."): tensor for name, tensor in tower.vision.state_dict().items()}
    for kind in ("weight", "bias"):
        yield f"v.patch_embd.{kind}", _numbers(state[f"embeddings.patch_embedding.{kind}"])
    yield "v.position_embd.weight", _numbers(state["embeddings.position_embedding.weight"])
    for number in range(depth):
        for own, name in VISION_LAYER.items():
            for kind in ("weight", "bias"):
                yield f"v.blk.{number}.{name}.{kind}", _numbers(state[f"encoder.layers.{number}.{own}.{kind}"])
    for name, matrix in (("0", tower.projector.linear_1), ("2", tower.projector.linear_2)):
        yield f"mm.{name}.weight", _numbers(matrix.weight)
        yield f"mm.{name}.bias", _numbers(matrix.bias)


def _numbers(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _close(writer: Any, part: Path, path: Path) -> None:
    """Writes a file that appears whole or not at all."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)
