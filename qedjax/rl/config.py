"""The config of an RL run, and what can be said against it before anything is read."""

import dataclasses
import math

from qedjax.data.sources import Source
from qedjax.grading.judge import JudgeConfig
from qedjax.model.config import ModelConfig
from qedjax.rl import chains as chain_settings
from qedjax.rl import losses
from qedjax.rl import problems as problem_settings
from qedjax.rl.chains import ChainsConfig
from qedjax.rl.losses import ObjectiveConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine_config import EngineConfig
from qedjax.rollout.requests import MIN_TEMPERATURE
from qedjax.sharding import MeshConfig
from qedjax.train import optimizer as optimizers
from qedjax.train.optimizer import OptimizerConfig

GRADERS = ('derivations', 'answers', 'judge')


@dataclasses.dataclass(unsafe_hash=True)
class EvaluationConfig:
    """Evaluation on held-out problems.

    Attributes:
      source: of the problems; an empty path is no evaluation.
      every: steps between two; 0 is at the start and the end alone.
      samples: answers a problem.
      problems: how many of the source's first are used; 0 is all.
      temperature, top_p, top_k: of the answers.
    """

    source: Source = dataclasses.field(default_factory=Source)
    every: int = 0
    samples: int = 1
    problems: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclasses.dataclass(unsafe_hash=True)
class RLConfig:
    """One RL run.

    Attributes:
      init: Hugging Face or Orbax folder of the policy to start from; its tokenizer is used too.
      reference: folder of the reference model of the KL penalty; '' is `init`. Read only if objective.kl_coef is not 0.
      model: param_dtype, dtype, attention, attention_block, remat and paged_attention are taken from here, sizes from `init`.
      train: source of the problems. problems: how they are chosen and put. chains: states of reasoning-cache chains to train from.
      grader: 'derivations', 'answers' or 'judge'; `judge` configures the last.
      group_size: answers to a problem. groups: problems a step. steps: updates.
      temperature, max_tokens: of every answer.
      max_lag: versions that the oldest id of a trained answer may be behind; 0 is synchronous and reproducible.
      in_flight: groups that are sampled or graded at a time when max_lag is positive; with chains, draws of `chains.states` groups. Several
        processes share them equally, rounded up.
      objective, optimizer, mesh, engine: see there. `tensor` devices share the heads of the rollout engine's model.
      row_length: tokens a packed row; micro_rows: rows a micro-batch.
      evaluation: see there.
      save_every: steps; the last is always saved. keep: newest checkpoints kept besides the best.
      max_skipped: steps in a row that may be skipped because they are not finite, before the run stops.
      seed: of the data order and all sampling.
    """

    init: str = ''
    reference: str = ''
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    train: Source = dataclasses.field(default_factory=Source)
    problems: ProblemsConfig = dataclasses.field(default_factory=ProblemsConfig)
    chains: ChainsConfig = dataclasses.field(default_factory=ChainsConfig)
    grader: str = 'judge'
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    group_size: int = 16
    groups: int = 64
    steps: int = 150
    temperature: float = 0.8
    max_tokens: int = 49_152
    max_lag: int = 0
    in_flight: int = 0
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(
        learning_rate=1e-6, schedule='constant', warmup_fraction=0.0, weight_decay=0.01, clip_norm=0.3))
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    tensor: int = 1
    row_length: int = 49_920
    micro_rows: int = 1
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    save_every: int = 5
    keep: int = 2
    max_skipped: int = 10
    seed: int = 42


def validate(cfg: RLConfig) -> None:
    """Raises ValueError, in one sentence, for a run that cannot be started."""
    if not isinstance(cfg, RLConfig):
        raise ValueError(f'the config is a {type(cfg).__name__}; RL takes an RLConfig, such as that of configs/derivations_rl.py')
    optimizers.validate(cfg.optimizer)
    losses.validate(cfg.objective)
    problem_settings.validate(cfg.problems)
    chain_settings.validate(cfg.chains)
    if cfg.chains.states and (cfg.problems.prompt, cfg.problems.thinking) != ('{problem}', None):
        raise ValueError('with chains, a problem is put as the first turn of a chain: leave problems.prompt and problems.thinking alone '
                         'and set chains.decoding.prompts')
    if not cfg.init or not cfg.train.path:
        raise ValueError('RL needs a policy and problems: set --config.init to a checkpoint and --config.train.path to a file of problems')
    if cfg.grader not in GRADERS:
        raise ValueError(f'grader is {cfg.grader!r}; choose one of {", ".join(GRADERS)}')
    if not MIN_TEMPERATURE <= cfg.temperature < math.inf:
        raise ValueError(f'temperature={cfg.temperature} must be at least {MIN_TEMPERATURE}: greedy answers would all be alike')
    for name, least in (('group_size', 2), ('groups', 1), ('steps', 1), ('max_tokens', 1), ('max_lag', 0), ('in_flight', 0),
                        ('micro_rows', 1), ('save_every', 1), ('keep', 1), ('max_skipped', 1), ('tensor', 1)):
        if getattr(cfg, name) < least:
            raise ValueError(f'{name} must be at least {least}, not {getattr(cfg, name)}')
    if cfg.problems.max_prompt + cfg.max_tokens > cfg.row_length:
        raise ValueError(f'a prompt of problems.max_prompt={cfg.problems.max_prompt} and max_tokens={cfg.max_tokens} do not fit '
                         f'row_length={cfg.row_length}')
    if cfg.max_lag and cfg.in_flight < cfg.groups:
        raise ValueError(f'with max_lag={cfg.max_lag}, in_flight={cfg.in_flight} groups must be at least the {cfg.groups} of a step')
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f'seed must be in [0, 2^32), not {cfg.seed}')
    evaluation = cfg.evaluation
    sound = evaluation.temperature == 0 or MIN_TEMPERATURE <= evaluation.temperature < math.inf
    if not sound or evaluation.samples < 1 or min(evaluation.every, evaluation.problems) < 0:
        raise ValueError(f'evaluation needs temperature 0 or >= {MIN_TEMPERATURE}, samples >= 1, and every and problems >= 0: {evaluation}')
