"""Fixtures that several test files share, such as both models of each family. conftest.py loads this file."""

import functools

import pytest
import torch

from tests.byte_models import ask, assert_refused, call_cli, chat_model, recall_model  # noqa: F401  (fixtures)
from tests.cpu_kernels import library, threads  # noqa: F401  (fixtures)
from tests.tiny import make_hf, to_ours

torch.set_num_threads(1)  # a second thread slows models this small


@pytest.fixture(scope="session")
def both_models():
    """family -> (the model in transformers, ours with kernels or in plain PyTorch), float32"""

    @functools.cache
    def make(family: str, use_kernels: bool = True):
        theirs = make_hf(family)
        return theirs, to_ours(theirs, use_kernels)

    return make
