"""Graph passes: each takes an FX graph and rewrites one pattern in it."""

from .absorb_order import AbsorbOrder as AbsorbOrder
from .canonicalize import Canonicalize as Canonicalize
from .factorize_linear import FactorizeLinear as FactorizeLinear
from .factorize_pair import FactorizePair as FactorizePair
from .lower import Lower as Lower
from .merge_siblings import MergeSiblings as MergeSiblings
from .rewrite import Record as Record
from .rewrite import Rewrite as Rewrite
from .rewrite import Skip as Skip
from .rewrite import run_passes as run_passes

DEFAULT_PASSES: tuple[type[Rewrite], ...] = (
    Canonicalize,
    FactorizePair,
    FactorizeLinear,
    AbsorbOrder,
    Lower,
    MergeSiblings,
)
"""The pipeline, in order: pairs before single weights, since a pair's first weight has full rank by itself."""
