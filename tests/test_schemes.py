"""Marking schemes of real data sets become text; what is no scheme is refused."""

import csv
import json

import pytest

from qedjax.grading.schemes import scheme_text
from qedjax.testing import shared_data


def test_texts_and_lists():
    assert scheme_text('  1. [7 pts] All.\n') == '1. [7 pts] All.'
    items = [{'title': 'Idea', 'points': 4, 'desc': 'The substitution.'},
             {'title': '', 'max_points': 3.0, 'grading_scheme_desc': 'The rest.'}]
    assert scheme_text(items) == '## Idea (4 points)\n\nThe substitution.\n\n## Item 2 (3 points)\n\nThe rest.'


@pytest.mark.parametrize(('scheme', 'message'), [
    (None, 'no marking scheme'), ('', 'no marking scheme'), ([], 'no marking scheme'), (7, 'no marking scheme'),
    ([{'points': 6, 'desc': 'x'}], '6 points in all'), ([{'desc': 'x'}], 'worth None'), ([{'points': 1.5, 'desc': 'x'}], 'worth 1.5'),
    ([{'points': True, 'desc': 'x'}], 'worth True'), ([{'points': -1, 'desc': 'x'}], 'worth -1'), (['all'], 'is str'),
    ([{'points': 7}], 'neither title nor desc')])
def test_what_is_no_scheme(scheme, message):
    with pytest.raises(ValueError, match=message):
        scheme_text(scheme)


@pytest.mark.real
def test_real_schemes():
    folder = shared_data()
    with (folder / 'imobench/proofbench_v2.csv').open(newline='') as file:
        texts = [scheme_text(row['Grading guidelines']) for row in csv.DictReader(file)]
    assert len(texts) == 60
    lines = (folder / 'matharena/usamo_2025_schemes.jsonl').read_text(encoding='utf-8').splitlines()
    lists = [json.loads(line)['grading_scheme'] for line in lines]
    assert len(lists) == 6
    assert all('points)' in scheme_text(scheme) for scheme in lists)
