"""RL of SmolLM2-135M on one-step word problems, graded by the final answer.

python launch/rl.py --config=configs/smollm2_wordproblems_rl.py:runs/wordproblems --workdir=runs/wordproblems/rl

The argument is the folder of the data and of the SFT run (see smollm2_wordproblems_sft.py). Accuracy at T=1 on 160 held-out problems goes
from 0.30 to 0.36-0.40 on three seeds (docs/measurements.md); some minutes on a GPU.
"""

from qedjax.data.sources import Source
from qedjax.model.config import ModelConfig
from qedjax.rl.config import EvaluationConfig, RLConfig
from qedjax.rl.losses import ObjectiveConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig
from qedjax.train.optimizer import OptimizerConfig


def get_config(folder: str = 'runs/wordproblems') -> RLConfig:
    return RLConfig(
        init=f'{folder}/sft',
        model=ModelConfig(param_dtype='float32', dtype='float32', attention_block=128, remat='none'),
        train=Source(f'{folder}/train.jsonl'),
        problems=ProblemsConfig(max_prompt=160),
        grader='answers',
        group_size=8,
        groups=6,
        steps=24,
        temperature=1.0,
        max_tokens=48,
        objective=ObjectiveConfig(zero_variance='refill'),
        optimizer=OptimizerConfig(learning_rate=2e-5, schedule='constant', warmup_fraction=0.0, b2=0.98, clip_norm=0.3),
        mesh=MeshConfig(data=-1, fsdp=1),
        engine=EngineConfig(slots=32, staged=32, steps=8, prefill_tokens=512, prefill_rows=(4, 1)),
        row_length=512,
        micro_rows=1,
        evaluation=EvaluationConfig(Source(f'{folder}/held_out.jsonl'), samples=4),
        save_every=6,
    )
