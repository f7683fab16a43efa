"""Every config file gives a valid run, and flags can override it."""

import importlib
import pathlib

import pytest
from ml_collections import config_flags

from qedjax.model.config import validate as validate_model
from qedjax.train.sft import SFTConfig, validate

NAMES = sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))


@pytest.mark.parametrize('name', NAMES)
def test_config_is_valid_and_documented(name):
    module = importlib.import_module(f'configs.{name}')
    cfg = module.get_config()
    assert isinstance(cfg, SFTConfig)
    validate(cfg)
    validate_model(cfg.model)
    assert f'configs/{name}.py' in module.__doc__  # the command


def test_qed_nano_sft_is_the_recipe():
    cfg = importlib.import_module('configs.qed_nano_sft').get_config()
    assert (cfg.steps, cfg.save_every, cfg.evaluate_every, cfg.row_length) == (620, 124, 124, 45_056)
    assert (cfg.optimizer.learning_rate, cfg.optimizer.schedule, cfg.optimizer.warmup_fraction) == (3e-5, 'cosine', 0.03)


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # of ml_collections
def test_nested_fields_are_overridden_by_flags():
    from absl import flags

    values = flags.FlagValues()
    path = pathlib.Path(__file__).parents[1] / 'configs/tiny_sft.py'
    argv = ['test', f'--config={path}', '--config.model.num_layers=3', '--config.optimizer.learning_rate=0.5', '--config.train.limit=7']
    config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    assert (values.config.model.num_layers, values.config.optimizer.learning_rate, values.config.train.limit) == (3, 0.5, 7)
