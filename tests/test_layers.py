"""Imports go down, or stay within their folder: the layering of docs/design.md, read from the syntax tree."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAYERS = {
    'types': 0, 'metrics': 0, 'sharding': 0, 'prompts': 0, 'processes': 0,
    'model': 1, 'data': 1, 'checkpoint.manager': 1, 'testing': 1,
    'checkpoint': 2, 'train': 2, 'rollout': 2,
    'llm': 3,
    'grading': 4, 'reasoning_cache': 4, 'scaffolds': 4,
    'rl': 5, 'evaluation': 5, 'plan': 5,
    'cli': 6, 'clusters': 6, 'quickstart': 6,
}
# Pairs in one layer that may not know each other: layer 1 is three islands, and the trainer is not the sampler's business.
ISLANDS = [{'model', 'data', 'checkpoint.manager'}]
FILES = sorted((ROOT / 'qedjax').rglob('*.py'))


def unit(module: str) -> str:
    """The entry of LAYERS that a module belongs to: 'qedjax.checkpoint.manager' -> 'checkpoint.manager'."""
    parts = module.split('.')[1:]
    return '.'.join(parts[:2]) if '.'.join(parts[:2]) in LAYERS else parts[0]


def imports(path: pathlib.Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f'{path}: relative import'
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
    return {name for name in found if name.startswith('qedjax.')}


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    module = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    if module == 'qedjax':
        assert not imports(path)
        return
    here = unit(module)
    for name in imports(path):
        there = unit(name)
        if name == 'qedjax.__version__' or there == here:
            continue
        assert LAYERS[there] <= LAYERS[here], f'{module} (layer {LAYERS[here]}) imports {name} (layer {LAYERS[there]})'
        assert not any({here, there} <= island for island in ISLANDS), f'{module} imports {name}, its neighbour'


@pytest.mark.parametrize('path', sorted((ROOT / 'launch').glob('*.py')), ids=lambda path: path.name)
def test_launchers_are_thin(path):
    assert len(path.read_text().splitlines()) < 80


@pytest.mark.parametrize('path', [*FILES, *sorted((ROOT / 'tools').glob('*.py'))], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_fit_a_head(path):
    assert len(path.read_text().splitlines()) <= 400


def test_torch_is_not_needed_at_run_time():
    for path in FILES:
        names = {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names}
        assert not any(name == 'torch' or name.startswith('torch.') for name in names), path
