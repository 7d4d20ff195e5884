"""Students as llama.cpp reads them: every tensor where it belongs, the same answers, refusals of what would come out wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from served_models import VISION, assembled
from tiny import tiny_tower

from mmkd.cli import main
from mmkd.errors import TowerError
from mmkd.runs.engines import llama_cpp
from mmkd.runs.export import FOR_LLAMA_CPP, QUESTIONS, compare
from mmkd.towers.gguf import PICTURES, refusals, write_gguf
from mmkd.towers.gguf import TEXT as TEXT_FILE
from mmkd.towers.quantise import fake_quantise, settle

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


def read(path):
    found = gguf.GGUFReader(path)
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in found.tensors}
    return {t.name: values[t.name].reshape([*map(int, reversed(t.shape))]) for t in found.tensors}, found


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_every_tensor_is_written_once_with_its_values(tmp_path, kind):
    tower = assembled(kind, tie_word_embeddings=False)
    assert write_gguf(tower, tmp_path) == []
    text, file = read(tmp_path / TEXT_FILE)
    pictures, _ = read(tmp_path / PICTURES)
    own = {name: p.detach().numpy() for name, p in tower.model.named_parameters()}
    of_language = sum(values.size for name, values in own.items() if "language" in name or "lm_head" in name)
    assert sum(values.size for values in text.values()) == of_language
    language = tower.language.state_dict()
    assert np.array_equal(text["blk.1.ffn_down.weight"], language["layers.1.mlp.down_proj.weight"].numpy())
    assert np.array_equal(text["output.weight"], tower.head.weight.detach().numpy())
    queries = language["layers.0.self_attn.q_proj.weight"].numpy()
    found = text["blk.0.attn_q.weight"]
    if kind == "llama":  # numbers that are turned together stand side by side
        for head in range(2):
            rows = queries[32 * head : 32 * (head + 1)]
            assert np.array_equal(found[32 * head : 32 * (head + 1)], np.stack([rows[:16], rows[16:]], 1).reshape(32, -1))
    else:
        assert np.array_equal(found, queries)
    last = tower.vision.state_dict()
    skipped = {n for n in last if f"layers.{VISION['num_hidden_layers'] - 1}." in n or "post_layernorm" in n}
    written = sum(v.numel() for n, v in last.items() if n not in skipped)
    assert sum(v.size for n, v in pictures.items() if n.startswith("v.")) == written
    tokens = [bytes(file.fields["tokenizer.ggml.tokens"].parts[n]).decode() for n in file.fields["tokenizer.ggml.tokens"].data]
    assert tokens[: tower.vocabulary] == tower.tokenizer.convert_ids_to_tokens(range(tower.vocabulary))


def test_a_student_that_was_trained_so_loses_nothing(tmp_path):
    tower = assembled("qwen2")
    fake_quantise(tower, "q4_0", ["language"])
    settle(tower)
    assert write_gguf(tower, tmp_path, "q4_0") == []
    text, _ = read(tmp_path / TEXT_FILE)
    for name in ("q_proj", "o_proj"):
        own = tower.language.state_dict()[f"layers.0.self_attn.{name}.weight"].numpy()
        assert np.array_equal(text[f"blk.0.attn_{'q' if name == 'q_proj' else 'output'}.weight"], own)
    assert np.array_equal(text["output_norm.weight"], tower.language.norm.weight.detach().numpy())


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_llama_cpp_answers_as_transformers(tmp_path, kind):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    tower = assembled(kind).freeze()
    write_gguf(tower, tmp_path)
    with llama_cpp(tmp_path) as engine:
        stretched, padded = compare(tower, engine, FOR_LLAMA_CPP)
    equal = int(stretched.partition(": ")[2].split()[0])
    assert equal >= QUESTIONS - 5
    within = [float(word.rstrip(";")) for word in stretched.split() if "e-" in word]
    assert len(within) >= 1 and max(within) < 5e-3  # answers part only where two tokens are as likely
    assert int(padded.partition(": ")[2].split()[0]) < equal  # what the page says of padding


def test_what_comes_out_wrong_is_refused(tmp_path, capsys):
    with pytest.raises(TowerError, match="CLIP's class token behind the patches.*take a SigLIP"):
        write_gguf(assembled("qwen2", "clip_vision_model"), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert "a vit, of which llama.cpp's LLaVA knows nothing" in refusals(tiny_tower())[0]
    assert "stands linear, not GELU" in refusals(tiny_tower(vision="siglip", projector="linear"))[0]
    assert not refusals(tiny_tower(vision="siglip"))
    tiny_tower().save(tmp_path / "student")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out"), "--to", "gguf"]) == 2
    assert "take a SigLIP" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "full"), "--to", "vllm"]) == 2
    assert "holds something already" in capsys.readouterr().err


def test_a_folder_for_vllm_is_the_model_and_says_what_stands_in_the_way(tmp_path, capsys):
    tower = assembled("qwen3", head_dim=8)
    tower.save(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out"), "--to", "vllm"]) == 0
    said = capsys.readouterr().out
    assert "its attention heads are 8 wide" in said and "writes them" not in said and "vllm serve" in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
    from mmkd.towers.tower import Tower

    again = Tower.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in tower.model.state_dict().items())


def test_an_answer_that_ends_at_once_is_equal(tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    tower = assembled("qwen2", tie_word_embeddings=False).freeze()
    head = tower.head.weight
    sizes = head.norm(dim=1)
    with torch.no_grad():  # whatever is likeliest, the end, in either sign, is nearly always likelier
        head.mul_(0.01)
        head[sorted(tower.stop_ids)[0]] = head[int(sizes.argmax())] * 1e4
    write_gguf(tower, tmp_path)
    with llama_cpp(tmp_path) as engine:
        said = next(compare(tower, engine, FOR_LLAMA_CPP))
    assert said.split(": ")[1].startswith(f"{QUESTIONS} of {QUESTIONS} greedy answers equal")
