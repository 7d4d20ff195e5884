"""Cards: the YAML files of the catalogue folders `models/`, `data/`, `evaluation/` and `prompts/`, and of folders
that users add.

A card holds values, no logic, and no code is ever loaded from a card folder: `imports` names modules that are
installed, on Python's path or in the current folder.  A card's name is its path
below the folder of its kind, without the suffix: `models/encoders/x.yaml` is "x" of kind "models/encoders",
and "encoders/x" of kind "models".

Looked through in this order, the first card of a name wins:
1. the roots named by the environment variable MMKD_CARDS (separated by ":", on Windows ";"), each with the
   kinds as subfolders;
2. a checkout of the project;
3. the copies inside the installed package, `mmkd/_cards/<kind>`.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from mmkd.errors import DataError, did_you_mean, one_line, shown
from mmkd.registry import import_modules

if TYPE_CHECKING:  # pydantic is only needed once a card is loaded
    from pydantic import BaseModel, ValidationError

KINDS = ("models", "data", "evaluation", "prompts")
SUFFIXES = (".yaml", ".yml")
ENVIRONMENT = "MMKD_CARDS"
SHOWN = 16  # errors that a message lists

_PACKAGE = Path(__file__).resolve().parents[1]

Card = TypeVar("Card", bound="BaseModel")


def card_folders(kind: str) -> list[Path]:
    """The existing folders that hold cards of a kind, in the order in which they are looked through.

    `kind` is "models", "data", "evaluation" or "prompts", or a subfolder such as "models/encoders".
    Raises DataError for another kind, and for a folder in MMKD_CARDS that does not exist.
    """
    parts = PurePosixPath(kind).parts
    if not parts or parts[0] not in KINDS or ".." in parts:
        raise DataError(f"there is no kind of card {kind!r}; {did_you_mean(kind, KINDS)}")
    folders = [root.joinpath(*parts) for root in (*_user_roots(), *_own_roots())]
    return [folder for folder in folders if folder.is_dir()]


def _user_roots() -> list[Path]:
    roots = [Path(os.path.expanduser(text)) for text in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if text]
    missing = [str(root) for root in roots if not os.path.isdir(root)]
    if missing:
        raise DataError(
            f"{ENVIRONMENT} names folders that do not exist: {', '.join(missing)}; correct or unset it"
        )
    return roots


def _own_roots() -> list[Path]:
    """The checkout around this file, if it is one, then the package's own copies."""
    checkout = _PACKAGE.parent
    is_checkout = (checkout / "pyproject.toml").is_file() or (checkout / ".git").exists()
    return [checkout, _PACKAGE / "_cards"] if is_checkout else [_PACKAGE / "_cards"]


def list_cards(kind: str) -> dict[str, Path]:
    """All cards of a kind, name -> file, sorted by name. Raises DataError for a name given twice."""
    found: dict[str, Path] = {}
    for folder in card_folders(kind):
        here: dict[str, Path] = {}
        for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in here:
                raise DataError(f"{here[name]} and {path} are the same card {name!r}; keep one of them")
            here[name] = path
        found = here | found
    return dict(sorted(found.items()))


def find_card(kind: str, name: str) -> Path:
    """The file of a card. `name` is a card's name, its last part where that is unique, or the path of a
    YAML file.

    Raises DataError, with a suggestion, when there is no such card.
    """
    if name.endswith(SUFFIXES):
        if not Path(name).is_file():
            raise DataError(
                f"there is no card file {one_line(name)}; give the path of a YAML file or a name of `mmkd list {kind}`"
            )
        return Path(name)
    cards = list_cards(kind)
    if name in cards:
        return cards[name]
    endings = [full for full in cards if full.rpartition("/")[2] == name]
    if len(endings) > 1:
        raise DataError(
            f"{name!r} is the name of several cards: {', '.join(endings)}; give one of these in full"
        )
    if not endings:
        raise DataError(f"there is no card {name!r} of kind {kind!r}; {did_you_mean(name, cards)}")
    return cards[endings[0]]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises DataError when it cannot be read or holds something else."""
    from mmkd.base.yaml_files import read_mapping

    return read_mapping(path, "card")


def load_card(kind: str, name: str, schema: type[Card]) -> Card:
    """One card as an instance of the pydantic model `schema`.

    A schema with a field `name` gets the card's own name; a card that states another one is refused. Of a schema with a
    field `imports` the modules that the card names are imported first, which register what other keys name.
    Raises DataError that lists every wrong key at once, RegistryError for modules that cannot be imported.
    """
    from pydantic import ValidationError

    path = find_card(kind, name)
    content = read_yaml(path)
    if "name" in schema.model_fields:
        stated = content.setdefault("name", path.stem)
        if stated != path.stem:
            raise DataError(
                f"{path} states the name {stated!r}, its file says {path.stem!r}; leave `name` out"
            )
    if "imports" in schema.model_fields:
        import_modules(named_modules(content))
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path} is no valid card:\n{explain(error, schema)}") from error


def named_modules(content: dict[str, Any]) -> list[str]:
    """The modules under the key `imports` of a mapping; what is no list of names is left to the schema."""
    names = content.get("imports")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """Every complaint of pydantic on a line of its own: key path, what is wrong, the value, a suggestion."""
    found = error.errors(include_url=False)
    lines = [one_line(_complaint(item, schema), 700) for item in found[:SHOWN]]
    lines += [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "\n".join(f"  {line}" for line in lines)


def _complaint(item: dict[str, Any], schema: type[BaseModel]) -> str:
    where = ".".join(map(str, item["loc"])) or "(card)"
    if item["type"] == "missing":
        return f"{where}: is missing"
    if item["type"] == "extra_forbidden":
        hint = (
            did_you_mean(str(item["loc"][-1]), schema.model_fields) if len(item["loc"]) == 1 else "remove it"
        )
        return f"{where}: is not a key of this card; {hint}"
    return f"{where}: {item['msg']}, got {shown(item['input'])}"
