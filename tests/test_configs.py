"""Every config file gives a valid run, and flags can override it."""

import dataclasses
import importlib
import pathlib

import pytest
from ml_collections import config_flags

from qedjax.grading import judge
from qedjax.llm import remote
from qedjax.model.config import validate as validate_model
from qedjax.plan.chips import parse_topology
from qedjax.plan.runs import plan
from qedjax.prompts import load
from qedjax.rl.config import RLConfig
from qedjax.rl.config import validate as validate_rl
from qedjax.train.sft import SFTConfig, validate

NAMES = sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))


@pytest.mark.parametrize('name', NAMES)
def test_config_is_valid_and_documented(name):
    module = importlib.import_module(f'configs.{name}')
    cfg = module.get_config()
    learns = name.endswith(('_rl', '_rc'))
    assert isinstance(cfg, RLConfig if learns else SFTConfig)
    (validate_rl if learns else validate)(cfg)
    validate_model(cfg.model)
    if learns and cfg.grader == 'judge':
        judge.validate(cfg.judge)
        remote.validate(cfg.judge.remote)
    assert f'configs/{name}.py' in module.__doc__  # the command


HARDWARE = {'v5p-64': 'v5p:4x4x4', 'v6e-64': 'v6e:8x8', 'v5e-256': 'v5e:16x16', 'h100-8': 'h100:8'}
RECIPE = [(name, hardware) for name in ('qed_nano_sft', 'qed_nano_rl', 'qed_nano_rc') for hardware in HARDWARE]


def recipe(name, hardware='v5p-64'):
    return importlib.import_module(f'configs.{name}').get_config(hardware)


@pytest.mark.parametrize(('name', 'hardware'), RECIPE)
def test_the_recipe_fits_all_hardware_and_differs_in_layout_alone(name, hardware):
    cfg = recipe(name, hardware)
    made = plan(cfg, parse_topology(HARDWARE[hardware]), compile=False)
    assert made.fits
    if made.rollout:
        assert made.rollout.in_flight >= made.rollout.engines
        assert made.rollout.cache_tokens <= made.rollout.fitting_tokens
    layout = {'model', 'mesh', 'accumulation', 'micro_rows', 'tensor', 'engine'}
    if hardware == 'h100-8':  # one document a row: twice the rows are as many documents
        layout.add('batch_size')
    other = recipe(name)
    assert all(getattr(cfg, field.name) == getattr(other, field.name) for field in dataclasses.fields(cfg) if field.name not in layout)
    assert (cfg.model.attention, cfg.model.paged_attention)[:1 + bool(made.rollout)] == (
        ('cudnn', 'xla') if hardware == 'h100-8' else ('splash', 'ragged'))[:1 + bool(made.rollout)]


@pytest.mark.parametrize('hardware', HARDWARE)
def test_sft_fits_rows_of_the_length_of_rl(hardware):
    cfg = dataclasses.replace(recipe('qed_nano_sft', hardware), row_length=49_920)
    assert plan(cfg, parse_topology(HARDWARE[hardware]), compile=False).fits


@pytest.mark.parametrize('name', ['qed_nano_sft', 'qed_nano_rl', 'qed_nano_rc'])
def test_unknown_hardware_is_one_sentence(name):
    with pytest.raises(ValueError, match='choose one of v5p-64, v6e-64, v5e-256, h100-8') as error:
        recipe(name, 'Qwen3-4B-Thinking-2507')
    assert '\n' not in str(error.value)
    assert '--config.init' in str(error.value)


def test_qed_nano_sft_is_the_recipe():
    cfg = recipe('qed_nano_sft')
    assert (cfg.steps, cfg.save_every, cfg.evaluate_every, cfg.row_length) == (620, 124, 124, 45_056)
    assert (cfg.optimizer.learning_rate, cfg.optimizer.schedule, cfg.optimizer.warmup_fraction) == (3e-5, 'cosine', 0.03)


def test_qed_nano_rl_is_the_recipe():
    cfg = recipe('qed_nano_rl')
    assert (cfg.groups, cfg.group_size, cfg.max_tokens, cfg.temperature, cfg.row_length) == (64, 16, 49_152, 0.8, 49_920)
    objective = cfg.objective
    assert (objective.loss, objective.clip_low, objective.clip_high, objective.kl_coef, objective.entropy_coef) == ('ppo', 4, 4, 0, 1e-4)
    assert (objective.advantage, objective.normaliser, objective.overlong, objective.zero_variance) == ('mean', 'samples', 'zero', 'keep')
    optimizer = cfg.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_fraction, optimizer.weight_decay, optimizer.clip_norm) == (
        1e-6, 'constant', 0.0, 0.01, 0.3)
    assert (cfg.judge.remote.api, cfg.judge.remote.effort) == ('responses', 'medium')
    assert (cfg.judge.temperature, cfg.judge.max_tokens) == (1, 81_920)


def test_qed_nano_rc_is_the_recipe():
    cfg, rl = (recipe(f'qed_nano_{name}') for name in ('rc', 'rl'))
    chains, decoding = cfg.chains, cfg.chains.decoding
    assert (chains.states, decoding.turns, decoding.mode, cfg.steps, cfg.groups, cfg.group_size) == (2, 3, 'replace', 25, 64, 16)
    assert (decoding.reason.max_tokens, decoding.reason.temperature, cfg.max_tokens) == (49_152, 0.8, 49_152)
    assert dataclasses.astuple(decoding.summarise) == (2048, 0.7, 0.8, 20)
    assert (cfg.optimizer, cfg.objective, cfg.judge) == (rl.optimizer, rl.objective, rl.judge)
    assert rl.problems.prompt == load(decoding.prompts.first)  # the two stages put a problem in the same words


@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')  # of ml_collections
def test_nested_fields_are_overridden_by_flags():
    from absl import flags

    values = flags.FlagValues()
    path = pathlib.Path(__file__).parents[1] / 'configs/tiny_sft.py'
    argv = ['test', f'--config={path}', '--config.model.num_layers=3', '--config.optimizer.learning_rate=0.5', '--config.train.limit=7']
    config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values, sys_argv=argv)
    values(argv)
    assert (values.config.model.num_layers, values.config.optimizer.learning_rate, values.config.train.limit) == (3, 0.5, 7)
