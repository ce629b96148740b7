"""Low-rank models in PyTorch: PIFA, M, and a compiler for both (arXiv 2501.19090)."""

from . import interrupts as interrupts
from .backend import refresh as refresh
from .checkpoint import load_pretrained as load_pretrained
from .checkpoint import registration
from .checkpoint import save_pretrained as save_pretrained
from .compact import compact as compact
from .compress import compress as compress
from .compress_checkpoint import compress_checkpoint as compress_checkpoint
from .distill import distill as distill
from .distillation.config import DistillConfig as DistillConfig
from .errors import PifaError as PifaError
from .factors import PifaFactors as PifaFactors
from .factors import factorize as factorize
from .factors import rank_for_density as rank_for_density
from .linear import PifaLinear as PifaLinear
from .lora import registration as lora_registration
from .lora.merge import merge_lora as merge_lora
from .reconstruction.config import CompressConfig as CompressConfig
from .report import DistillReport as DistillReport
from .report import LayerReport as LayerReport
from .report import Report as Report

registration.install()
lora_registration.install()
