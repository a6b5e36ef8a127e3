"""The memory that masking a large vector takes, in a process that does nothing else."""

import json
import subprocess
import sys
import time

from fedsa_secure.bench.rounds import Cohort, OneClient, sample_vector
from fedsa_secure.bench.timing import forget_peak_memory, peak_memory

VALUES, NEIGHBOURS = 100_000_000, 50


def masking_memory(values: int = VALUES, neighbours: int = NEIGHBOURS) -> tuple[int, float]:
    """Mask a vector in a process of its own.

    Args:
        values: in the vector.
        neighbours: of the client.

    Returns:
        Peak memory of that process in bytes, everything included, and the seconds of the masking.
    """
    done = subprocess.run(  # noqa: S603 - this very module
        [sys.executable, "-m", __name__, str(values), str(neighbours)],
        check=True,
        capture_output=True,
        text=True,
    )
    peak, seconds = json.loads(done.stdout)
    return int(peak), float(seconds)


def _main() -> None:
    values, neighbours = (int(argument) for argument in sys.argv[1:])
    one = OneClient(Cohort(neighbours + 1, values), sample_vector(values))
    forget_peak_memory()
    begun = time.perf_counter()
    one.mask()
    seconds = time.perf_counter() - begun
    sys.stdout.write(json.dumps([peak_memory(), seconds]))


if __name__ == "__main__":
    _main()
