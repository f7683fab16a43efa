"""Prompt texts, one Markdown file each; a name never changes its text: a new version is a new file."""

import pathlib
import re

FOLDER = pathlib.Path(__file__).parent
_FIELD = re.compile(r'\{([a-z_]+)\}')


def names() -> tuple[str, ...]:
    """All prompts."""
    return tuple(sorted(path.stem for path in FOLDER.glob('*.md')))


def load(name: str) -> str:
    """The text of a prompt, with its fields as {field}. Raises ValueError for an unknown one."""
    if name not in names():
        raise ValueError(f'there is no prompt {name!r}; choose one of {", ".join(names())}, or add a file to {FOLDER.name}/')
    return (FOLDER / f'{name}.md').read_text(encoding='utf-8').strip()


def fields(name: str) -> set[str]:
    """Fields that a prompt must be given."""
    return set(_FIELD.findall(load(name)))


def render(name: str, **values: str) -> str:
    """The prompt with its fields filled in, in one pass: braces inside a value are text. Raises KeyError for a missing one."""
    return _FIELD.sub(lambda match: values[match[1]], load(name))
