"""Learned optimizers for PyTorch: use one, train your own, benchmark it."""

from learned_opt.optimizer import LearnedOptimizer
from learned_opt.rules import UpdateRule, make_rule, register
from learned_opt.weights import load_rule, save_rule

__all__ = ["LearnedOptimizer", "UpdateRule", "load_rule", "make_rule", "register", "save_rule"]
