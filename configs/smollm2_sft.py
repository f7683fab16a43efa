"""SFT of the pretrained SmolLM2-135M-Instruct on real olympiad proofs: the main job, small enough for a laptop.

python tools/proof_rows.py ... --output=runs/proofs        (see its docstring for the public files)
python launch/sft.py --config=configs/smollm2_sft.py:MODEL_DIR,runs/proofs --workdir=runs/smollm2
python tools/orbax_to_hf.py --orbax=runs/smollm2 --hf=runs/smollm2_hf --verify

MODEL_DIR is the Hugging Face folder of SmolLM2-135M-Instruct. Two CPU cores: about ten minutes; see docs/measurements.md for the loss on
held-out proofs.
"""

from qedjax.data.sources import Source
from qedjax.model.config import ModelConfig
from qedjax.sharding import MeshConfig
from qedjax.train.optimizer import OptimizerConfig
from qedjax.train.sft import SFTConfig


def get_config(folders: str = 'runs/smollm2_base,runs/proofs') -> SFTConfig:
    model, _, data = folders.partition(',')
    return SFTConfig(
        init=model,
        model=ModelConfig(param_dtype='float32', dtype='float32', remat='none'),
        train=Source(f'{data}/train.jsonl'),
        evaluation=Source(f'{data}/held_out.jsonl'),
        row_length=2048,
        batch_size=4,
        accumulation=4,
        epochs=1,
        evaluate_every=4,
        save_every=4,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_fraction=0.1),
        mesh=MeshConfig(fsdp=1),
    )
