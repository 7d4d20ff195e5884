"""The recorded exchange with a vLLM server that tests use where none is installed: written anew, or held against a real server.

    MMKD_VLLM=FOLDER PYTHONPATH=. python scripts/serve/recording.py check     # FOLDER: of scripts/serve/install_vllm.sh
    MMKD_VLLM=FOLDER PYTHONPATH=. python scripts/serve/recording.py write

`check` asks a server each recorded request again: same status, token ids and hashes of pictures, log-probabilities within 1e-4.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from recorded_server import Exchange, load, write  # noqa: E402
from served_models import MODELS, mixed_samples, saved  # noqa: E402
from vllm_server import environment, vllm  # noqa: E402

from mmkd.teachers.opening import Opening  # noqa: E402
from mmkd.teachers.served import ServedTeacher  # noqa: E402
from mmkd.teachers.spec import TeacherSpec  # noqa: E402

SAMPLES, K, CLOSE = 8, 20, 1e-4  # as tests/teachers/test_vllm.py asks


def recorded(name: str, folder: Path) -> dict:
    """What a real server of one of the tiny models says when the tests ask it."""
    model, samples = saved(MODELS[name](), folder / name), mixed_samples(folder / "pictures", SAMPLES)
    with vllm(model, folder / f"{name}.log") as url, Exchange(forward=url) as exchange:
        spec = TeacherSpec(model=str(model), served=exchange.url, top_k=K)
        teacher = ServedTeacher.open(spec, Opening("teacher", 512, {}, {}))
        teacher.check(samples)
        teacher.tops([teacher.prepared(sample, teacher.body.encode(sample)) for sample in samples])
        return exchange.known


def differences(before: dict, now: dict) -> list[str]:
    """What two recordings of the same requests say otherwise."""
    found = [f"{key}: not asked any more" for key in before.keys() - now.keys()]
    found += [f"{key}: not recorded" for key in now.keys() - before.keys()]
    for key in sorted(before.keys() & now.keys()):
        (status, old), (other, new) = before[key], now[key]
        rows = (old.pop("prompt_logprobs", None) or [], new.pop("prompt_logprobs", None) or [])
        if status != other or old != new:
            found.append(f"{key}: {status} {json.dumps(old)[:300]} was recorded, {other} {json.dumps(new)[:300]} is said")
        elif len(rows[0]) != len(rows[1]) or not all(map(_close, *rows)):
            found.append(f"{key}: other log-probabilities")
    return found


def _close(old: dict | None, new: dict | None) -> bool:
    """Tokens that are equally likely may change places."""
    if not old or not new:
        return old == new
    values = [sorted(said["logprob"] for said in row.values()) for row in (old, new)]
    same = [abs(old[token]["logprob"] - new[token]["logprob"]) < CLOSE for token in old.keys() & new.keys()]
    return len(old) == len(new) and all(same) and all(abs(a - b) < CLOSE for a, b in zip(*values, strict=True))


def main() -> int:
    if sys.argv[1:] not in (["check"], ["write"]) or environment() is None:
        print(__doc__)
        return 2
    wrong = []
    for name in MODELS:
        path = ROOT / "tests" / "teachers" / f"vllm_{name}.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            now = recorded(name, Path(folder))
        if sys.argv[1] == "write":
            write(path, now)
            print(f"{path}: {len(now)} requests, {path.stat().st_size:,} bytes")
        else:
            wrong += [f"{name}: {error}" for error in differences(load(path), now)]
            print(f"{name}: {len(now)} requests asked again")
    print("\n".join(wrong), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
