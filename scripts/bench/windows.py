#!/usr/bin/env python3
"""Qwen2.5-VL's vision encoder with windows in groups, against transformers' attention window by window.

    python scripts/bench/windows.py                          # two pictures of 448 x 448, one of 1000 x 700; depth 8
    python scripts/bench/windows.py --threads 2 --depth 32 --width 1280 --heads 16

Random weights, float32, the shape of the published encoder but for its depth and width. All ways take turns in one process:
forward pass alone and with backward, medians of the process's CPU time (least and most), and the median of the rounds' ratios
to "sdpa". Differences are the largest against "eager", relative to the largest value.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
PICTURES = {"448 x 448, two": [(448, 448)] * 2, "1000 x 700": [(1000, 700)], "112 x 112, 64": [(112, 112)] * 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES)[:2])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from mmkd.towers.windows import NAME

    encoder = built(options)
    ways = {"eager": "eager", "sdpa": "sdpa", "in groups": NAME}
    print("| pictures | patches | windows | attention | forward ms | / sdpa | with backward ms | / sdpa | difference |")
    print("|---" * 9 + "|")
    for name in options.pictures:
        sizes = PICTURES[name]
        pixels, grid, windows = drawn(encoder, sizes)
        found = {way: [] for way in ways}
        results = {way: both(encoder, implementation, pixels, grid) for way, implementation in ways.items()}  # also warms up
        for _ in range(options.rounds):
            for way, implementation in ways.items():
                given = (encoder, implementation, pixels, grid)
                found[way].append([timed(work, *given) for work in (passed, both)])
        for way, rounds in found.items():
            cells = []
            for part in (0, 1):
                ratios = [mine[part] / other[part] for mine, other in zip(rounds, found["sdpa"], strict=True)]
                cells += [spread([times[part] for times in rounds]), f"{statistics.median(ratios):.2f}"]
            difference = max(apart(a, b) for a, b in zip(results[way], results["eager"], strict=True))
            print(f"| {name} | {len(pixels):,} | {windows} | {way} | {' | '.join(cells)} | {difference:.1e} |", flush=True)


def built(options: argparse.Namespace) -> torch.nn.Module:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(0)
    full = [block for block in range(options.depth) if block % 8 == 7]
    config = Qwen2_5_VLVisionConfig(depth=options.depth, hidden_size=options.width, num_heads=options.heads,
                                    intermediate_size=round(2.672 * options.width), fullatt_block_indexes=full,
                                    out_hidden_size=896)  # fmt: skip
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def drawn(encoder: torch.nn.Module, sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Random pixels as the processor lays them out, their grid, and how many windows they have."""
    config = encoder.config
    side = config.patch_size * config.spatial_merge_size
    grid = [[1, 2 * round(h / side), 2 * round(w / side)] for w, h in sizes]
    window = config.window_size // config.patch_size
    windows = sum(-(-h // window) * -(-w // window) for _, h, w in grid)
    count = sum(h * w for _, h, w in grid)
    return torch.randn(count, 3 * config.temporal_patch_size * config.patch_size**2), torch.tensor(grid), windows


def passed(encoder: torch.nn.Module, implementation: str, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    encoder.config._attn_implementation = implementation
    with torch.no_grad():
        return encoder(pixels, grid_thw=grid).pooler_output


def both(encoder: torch.nn.Module, implementation: str, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
    """Visual tokens and the gradients of all weights."""
    encoder.config._attn_implementation = implementation
    encoder.zero_grad()
    tokens = encoder(pixels, grid_thw=grid).pooler_output
    tokens.square().mean().backward()
    return [tokens.detach(), *(p.grad.clone() for p in encoder.parameters())]


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def timed(work: Callable[..., object], *given: object) -> float:
    begun = time.process_time()
    work(*given)
    return 1000 * (time.process_time() - begun)


def spread(times: list[float]) -> str:
    return f"{statistics.median(times):.0f} ({min(times):.0f} - {max(times):.0f})"


if __name__ == "__main__":
    main()
