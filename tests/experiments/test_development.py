"""The tasks of development.py: text of the standard library, and noise on images."""

from __future__ import annotations

import argparse

import pytest
import torch

from experiments.selection import development


def test_the_text_is_docstrings():
    text = development.docstrings()
    assert len(text) == development.CHARACTERS and text == text.lower()
    assert " ".join(argparse.ArgumentParser.__doc__.lower().split()) in text


def test_every_minibatch_has_noise_of_its_own(tmp_path):
    tasks = development.development_tasks(tmp_path)
    kinds = [name.split()[0] for name in tasks]
    assert kinds == ["gru", "lstm", "transformer", "conv", "conv", "conv", "resnet"]
    noisy, _ = tasks["conv batch"]
    x, y = noisy.batch(0, 1)
    clean, labels = noisy.task.batch(0, 1)
    assert y.equal(labels) and x.equal(noisy.batch(0, 1)[0])
    noise, other = x - clean, noisy.batch(0, 2)[0] - noisy.task.batch(0, 2)[0]
    assert noise.std().item() == pytest.approx(development.NOISE, rel=0.05)
    assert torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1].abs() < 0.05
