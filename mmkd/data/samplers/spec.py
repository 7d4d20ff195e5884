"""How a recipe describes the order of a stage's samples."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from torch.utils.data import Sampler

from mmkd.base.schema import Strict
from mmkd.data.samplers import SampleOrder
from mmkd.data.samples import Sample
from mmkd.errors import did_you_mean
from mmkd.registry import options_of, registry


class SamplerSpec(Strict):
    model_config = ConfigDict(extra="allow")  # the options of the kind: fields of its class

    kind: str  # a name of `mmkd list samplers`

    @model_validator(mode="after")
    def known(self) -> SamplerSpec:
        known = registry("samplers")
        if self.kind not in known:
            raise ValueError(f"there is no sampler {self.kind!r}; {did_you_mean(self.kind, known)}")
        found = known.get(self.kind)
        wrong = [name for name in (self.model_extra or {}) if name not in options_of(found)]
        if wrong:
            raise ValueError(f"{self.kind} has no option {wrong[0]!r}; {did_you_mean(wrong[0], options_of(found))}")
        try:
            TypeAdapter(found).validate_python(self.model_extra or {})
        except ValidationError as error:
            told = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise ValueError("; and ".join(told)) from error
        return self

    def order(self) -> SampleOrder:
        """The sampler that this describes."""
        return TypeAdapter(registry("samplers").get(self.kind)).validate_python(self.model_extra or {})

    def build(
        self, samples: Sequence[Sample], sizes: Sequence[int], batch_size: int, seed: int
    ) -> Sampler[int] | Sequence[int] | None:
        """See `SampleOrder.build`."""
        return self.order().build(samples, sizes, batch_size, seed)
