"""The PIFA operator, its reference and its hardware forms."""

from .linear import linear as linear
from .linear import linear_ref as linear_ref
