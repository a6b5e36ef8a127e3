"""Measurements of this library on the machine at hand."""

from fedsa_secure.bench.secagg import bench_secagg, seed_note
from fedsa_secure.reporting.rows import Row, write_rows

__all__ = ["Row", "bench_secagg", "seed_note", "write_rows"]
