"""One check per exercise. Each takes the student's function or value and finds the right one by another route.

The functions below are all that notebooks use; a module has those of one notebook. `graded` has the same ones for
nbgrader, which fail while an exercise is open.
"""

from types import SimpleNamespace

from tclib.nb.teaching.checks.check_after import error_share
from tclib.nb.teaching.checks.check_blind import blind_rule, keys_too, moved_rule
from tclib.nb.teaching.checks.check_circuits import invariant, one_layer, two_tokens
from tclib.nb.teaching.checks.check_cross_layer import cross_removal, equal_width, imitated
from tclib.nb.teaching.checks.check_dictionaries import label_fvu, orthogonal_pursuit
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
    ablation_value,
    backward_difference,
    balanced_share,
    fair_start,
    keep_live,
    moving_head,
    warmer,
)
from tclib.nb.teaching.checks.check_routes import integrated, visible_part
from tclib.nb.teaching.checks.check_search import attention_moves, path_search, removal
from tclib.nb.teaching.checks.check_training import best_activation, dodge, transcoder
from tclib.nb.teaching.verdict import exercise

__all__ = [
    "ablation_value",
    "attention_moves",
    "auroc",
    "backward_difference",
    "balanced_share",
    "best_activation",
    "blind_rule",
    "cross_removal",
    "dodge",
    "equal_width",
    "error_share",
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
    "one_layer",
    "orthogonal_pursuit",
    "paired_interval",
    "path_search",
    "promoted",
    "read_front",
    "recovered_from_mean",
    "removal",
    "tokens_needed",
    "top_neurons",
    "transcoder",
    "two_tokens",
    "visible_part",
    "warmer",
]

graded = SimpleNamespace(**{name: exercise(globals()[name], graded=True) for name in __all__})
globals().update({name: exercise(globals()[name]) for name in __all__})
