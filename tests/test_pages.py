"""The account of pages against a plain model of it: nothing is lost, given twice, or handed on unclean."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qedjax.rollout.pages import PagePool

COUNT = 7


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['take', 'share', 'release', 'taint']), st.integers(0, 9)), max_size=60))
def test_any_sequence_of_calls_keeps_the_account(calls):
    pool, owners, tainted = PagePool(COUNT), [], set()
    for call, n in calls:
        held = {page for pages in owners for page in pages}
        if call == 'take':
            got = pool.take(n)
            assert (got is None) == (n > COUNT - len(held))
            if got is not None:
                assert len(set(got)) == n
                assert not held & set(got)
                owners.append(got)
        elif owners:
            pages = owners[n % len(owners)]
            if call == 'share':
                pool.share(pages)
                owners.append(list(pages))
            elif call == 'taint':
                pool.taint(pages)
                tainted |= set(pages)
            else:
                owners.remove(pages)
                left = {page for others in owners for page in others}
                dirty = pool.release(pages)
                assert sorted(dirty) == sorted((set(pages) - left) & tainted)
                tainted -= set(dirty)
        assert pool.free == COUNT - len({page for pages in owners for page in pages})


def test_giving_back_twice_is_an_error():
    pool = PagePool(2)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match='freed twice'):
        pool.release(pages)
    with pytest.raises(AssertionError, match='is free'):
        pool.share(pages)
