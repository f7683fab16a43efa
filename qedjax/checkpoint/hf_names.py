"""How parameters are called and laid out in Hugging Face folders and here: one table, read in both directions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Weight:
    """How a parameter is called and laid out on both sides.

    Attributes:
      name: in Hugging Face folders, where {} is the layer; a name with {} is one tensor a layer there and stacked [L,
        ...] here.
      torch: its dimensions there, a word each, merged ones in one word: 'NH D' is [N * H, D].
      path: here, below the model.
      ours: its dimensions here, without L.
    """

    name: str
    torch: str
    path: str
    ours: str

    @property
    def stacked(self) -> bool:
        return '{}' in self.name

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of ours in the order of torch's: `ours.transpose(order)` is the torch tensor, its merged dimensions
        still apart."""
        letters = self.ours.split()
        return tuple(letters.index(letter) for letter in self.torch.replace(' ', ''))

    def names(self, shape: Sequence[int]) -> list[str]:
        """Tensors of the parameter of this shape."""
        return [self.name.format(layer) for layer in range(shape[0])] if self.stacked else [self.name]

    def split_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one torch tensor with its merged dimensions apart."""
        return tuple(shape[axis + self.stacked] for axis in self.order)

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one torch tensor."""
        sizes = dict(zip(self.ours.split(), shape[self.stacked :], strict=True))
        return tuple(math.prod(sizes[letter] for letter in word) for word in self.torch.split())


# D embed, N heads, K kv heads, H head_dim, F mlp, V vocab. A parameter that a config has not is not expected in its
# folder.
TABLE = tuple(Weight(*row) for row in (
    ('model.embed_tokens.weight', 'V D', 'embed', 'V D'),
    ('model.layers.{}.input_layernorm.weight', 'D', 'layers.attn_norm', 'D'),
    ('model.layers.{}.self_attn.q_proj.weight', 'NH D', 'layers.attn.wq', 'D N H'),
    ('model.layers.{}.self_attn.k_proj.weight', 'KH D', 'layers.attn.wk', 'D K H'),
    ('model.layers.{}.self_attn.v_proj.weight', 'KH D', 'layers.attn.wv', 'D K H'),
    ('model.layers.{}.self_attn.o_proj.weight', 'D NH', 'layers.attn.wo', 'N H D'),
    ('model.layers.{}.self_attn.q_proj.bias', 'NH', 'layers.attn.bq', 'N H'),
    ('model.layers.{}.self_attn.k_proj.bias', 'KH', 'layers.attn.bk', 'K H'),
    ('model.layers.{}.self_attn.v_proj.bias', 'KH', 'layers.attn.bv', 'K H'),
    ('model.layers.{}.self_attn.o_proj.bias', 'D', 'layers.attn.bo', 'D'),
    ('model.layers.{}.self_attn.q_norm.weight', 'H', 'layers.attn.q_norm', 'H'),
    ('model.layers.{}.self_attn.k_norm.weight', 'H', 'layers.attn.k_norm', 'H'),
    ('model.layers.{}.post_attention_layernorm.weight', 'D', 'layers.mlp_norm', 'D'),
    ('model.layers.{}.mlp.gate_proj.weight', 'F D', 'layers.mlp.w_gate', 'D F'),
    ('model.layers.{}.mlp.up_proj.weight', 'F D', 'layers.mlp.w_up', 'D F'),
    ('model.layers.{}.mlp.down_proj.weight', 'D F', 'layers.mlp.w_down', 'F D'),
    ('model.norm.weight', 'D', 'final_norm', 'D'),
    ('lm_head.weight', 'V D', 'lm_head', 'V D'),
))  # fmt: skip


def match(model) -> list[tuple[Weight, Any]]:
    """Row of the table of each parameter of a model (or of its abstract tree), in the model's order."""
    pairs = []
    for path, leaf in jax.tree.leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')
        rows = [weight for weight in TABLE if weight.path == name]
        assert len(rows) == 1, f'{len(rows)} rows of the name table match the parameter {name}'
        pairs.append((rows[0], leaf))
    return pairs


def tensors(model) -> dict[str, tuple[Weight, Any, int]]:
    """Row, parameter and layer of each tensor of a model's (or its abstract tree's) folder, in forward order."""
    found = [(weight, leaf, layer) for weight, leaf in match(model) for layer in range(len(weight.names(leaf.shape)))]

    def order(tensor):
        weight, _, layer = tensor
        place = TABLE.index(weight)
        return (1, layer, place) if weight.stacked else (place, 0, 0)

    return {weight.names(leaf.shape)[layer]: (weight, leaf, layer) for weight, leaf, layer in sorted(found, key=order)}


def torch_shapes(model) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a model's (or its abstract tree's) folder."""
    return {name: weight.torch_shape(leaf.shape) for name, (weight, leaf, _) in tensors(model).items()}
