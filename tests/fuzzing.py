"""What the attacks in `fuzz` share: how many cases, from which seed, and with how much memory."""

import random
import resource
import sys
from pathlib import Path


def asked() -> tuple[int, int]:
    """How many cases the command line asks for (COUNT [SEED]), and the first seed, which is printed."""
    count = int(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    print(f"seed {first}", flush=True)  # noqa: T201
    return count, first


def limit_memory(more: int) -> None:
    """From here on the process cannot take more than so many bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)
