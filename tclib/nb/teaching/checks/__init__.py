"""One check per exercise. Each takes the student's function or value and finds the right one by another route.

The functions below are all that notebooks use; a module has those of one notebook.
"""

from tclib.nb.teaching.checks.check_blind import blind_rule, keys_too, moved_rule
from tclib.nb.teaching.checks.check_circuits import invariant, through_head, two_tokens
from tclib.nb.teaching.checks.check_cross_layer import cross_removal, equal_width, imitated
from tclib.nb.teaching.checks.check_dictionaries import code_bits, label_fvu, orthogonal_pursuit
from tclib.nb.teaching.checks.check_evaluation import (
    auroc,
    fvu_in_pieces,
    paired_interval,
    read_front,
    recovered_from_mean,
    top_neurons,
)
from tclib.nb.teaching.checks.check_features import name_scores, promoted, tokens_needed
from tclib.nb.teaching.checks.check_greater_than import (
    backward_difference,
    fair_start,
    keep_live,
    moving_head,
    one_reading,
    right_digits,
    warmer,
)
from tclib.nb.teaching.checks.check_routes import both_orders, integrated, visible_part
from tclib.nb.teaching.checks.check_search import attention_moves, path_contribution, removal
from tclib.nb.teaching.checks.check_training import best_activation, dodge, transcoder

__all__ = [
    "attention_moves",
    "auroc",
    "backward_difference",
    "best_activation",
    "blind_rule",
    "both_orders",
    "code_bits",
    "cross_removal",
    "dodge",
    "equal_width",
    "fair_start",
    "fvu_in_pieces",
    "imitated",
    "integrated",
    "invariant",
    "keep_live",
    "keys_too",
    "label_fvu",
    "moved_rule",
    "moving_head",
    "name_scores",
    "one_reading",
    "orthogonal_pursuit",
    "paired_interval",
    "path_contribution",
    "promoted",
    "read_front",
    "recovered_from_mean",
    "removal",
    "right_digits",
    "through_head",
    "tokens_needed",
    "top_neurons",
    "transcoder",
    "two_tokens",
    "visible_part",
    "warmer",
]
