"""Measurements with their provenance, and the report that shows them."""

from outrider.benchmarks.decode import DecodeBenchmark, benchmark_decode, read_prompts
from outrider.benchmarks.report import write_report

__all__ = ["DecodeBenchmark", "benchmark_decode", "read_prompts", "write_report"]
