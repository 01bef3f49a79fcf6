"""How fast a recipe trains on this machine, from a few steps of the real thing."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from outrider.devices import autocast, pick_device, synchronize
from outrider.model.llama import Llama
from outrider.recipe import Recipe
from outrider.training.objectives import next_token
from outrider.training.optimizers import build_optimizer


def measured_tokens_per_second(recipe: Recipe, steps: int = 4) -> float:
    """Return tokens per second over `steps` optimiser steps on random tokens, after one to warm up.

    Nothing is read or written; the recipe must give a shape (not a folder to start from).
    """
    settings = recipe.training
    device = pick_device(settings.device)
    model = Llama(recipe.model_shape(tokenizer_size=2)).to(device)
    model.reset_parameters()
    optimizer = build_optimizer(model, recipe.optimizer, device)
    tokens = torch.randint(0, model.config.vocab_size, (recipe.batch_windows, settings.context + 1), device=device)
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with autocast(device, settings.precision):
            loss = next_token(model, tokens[:, :-1], tokens[:, 1:])
        (loss / settings.batch_tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return settings.batch_tokens / statistics.median(times[1:])
