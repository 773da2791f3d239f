"""Of the tests of training: a tiny target, texts with its features, and a drafter for it."""

import pytest
import torch

from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from tests.support.tiny import write_target
from tools.training.drafter import Shape, TrainedDrafter
from tools.training.features import write_features
from tools.training.target import LlamaTarget

MASK = 5


@pytest.fixture
def eager():
    """Compiling the training's functions would take longer than all of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def target(folder):
    return LlamaTarget(load_checkpoint(folder), positions=512)


@pytest.fixture
def drafter(target, request):
    shape = Shape.of(target, 2, (0, 2), 4, MASK, **getattr(request, "param", {}))
    made = TrainedDrafter(shape, target.norm, torch.rand(2 * target.hidden) + 0.5, seed=3)
    for weight in made.parameters():  # o and down start at zero, which would hide the layers
        weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.1
    return made


@pytest.fixture(scope="module")
def written(folder, target, tmp_path_factory):
    rows = [{"source": "t", "prompt": "p" * (1 + i % 5), "answer": "".join(chr(97 + (i * j) % 26) for j in range(20)),
             "temperature": 0.0 if i % 4 else 0.8, "finish": "stop" if i % 2 else "length"} for i in range(48)]
    return rows, write_features(target, load_tokenizer(folder), rows, (0, 2), tmp_path_factory.mktemp("f"), rows=64)
