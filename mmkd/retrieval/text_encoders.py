"""Text encoders for dual encoders that transformers does not have.

`BagOfWords`, from random weights: the mean of a text's word embeddings, behind a linear layer; a transformer needs far more
captions before it reads better than this. `SentenceEncoder`, over any pretrained encoder: the mean of its last states, as
sentence encoders are pooled; trained or frozen. Both are registered `PreTrainedModel`s with a pooled output, so that a dual
encoder built on them saves and loads like any other (after `import mmkd.retrieval.text_encoders`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

STATE_BYTES = 2**28  # states of texts that a frozen encoder keeps, about


class BagOfWordsConfig(PreTrainedConfig):
    """Configuration of a bag of words.

    vocab_size and the ids of the special tokens are the tokenizer's; special tokens and padding do not count as words.
    hidden_size: width D of the embeddings and of the pooled output.  max_position_embeddings: tokens that it reads at most.
    """

    model_type = "mmkd_bag_of_words"

    def __init__(
        self,
        vocab_size: int = 1000,
        hidden_size: int = 64,
        max_position_embeddings: int = 512,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        super().__init__(**kwargs)

    def special_ids(self) -> list[int]:
        ids = (self.pad_token_id, self.bos_token_id, self.eos_token_id)
        return [number for number in ids if number is not None]


class BagOfWords(PreTrainedModel):
    """Token ids [n, L] -> embeddings [n, L, D] and, pooled, a linear map of the mean over a text's words [n, D]."""

    config_class = BagOfWordsConfig
    main_input_name = "input_ids"
    base_model_prefix = "bag_of_words"
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: BagOfWordsConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation is kept: a mean over words drawn with the usual deviation of 0.02 would start near zero."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPooling:
        """A text without any known word gets the linear map of zero."""
        words = self._words(input_ids, attention_mask)  # [n, L]
        states = self.embeddings(input_ids)  # [n, L, D]
        mean = (states * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp(min=1)  # [n, D]
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.output(mean))

    def _words(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """1 for tokens that count, 0 for the others. [n, L]"""
        special = torch.tensor(self.config.special_ids(), device=input_ids.device)
        words = ~torch.isin(input_ids, special)
        if attention_mask is not None:
            words &= attention_mask.bool()
        return words.to(self.embeddings.weight.dtype)


class SentenceConfig(PreTrainedConfig):
    """Configuration of a sentence encoder.

    encoder: configuration of the encoder beneath.  frozen: its weights are not trained, and its states are kept by text.
    """

    model_type = "mmkd_sentence"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder": AutoConfig}

    def __init__(self, encoder: dict[str, Any] | PreTrainedConfig | None = None, frozen: bool = False, **kwargs: Any):
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.frozen = frozen
        super().__init__(**kwargs)
        self.encoder = encoder  # last: `super().__init__` would reset what was chosen for it, such as its attention

    @property
    def hidden_size(self) -> int:
        return self.encoder.hidden_size

    @property
    def max_position_embeddings(self) -> int:
        return self.encoder.max_position_embeddings


class SentenceEncoder(PreTrainedModel):
    """Token ids [n, L] -> the encoder's states [n, L, D] and, pooled, their mean over each text's tokens [n, D].

    The mean has a root mean square of 1 (our choice; sentence encoders give it unit length), so that what is learned on top
    starts like on a normalised layer. Frozen, the encoder stays in evaluation mode, and each text is read once.
    """

    config_class = SentenceConfig
    main_input_name = "input_ids"
    base_model_prefix = "sentence"
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: SentenceConfig, encoder: nn.Module | None = None):
        super().__init__(config)
        self.encoder = encoder if encoder is not None else AutoModel.from_config(config.encoder)
        self._kept: dict[tuple[int, ...], Tensor] = {}  # states by token ids, of a frozen encoder
        self._kept_bytes = 0
        self.register_load_state_dict_pre_hook(SentenceEncoder._forget)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The encoder keeps its own initialisation."""

    def _forget(self, *_: Any) -> None:
        self._kept, self._kept_bytes = {}, 0

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def train(self, mode: bool = True) -> SentenceEncoder:
        super().train(mode)
        if self.config.frozen:
            self.encoder.eval()
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPooling:
        """States of padding are zero when the encoder is frozen."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read = self._recall if self.config.frozen else self._read
        states = read(input_ids, mask)  # [n, L, D]
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # [n, D]
        pooled = F.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)

    def _read(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=mask, return_dict=True).last_hidden_state

    @torch.no_grad()
    def _recall(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Kept states of texts that were read before, new ones of the others. [n, L, D]"""
        counts = mask.bool()
        texts = [tuple(ids[row].tolist()) for ids, row in zip(input_ids, counts, strict=True)]
        new = [place for place, text in enumerate(texts) if text not in self._kept]
        known = {text: self._kept[text] for text in texts if text in self._kept}
        if new:
            fresh = self._read(input_ids[new], mask[new])  # [m, L, D]
            known |= {texts[place]: states[counts[place]] for place, states in zip(new, fresh, strict=True)}
            self._keep({texts[place]: known[texts[place]] for place in new})
        found = torch.cat([known[text] for text in texts])  # [tokens, D]
        states = found.new_zeros(*input_ids.shape, found.shape[-1])
        states[counts] = found
        return states

    def _keep(self, states: dict[tuple[int, ...], Tensor]) -> None:
        if self._kept_bytes < STATE_BYTES:
            self._kept |= states
            self._kept_bytes += sum(tensor.nbytes for tensor in states.values())


AutoConfig.register(BagOfWordsConfig.model_type, BagOfWordsConfig)
AutoModel.register(BagOfWordsConfig, BagOfWords)
AutoConfig.register(SentenceConfig.model_type, SentenceConfig)
AutoModel.register(SentenceConfig, SentenceEncoder)
