"""Pure loss functions on tensors. They import nothing of mmkd, take no means over a batch, and shift
nothing."""

from mmkd.losses.adaptive_skew import AdaptiveSkewKL, AdaptiveSkewReverseKL, adaptive_lam
from mmkd.losses.dac import DACKL, DenseBand
from mmkd.losses.difference import DBiLD, dbild, kneedle_k
from mmkd.losses.divergence import (
    JSD,
    CrossEntropy,
    ForwardKL,
    ReverseKL,
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
)
from mmkd.losses.features import feature_match, tags
from mmkd.losses.first import FIRST, calibrated_c, expected_calibration_error
from mmkd.losses.forward_reverse import BDKD, AdaptiveKL, TopKLD
from mmkd.losses.plackett_luce import PLD
from mmkd.losses.preference import dpo, kto_pair
from mmkd.losses.pwce import PWCE, log_mean_perplexity
from mmkd.losses.ranking import contrastive, contrastive_partial_ranking, hard_negatives, valid_negatives
from mmkd.losses.relation import head_gram, relation, relation_from_hidden
from mmkd.losses.routing import balance_of_layers, choose_experts, load_balance
from mmkd.losses.sinkhorn import SinKD, union_of_top
from mmkd.losses.skew import SkewKL, SkewReverseKL
from mmkd.losses.span_consistency import SpanConsistency, span_pairs
from mmkd.losses.spans import sorted_distance, span_events, spans
from mmkd.losses.swing import Swing
from mmkd.losses.taid import TAID, TAIDSchedule
from mmkd.losses.topk import TopKForwardKL, TopKJSD, top_k_forward_kl, top_k_jsd

__all__ = [
    "BDKD",
    "DACKL",
    "FIRST",
    "JSD",
    "PLD",
    "PWCE",
    "TAID",
    "AdaptiveKL",
    "AdaptiveSkewKL",
    "AdaptiveSkewReverseKL",
    "CrossEntropy",
    "DBiLD",
    "DenseBand",
    "ForwardKL",
    "ReverseKL",
    "SinKD",
    "SkewKL",
    "SkewReverseKL",
    "SpanConsistency",
    "Swing",
    "TAIDSchedule",
    "TopKForwardKL",
    "TopKJSD",
    "TopKLD",
    "adaptive_lam",
    "balance_of_layers",
    "calibrated_c",
    "choose_experts",
    "contrastive",
    "contrastive_partial_ranking",
    "cross_entropy",
    "dbild",
    "dpo",
    "expected_calibration_error",
    "feature_match",
    "forward_kl",
    "hard_negatives",
    "head_gram",
    "jsd",
    "kneedle_k",
    "kto_pair",
    "load_balance",
    "log_mean_perplexity",
    "relation",
    "relation_from_hidden",
    "reverse_kl",
    "sorted_distance",
    "span_events",
    "span_pairs",
    "spans",
    "tags",
    "top_k_forward_kl",
    "top_k_jsd",
    "union_of_top",
    "valid_negatives",
]
