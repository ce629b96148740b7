"""Graph passes: each takes an FX graph and rewrites one pattern in it."""

from .absorb_order import AbsorbOrder as AbsorbOrder
from .basis_attention import BasisAttention as BasisAttention
from .canonicalize import Canonicalize as Canonicalize
from .factorize_linear import FactorizeLinear as FactorizeLinear
from .factorize_pair import FactorizePair as FactorizePair
from .lower import Lower as Lower
from .merge_siblings import MergeSiblings as MergeSiblings
from .rewrite import Record as Record
from .rewrite import Rewrite as Rewrite
from .rewrite import Skip as Skip
from .rewrite import run_passes as run_passes

FOR_GRAPH: tuple[type[Rewrite], ...] = (Canonicalize,)
"""What a captured graph gets once, whatever weights it is called with."""

FOR_WEIGHTS: tuple[type[Rewrite], ...] = (FactorizePair, FactorizeLinear, AbsorbOrder)
"""What depends on the weights' values; pairs before single weights, since a pair's first has full rank by itself."""

FOR_DEVICE: tuple[type[Rewrite], ...] = (Lower, MergeSiblings)
"""What depends on the device and on what is compiled for it."""

DEFAULT_PASSES = (*FOR_GRAPH, *FOR_WEIGHTS, *FOR_DEVICE)
"""The pipeline of the backend "pifa", in order; it runs the three parts one by one."""
