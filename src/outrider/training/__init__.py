"""Training: recipe in, model folder out.

    result = train(Recipe.load("recipes/laptop.toml", ["training.tokens=2M"]))
"""

from outrider.recipe import Recipe
from outrider.training.loop import TrainingResult, train

__all__ = ["Recipe", "TrainingResult", "train"]
