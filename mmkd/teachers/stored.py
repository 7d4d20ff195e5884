"""A cache in the teacher's place: a tower without a body, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import mmkd.towers.encoders  # noqa: F401  registers the encoders that transformers does not know
from mmkd.data.samples import Sample
from mmkd.errors import DataError, TowerError
from mmkd.losses.topk import TopKForwardKL
from mmkd.recipes.recipe import Recipe, StageSpec
from mmkd.teachers.store import About, Said, TeacherCache, content_key
from mmkd.terms.term import KINDS, Term, rows_at
from mmkd.towers.tower import Encoded, Seen, Tower, TowerInputs

HEAD = "head.safetensors"


class CachedTower(Tower):
    """A teacher that has spoken already: configuration, processor and (exact mode) head are there, its other weights are not.

    What prepares samples works as in any tower; to see or read anything new raises TowerError. With `live`, the teacher itself,
    visual tokens go through its projector and language model (the visual switch needs that; its own reading stays cached).
    """

    def __init__(self, folder: str | Path, *, max_length: int, trust_remote_code: bool = False, live: Tower | None = None):
        self.cache = TeacherCache(folder)
        self.about = self.cache.about
        teacher = self.cache.folder / "teacher"
        config = AutoConfig.from_pretrained(teacher, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
        model.generation_config = GenerationConfig.from_pretrained(teacher)
        processor = AutoProcessor.from_pretrained(teacher, trust_remote_code=trust_remote_code)
        self.live = live
        if live is not None:
            model.set_output_embeddings(live.head)
        elif self.about.top_k is None:
            model.set_output_embeddings(_head(teacher / HEAD))
        super().__init__(model, processor, max_length=max_length)
        self._device = torch.device("cpu")
        self.logit_rule = tuple(self.about.logit_rule)

    def to(self, device: torch.device | str) -> CachedTower:
        if self.live is None and self.about.top_k is None:  # a live teacher is where it was loaded to
            self.head.to(device)
        self._device = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self._device

    def fingerprint(self) -> str:
        return self.about.fingerprint

    def see(self, inputs: TowerInputs) -> Seen:
        raise TowerError(self._absent("see pictures"))

    def read(self, inputs: TowerInputs, visual_tokens: Sequence[Tensor] | Seen) -> Tensor:
        if self.live is None:
            raise TowerError(self._absent("read"))
        return self.live.read(inputs, visual_tokens)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        if self.live is None:
            raise TowerError(self._absent("project"))
        return self.live.project(features)

    def _absent(self, what: str) -> str:
        return (
            f"the teacher is the cache {self.cache.folder}, which cannot {what} anew; add what is missing with `mmkd cache`, or "
            "take teacher.cache out"
        )


def _head(path: Path) -> nn.Linear:
    tensors = load_file(path)
    rows, width = tensors["weight"].shape
    head = nn.Linear(width, rows, bias="bias" in tensors, dtype=tensors["weight"].dtype, device="meta")
    head.load_state_dict(tensors, assign=True)
    return head


def save_body(teacher: Tower, folder: Path, with_head: bool) -> None:
    """What a `CachedTower` needs of a teacher."""
    teacher.model.config.save_pretrained(folder)
    teacher.model.generation_config.save_pretrained(folder)
    teacher.processor.save_pretrained(folder)
    if with_head:
        head = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in teacher.head.state_dict().items()}
        save_file(head, folder / HEAD)


# ---- what is asked of a cache ----------------------------------------------------------------------------------------


def row_stages(recipe: Recipe) -> dict[str, StageSpec]:
    """The stages in which the teacher's own passes are needed."""
    return {
        name: stage
        for name, stage in recipe.stages.items()
        if any(KINDS[t.kind].teacher and not KINDS[t.kind].preference for t in stage.terms.values())
    }


def positions_of(terms: Sequence[Term]) -> set[str]:
    """Kinds of rows at which the terms read the teacher."""
    rows = {t.positions for t in terms if t.is_row_term and t.needs_teacher}
    return rows | ({"visual"} if any(t.kind == "relation" for t in terms) else set())


def wanted(recipe: Recipe) -> dict[str, Any]:
    """What entries depend on, as a recipe has it (see `About`). Raises DataError for stages of different precision."""
    precisions = {name: stage.precision for name, stage in row_stages(recipe).items()}
    if len(set(precisions.values())) > 1:
        raise DataError(f"the stages' precision differs ({precisions}), but a cache is of one; give them the same `precision`")
    spec = recipe.teacher
    precision = next(iter(precisions.values()), "float32")
    return {
        "model": spec.model,
        "dtype": spec.dtype,
        "quantise": spec.quantise,
        "max_length": recipe.max_length,
        "precision": precision,
    }


def open_teacher(recipe: Recipe, terms: dict[str, list[Term]], load: Callable[[], Tower]) -> CachedTower:
    """The cache of a recipe as its teacher. terms: by stage. load: gives the teacher itself, for terms that need it too.

    Raises DataError for a cache of another teacher or recipe (with every difference) and for terms that it cannot serve.
    """
    spec = recipe.teacher
    folder = Path(spec.cache)
    about = About.load(folder)
    differences = about.differences(wanted(recipe))
    if differences:
        raise DataError(
            f"the teacher cache {folder} does not fit:\n  " + "\n  ".join(differences) + "\nWrite another with "
            "`mmkd cache RECIPE teacher.cache=ANOTHER_FOLDER`, or correct the recipe"
        )
    refused = [f"stages.{stage}.terms.{why}" for stage, own in terms.items() for why in refusals(own, about)]
    if refused:
        raise DataError(
            f"these terms cannot run from the {about.mode} cache {folder}:\n  " + "\n  ".join(refused) + "\nTake them out, or "
            "take teacher.cache out to use the live teacher"
        )
    live = load() if any(t.path == "switch" for own in terms.values() for t in own) else None
    return CachedTower(folder, max_length=recipe.max_length, trust_remote_code=spec.trust_remote_code, live=live)


def refusals(terms: Sequence[Term], about: About) -> list[str]:
    """Terms that a cache cannot serve, each with the reason."""
    found = []
    for term in terms:
        if not term.needs_teacher or term.is_preference:
            continue
        positions = positions_of([term])
        if term.kind == "spans":
            found.append(f"{term.name}: reads the teacher's own tokens, which are not in a cache")
        elif term.kind == "feature_match" and not about.features:
            found.append(f"{term.name}: the teacher's vision features are not in this cache; write it with this recipe")
        elif not positions <= set(about.rows):
            found.append(f"{term.name}: needs {_names(positions)} rows, the cache has {_names(about.rows)}; write it anew")
        elif about.top_k is not None and term.kind != "feature_match":
            found += _top_k_refusal(term, about)
    return found


def _top_k_refusal(term: Term, about: About) -> list[str]:
    if term.kind != "forward_kl":
        return [f"{term.name}: {term.kind} needs all of the teacher's logits, the cache has {about.mode}; use an exact cache"]
    temperature = dict(term.options).get("temperature", 1.0)
    if temperature != 1:
        return [f"{term.name}: temperature {temperature} needs all of the teacher's logits, the cache has {about.mode}"]
    return []


def _names(positions: Any) -> str:
    return " and ".join(sorted(positions)) or "no"


def top_k_loss(signal: dict[str, Tensor]) -> tuple[TopKForwardKL, tuple[Tensor, ...]]:
    """The row loss of forward_kl against a top-k signal, and the tensors [R, ...] that it takes beside the rows."""
    return TopKForwardKL(), (signal["ids"].long(), signal["log_probs"], signal["tail"])


# ---- what was said of a sample ---------------------------------------------------------------------------------------


class Speaker:
    """Looks up samples in a cache and checks that the student predicts the same tokens at the same rows."""

    def __init__(self, teacher: CachedTower, student: Tower, terms: Sequence[Term]):
        self.teacher, self.student = teacher, student
        self.positions = positions_of(terms)
        self.features = any(t.kind == "feature_match" for t in terms)
        self._keys: dict[int, bytes] = {}  # by the sample's place; a picture is hashed once

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises DataError for samples whose texts are not in the cache."""
        missing = self.teacher.cache.missing(samples)
        if missing:
            names = ", ".join(repr(s.id) for s in missing[:3])
            raise DataError(
                f"{len(missing):,} of {len(samples):,} samples are not in the teacher cache {self.teacher.cache.folder} (first: "
                f"{names}): the data or its prompts are others than it was written from; add them with "
                f"`mmkd cache RECIPE teacher.cache={self.teacher.cache.folder}`"
            )

    def __call__(self, index: int, sample: Sample, encoded: Encoded) -> Said:
        """What the teacher said of a sample that the student prepared as `encoded`. Raises DataError, ImageError."""
        if index not in self._keys:
            self._keys[index] = content_key(sample)
        said = self.teacher.cache.entry(self._keys[index], self.positions, self.features)
        if said is None:
            raise DataError(
                f"sample {sample.id!r} is not in the teacher cache {self.teacher.cache.folder}, though its text is: its pictures "
                f"changed; add it with `mmkd cache RECIPE teacher.cache={self.teacher.cache.folder}`"
            )
        self._check_tokens(encoded, said)
        return said

    def _check_tokens(self, encoded: Encoded, said: Said) -> None:
        inputs = self.student.collate([Encoded(encoded.id, encoded.input_ids, encoded.targets, {}, encoded.images)])
        tokens = torch.where(inputs.response, inputs.targets, inputs.next_ids)  # [1, L]
        for name in sorted(self.positions):
            own, other = tokens[rows_at(inputs, name)], said.tokens[said.where([name])].long()
            if len(own) != len(other) or (name != "visual" and not torch.equal(own, other)):
                raise DataError(
                    f"sample {encoded.id!r}: the student has {len(own)} {name} rows, the cached teacher {len(other)}, or others; "
                    "both need the same tokenizer and chat template, max_length must hold the answer in both, and terms on "
                    "visual positions need as many visual tokens in both"
                )
