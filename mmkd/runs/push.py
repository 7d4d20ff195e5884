"""Puts a student's folder on a hub: what goes there, what is refused before anything is sent, and what a hub answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.base.checksums import check_whole
from mmkd.base.run_folder import RECIPE
from mmkd.errors import DataError, one_line
from mmkd.evaluation.model_card import CARD
from mmkd.evaluation.roles import STUDENT

# What training leaves beside weights, and what runs code when it is read.
_OF_TRAINING = re.compile(
    r"(^|/)(checkpoint-[^/]*/.*|optimizer\..*|scheduler\.pt|rng_state.*|trainer_state\.json|training_args\.bin|scaler\.pt|"
    r"distiller\.safetensors|best\.safetensors)$"
)
_PICKLE = re.compile(r"\.(bin|pt|pth|pkl|pickle|ckpt)$")
_WEIGHTS = re.compile(r"\.safetensors$")
_URL = re.compile(r"\b\w+://\S+")
# Absolute paths of Unix with two parts or more, of a home folder, of Windows.
_PATH = re.compile(r"(?<![\w.:/~-])(?:~[\w-]*(?:/[\w.+@%-]+)+|(?:/[\w.+@%-]+){2,}|[A-Za-z]:[\\/][\w.+@%\\/-]+)")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
SHOWN = 12  # lines of the card in a dry run
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"


@dataclass(frozen=True)
class Upload:
    """What would be sent. files: {name: bytes}.  wrong: why nothing is.  card: its first lines."""

    folder: Path
    files: dict[str, int]
    wrong: list[str]
    card: list[str]

    def lines(self, repo: str) -> list[str]:
        """The dry run in words."""
        width = max((len(name) for name in self.files), default=0)
        total = sum(self.files.values())
        found = [f"{self.folder} -> {repo}: {len(self.files)} files, {_size(total)}"]
        found += [f"  {name:<{width}}  {_size(size):>9}" for name, size in self.files.items()]
        if self.card:
            found += [f"{CARD} begins:", *(f"  {line}" for line in self.card)]
        return found + [f"refused: {why}" for why in self.wrong]


def planned(folder: Path | str) -> Upload:
    """What of a run's student, or of a model's folder, would be sent, and what stands in the way. Raises DataError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; give a run, or the folder of a student")
    if (folder / RECIPE).exists():
        if not (folder / STUDENT).is_dir():
            raise DataError(f"{folder} is a run without a student; the command that began it goes on to its end")
        folder = folder / STUDENT
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    paths = {name: path for name, path in paths.items() if not any(part.startswith(".") for part in name.split("/"))}
    files = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).is_file() else ""
    wrong = [*_missing(folder, files, text), *_not_to_be_sent(folder, paths), *_told(text)]
    return Upload(folder, files, wrong, _beginning(text))


def push(folder: Path | str, repo: str, *, public: bool = False) -> str:
    """Sends a student to a repository of the hub, which is made if it is not there; returns its address.

    public: whether everybody may see it. What is there already is not sent again. Raises DataError, with the way out, for what is
    refused here and for what the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    upload = planned(folder)
    check_name(repo)
    if upload.wrong:
        raise DataError(f"{upload.folder} is not sent: {'; and '.join(upload.wrong)}")
    check_whole(upload.folder, "put it back, or run its recipe again, before it is sent")
    if get_token() is None:
        raise DataError(f"there is no token for the hub; {LOG_IN}")
    api = HfApi()
    with hub_errors(repo):
        repo = repo if "/" in repo else f"{api.whoami()['name']}/{repo}"
        _check_visibility(api, repo, public)
        api.create_repo(repo, private=not public, exist_ok=True)
        said = f"Upload a student of mmkd ({len(upload.files)} files)"
        names = [re.sub(r"([\[*?])", r"[\1]", name) for name in upload.files]
        api.upload_folder(repo_id=repo, folder_path=upload.folder, commit_message=said, allow_patterns=names)
    return f"{api.endpoint}/{repo}"


def check_name(repo: str) -> None:
    """Raises DataError for what is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        said = one_line(error, 160)
        raise DataError(f"{repo!r} is no name of a repository ({said}); give NAME or ORGANISATION/NAME") from error


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """What a hub or the way to it refuses, as DataError on one line with the way out."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise DataError("the hub is not asked, since HF_HUB_OFFLINE is set; take it out of the environment") from error
    except HfHubHTTPError as error:
        raise DataError(_refusal(repo, error)) from error
    except Exception as error:  # of the network: which ones depends on the version of the hub's client
        of_network = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
        if not (of_network or isinstance(error, OSError | RuntimeError)):
            raise
        raise DataError(
            f"the connection to the hub broke ({type(error).__name__}: {one_line(error, 120)}); the same command sends what is "
            "missing"
        ) from error


def _refusal(repo: str, error: Any) -> str:
    status = getattr(error.response, "status_code", None)
    said = one_line(getattr(error, "server_message", None) or error, 160)
    ways = {
        401: f"the hub does not know the token; {LOG_IN}",
        403: f"the token may not write to {repo}; take one with write access, or a name of your own",
        404: f"the hub has no place {repo}; look at the organisation's name, and at what the token may see",
        409: f"{repo} was changed at the same time; give the command again",
        413: "a file is too large for the hub",
    }
    return f"the hub refuses ({status}): {ways.get(status, said + '; try again later')}"


def _check_visibility(api: Any, repo: str, public: bool) -> None:
    """Raises DataError where a repository that is there is seen by everybody, and this was not asked for."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = api.model_info(repo)
    except RepositoryNotFoundError:  # also what the hub says of a token that it does not know; making the repository tells which
        return
    if there.private is False and not public:
        raise DataError(f"{repo} is there and public; give --public to send to it, or another name")


def _missing(folder: Path, files: dict[str, int], text: str) -> Iterator[str]:
    if "config.json" not in files or not any(_WEIGHTS.search(name) for name in files):
        yield f"{folder} holds no model (config.json and *.safetensors)"
    if not text.strip():
        yield f"there is no model card; `mmkd report RUN` writes {CARD} into a run's student, or write one"


def _not_to_be_sent(folder: Path, paths: dict[str, Path]) -> Iterator[str]:
    of_training = [name for name in paths if _OF_TRAINING.search(name)]
    pickles = [name for name in paths if _PICKLE.search(name) and name not in of_training]
    root = folder.resolve()
    links = [name for name, path in paths.items() if not path.is_file() or not path.resolve().is_relative_to(root)]
    for names, what in (
        (of_training, "checkpoints or the state of an optimiser"), (pickles, "pickled files, which run code when they are read"),
        (links, "links that lead out of the folder"),
    ):  # fmt: skip
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield f"it holds {what} ({', '.join(names[:3])}{more}); move them elsewhere"


def _told(text: str) -> Iterator[str]:
    """What a card tells that is nobody's business."""
    paths = list(dict.fromkeys(_PATH.findall(_URL.sub("", text))))
    if paths:
        yield f"the card names paths of this machine ({', '.join(paths[:3])}); take them out of {CARD}"
    if _TOKEN.search(text):
        yield f"the card holds a token of the hub; take it out of {CARD}, and revoke it"


def _beginning(text: str) -> list[str]:
    """The first lines of a card, behind its front matter."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    return [line[:150] for line in body.splitlines() if line.strip()][:SHOWN]


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
