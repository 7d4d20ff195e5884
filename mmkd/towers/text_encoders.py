"""A text encoder for dual encoders from random weights: the mean of a text's word embeddings, behind a linear layer.

It is a registered `PreTrainedModel` with a pooled output, so that a dual encoder built on it saves and loads like any other
(after `import mmkd.towers.text_encoders`). A transformer needs far more captions before it reads better than this.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


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
        """torch's own rules stand: a mean over words drawn with the usual deviation of 0.02 would start near zero."""

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


AutoConfig.register(BagOfWordsConfig.model_type, BagOfWordsConfig)
AutoModel.register(BagOfWordsConfig, BagOfWords)
