"""Shared by the tests of what learns: a random model of a few thousand weights in an ordinary folder."""

import copy
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")             # before anything imports triton; KERNELS=triton then runs kernels here

import envs
from harness.settings import apply_preset
from games import rails
from games.verifier import SPACES
from llama.config import Config
from llama.processor import Processor
from model import Llama
from harness import tiny
from harness.environments import training_mixture
from harness.settings import Args
from harness.tiny import CONFIG as TINY, IMAGES as TINY_IMAGES

torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def working_folder(tmp_path_factory):
    """A folder in which built-in cities are made once for all tests; a process that is started there finds them, too."""
    folder = tmp_path_factory.mktemp("work")
    rails.BUILT_IN = folder / rails.BUILT_IN
    return folder


def small_config():
    config = copy.deepcopy(TINY)
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    config["vision_config"] |= {"hidden_size": 16, "intermediate_size": 24, "attention_heads": 2, "num_hidden_layers": 1,
                                "intermediate_layers_indices": [1], "vision_output_dim": 32}
    return config


@pytest.fixture(scope="session")
def small(tmp_path_factory, working_folder):
    """(folder, model, processor): the tiny model made smaller, with open gates so that the image matters."""
    args = apply_preset(Args(task="gp-vl", algo="pretrain"), 0)
    config = Config.from_dict(small_config())
    mixture = training_mixture(args) + [(envs.Navigation(rule=rule), 1.0) for rule in SPACES]
    tokenizer = tiny.train_tokenizer(mixture, config.vocab_size, "|".join(game.apart for game in envs.GAMES.values()))
    processor = Processor(tokenizer, image_config=TINY_IMAGES)
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
    """A fresh copy of the small model: tests may train it."""
    return copy.deepcopy(small[1])


@pytest.fixture
def processor(small):
    return small[2]
