"""Shared by the tests of what learns: a random model of a few thousand weights in an ordinary folder."""

import copy
import os
import sys

import pytest

if "gpu" in sys.argv:                  # pytest -m gpu; processes that it starts know by the environment
    os.environ["GPU_TESTS"] = "1"
if "GPU_TESTS" not in os.environ:      # else all is as on a machine without a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""

os.environ.setdefault("OMP_NUM_THREADS", "1")      # else two processes' threads would wait for two cores

import harness  # noqa: F401, before torch: see there
import torch

if not torch.cuda.is_available():
    # Before anything imports triton. KERNELS=triton then runs kernels here.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import envs
from games import rails
from games.verifier import SPACES
from harness import tiny
from harness.environments import training_mixture
from harness.settings import Args, apply_preset
from llama.config import Config
from llama.processor import Processor
from model import Llama



def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and pytest -m gpu")


@pytest.fixture
def poison(monkeypatch):
    """Return a function; once it is called, new memory holds NaN until something is written there."""
    def poison():
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            def poisoned(*args, inner=getattr(owner, name), **kw):
                tensor = inner(*args, **kw)
                return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor
            monkeypatch.setattr(owner, name, poisoned)

    return poison


@pytest.fixture(scope="session", autouse=True)
def working_folder(tmp_path_factory):
    """Make built-in cities once for all tests, in a folder where processes that start there find them."""
    folder = tmp_path_factory.mktemp("work")
    rails.BUILT_IN = folder / rails.BUILT_IN
    return folder


def small_config():
    config = copy.deepcopy(tiny.CONFIG)
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                              "cross_attention_layers": [1]}
    config["vision_config"] |= {"hidden_size": 16, "intermediate_size": 24, "attention_heads": 2,
                                "num_hidden_layers": 1, "intermediate_layers_indices": [1],
                                "vision_output_dim": 32}
    return config


@pytest.fixture(scope="session")
def small(tmp_path_factory, working_folder):
    """Make the tiny model smaller, with open gates so that the image matters: (folder, model, processor)."""
    args = apply_preset(Args(task="gp-vl", algo="pretrain"), 0)
    config = Config.from_dict(small_config())
    mixture = training_mixture(args) + [(envs.Navigation(rule=rule), 1.0) for rule in SPACES]
    apart = "|".join(game.apart for game in envs.GAMES.values())
    tokenizer = tiny.train_tokenizer(mixture, config.vocab_size, apart)
    processor = Processor(tokenizer, image_config=tiny.IMAGES)
    model = Llama(config)
    model.init_weights(seed=1, std=0.1)
    for name, parameter in model.named_parameters():
        if parameter.numel() == 1:
            torch.nn.init.constant_(parameter, 0.7)
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@pytest.fixture
def model(small):
    """Copy the small model: tests may train it."""
    return copy.deepcopy(small[1])


@pytest.fixture
def processor(small):
    return small[2]
