"""RL with rubric rewards on FineProofs-RL: the second stage of QED-Nano (arXiv 2604.04898).

python launch/rl.py --config=configs/qed_nano_rl.py:runs/sft --workdir=/mnt/shared/rl \\
    --config.judge.remote.base_url=http://GRADER:8000/v1

The argument is the SFT run (the reference starts from its third epoch). Reference settings: 64 problems x 16 answers of at most 49,152
tokens a step at temperature 0.8, 150 steps; advantages centred in the group; PPO with eps 4 on token sums over the sample count, entropy
1e-4, no KL; AdamW at a constant 1e-6, weight decay 0.01, gradient norm clipped to 0.3. The grader is gpt-oss-20b at medium effort and
temperature 1 through the responses API.

Where we depart from it: problems that 128 answers never or always solved are left out (3% and 2% of the file); a ratio of log-probs
counts at most tenfold where the advantage is negative (the reference bounds it for positive ones alone); groups with a token more than 5
versions old are dropped (the reference has no bound); an answer that the grader could not grade leaves the group (there it counts 0).

Never run by us at this size; docs/measurements.md has what was measured.
"""

from qedjax.data.sources import Source
from qedjax.grading.judge import JudgeConfig
from qedjax.llm.remote import RemoteConfig
from qedjax.model.config import ModelConfig
from qedjax.prompts import load
from qedjax.rl.config import EvaluationConfig, RLConfig
from qedjax.rl.losses import ObjectiveConfig
from qedjax.rl.problems import ProblemsConfig
from qedjax.rollout.engine_config import EngineConfig
from qedjax.sharding import MeshConfig

COLUMNS = 'rubric=rubrics,difficulty=reward_mean'


def get_config(checkpoint: str = 'runs/sft') -> RLConfig:
    return RLConfig(
        init=checkpoint,
        model=ModelConfig(param_dtype='float32', dtype='bfloat16', attention='splash', remat='full', paged_attention='ragged'),
        train=Source('hub:lm-provers/FineProofs-RL', columns=COLUMNS),
        problems=ProblemsConfig(prompt=load('prove'), max_prompt=768, least=0.0, most=0.99),
        grader='judge',
        judge=JudgeConfig(remote=RemoteConfig('http://localhost:8000/v1', 'openai/gpt-oss-20b', 'responses', effort='medium')),
        group_size=16,
        groups=64,
        steps=150,
        temperature=0.8,
        max_tokens=49_152,
        max_lag=5,
        in_flight=128,
        objective=ObjectiveConfig(ratio_cap=10.0),
        mesh=MeshConfig(fsdp=16, context=4),
        engine=EngineConfig(slots=512, staged=128, page_size=128, cache_tokens=2**22, steps=32, prefill_tokens=2048),
        tensor=4,
        row_length=49_920,
        micro_rows=16,
        evaluation=EvaluationConfig(Source('hub:lm-provers/FineProofs-RL-test', columns=COLUMNS, split='test'), every=12,
                                    temperature=0.8, top_p=0.95, top_k=20),
        save_every=5,
        keep=5,
    )
