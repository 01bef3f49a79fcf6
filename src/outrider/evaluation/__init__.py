"""Scores of trained models."""

from outrider.evaluation.bits_per_byte import evaluate_corpus
from outrider.model.likelihood import Score

__all__ = ["Score", "evaluate_corpus"]
