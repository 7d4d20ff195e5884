#!/usr/bin/env python3
"""Race the evaluator against transformers' `generate` on a POPE-like set: six questions on every picture.

    python scripts/bench/evaluate.py
    python scripts/bench/evaluate.py --images 100 --batch-size 32 --json evaluate.json

Both answer the same questions with the same random model at the same batch size, in one process, taking turns. `generate`
gets the pixels of every question, as plain evaluation loops give them; reading and resizing the pictures is in its time. The
evaluator's time is that of the whole `evaluate`: questions read, answers scored, results written. The ratio is that of the
medians, by the clock and by the CPU's time (steadier where other programs run). Shapes are printed; answers are short, as POPE's.

Beside it: seconds from the command `mmkd evaluate` to its first batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
QUESTIONS = 6
OBJECTS = ("dog", "cat", "car", "person", "chair", "bottle")


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = race(options, Path(folder))
    print(json.dumps(result, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=4, help="of each answer; random weights never stop")
    parser.add_argument("--layers", type=int, default=6, help="of the language model")
    parser.add_argument("--width", type=int, default=256, help="of the language model")
    parser.add_argument("--model", help="a folder to race in place of the random model")
    parser.add_argument("--picture", type=int, default=320, help="pixels of a side of the files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the result here, too")
    return parser.parse_args()


def race(options: argparse.Namespace, folder: Path) -> dict:
    from mmkd.evaluation.answer import evaluate
    from mmkd.evaluation.benchmarks import load_benchmark

    write_pope(folder / "pope", options)
    tower = load(options) if options.model else build_tower(options)
    tower.save(folder / "model")
    card = load_benchmark("pope").model_copy(update={"split": "random", "max_new_tokens": options.new_tokens})
    quiet = {"data_root": folder, "batch_size": options.batch_size, "progress": False, "resume": False}
    wall: dict[str, list[float]] = {"generate": [], "mmkd": []}
    busy: dict[str, list[float]] = {"generate": [], "mmkd": []}
    for number in range(options.repeats + 1):
        plain, *theirs = timed(lambda: answer_plainly(tower, card, folder, options))
        result, *ours = timed(lambda: evaluate(tower, card, folder / "out", **quiet))
        if number:  # the first round warms up
            for name, found in (("generate", theirs), ("mmkd", ours)):
                wall[name].append(found[0])
                busy[name].append(found[1])
    lines = (folder / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    same = [plain[row["id"]] == row["prediction"] for row in map(json.loads, lines)]
    medians = {name: statistics.median(values) for name, values in wall.items()}
    cpu = {name: statistics.median(values) for name, values in busy.items()}
    return {
        "questions": result["n"],
        "images": options.images,
        "batch_size": options.batch_size,
        "new_tokens": options.new_tokens,
        "device": options.device,
        **shapes(tower),
        "seconds": {name: [round(value, 2) for value in values] for name, values in wall.items()},
        "cpu_seconds": {name: [round(value, 2) for value in values] for name, values in busy.items()},
        "questions_per_second": {name: round(result["n"] / value, 1) for name, value in medians.items()},
        "ratio": round(medians["generate"] / medians["mmkd"], 2),
        "cpu_ratio": round(cpu["generate"] / cpu["mmkd"], 2),
        "equal_answers": sum(same) / len(same),
        "until_first_batch": [until_first_batch(folder) for _ in range(options.repeats)],
    }


def timed(action):
    """The action's value, its wall-clock seconds, and the CPU's (steadier where other programs run)."""
    start, busy = time.perf_counter(), time.process_time()
    value = action()
    return value, time.perf_counter() - start, time.process_time() - busy


def write_pope(folder: Path, options: argparse.Namespace) -> None:
    import numpy as np
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    (folder / "val2014").mkdir(parents=True)
    for number in range(options.images):
        values = rng.integers(0, 256, (options.picture, options.picture, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / "val2014" / f"{number}.jpg")
        for place, name in enumerate(OBJECTS[:QUESTIONS]):
            row = {"question_id": len(rows), "image": f"{number}.jpg", "text": f"Is there a {name} in the image?"}
            rows.append(row | {"label": "yes" if place % 2 else "no"})
    (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def load(options: argparse.Namespace):
    from mmkd.towers.tower import Tower

    tower = Tower.load(options.model, dtype="float32")
    tower.model.to(options.device).eval()
    return tower


def build_tower(options: argparse.Namespace):
    """A LLaVA with random weights: ViT-Tiny for 224 pixels and a Llama.

    In proportion they are what LLaVA-KD's students are made of: SigLIP-so400m has 1.2 times the weights of Qwen2.5-0.5B's layers.
    """
    from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, train_tokenizer

    vision = {
        "model_type": "vit", "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3,
        "intermediate_size": 768, "image_size": 224, "patch_size": 16,
    }  # fmt: skip
    language = {
        "model_type": "llama", "hidden_size": options.width, "num_hidden_layers": options.layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": options.width * 8 // 3, "max_position_embeddings": 1024,
    }  # fmt: skip
    tokenizer = train_tokenizer([f"Is there a {name} in the image? Answer with a single word." for name in OBJECTS], 400)
    spec = VisionSpec(config=vision, image_size=(224, 224))
    tower = assemble(spec, LanguageSpec(config=language), tokenizer=tokenizer, seed=0)
    tower.model.to(options.device).eval()
    return tower


def shapes(tower) -> dict:
    parts = {name: sum(p.numel() for _, p in found) for name, found in tower.part_parameters().items()}
    return {"parameters": parts}


def answer_plainly(tower, card, folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """A plain loop: batches in the order of the file, every question with its picture's pixels."""
    import torch

    samples = [card.render(question) for question in card.read(folder)]
    answers: dict[str, str] = {}
    for start in range(0, len(samples), options.batch_size):
        batch = samples[start : start + options.batch_size]
        texts = [tower.processor.apply_chat_template(messages(s), add_generation_prompt=True) for s in batch]
        pictures = [[ref.load() for ref in sample.images] for sample in batch]
        padded = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        inputs = tower.processor(text=texts, images=pictures, **padded).to(options.device)
        with torch.no_grad():
            out = tower.model.generate(
                **inputs, max_new_tokens=options.new_tokens, do_sample=False, pad_token_id=tower.pad_id,
                eos_token_id=sorted(tower.stop_ids),
            )  # fmt: skip
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = tower.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers |= {sample.id: text for sample, text in zip(batch, texts, strict=True)}
    return answers


def messages(sample) -> list[dict]:
    turn = sample.turns[0]
    content = [{"type": "image"}] * turn.images + [{"type": "text", "text": turn.text}]
    return [{"role": turn.role, "content": content}]


# Stops where the first batch would be asked, and says when that was.
FIRST_BATCH = """
import json, sys, time
from mmkd.evaluation import answer

def stop(*arguments):
    print(json.dumps([time.time(), time.process_time()]))
    raise SystemExit(0)

answer._answer_batch = stop
from mmkd.cli import main
main(sys.argv[1:])
"""


def until_first_batch(folder: Path) -> dict[str, float]:
    """Wall-clock and CPU seconds from the command `mmkd evaluate` to its first batch."""
    card = folder / "one.yaml"
    text = (ROOT / "evaluation" / "pope.yaml").read_text(encoding="utf-8").replace("split: all", "split: random")
    card.write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", FIRST_BATCH, "evaluate", str(folder / "model"), "--benchmarks", str(card)]
    command += ["--data-root", str(folder), "--output", str(folder / "command")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.time()
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    reached, busy = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": round(reached - start, 2), "cpu_seconds": round(busy, 2)}


if __name__ == "__main__":
    main()
