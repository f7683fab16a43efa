"""Plans: the chip table, the analytic estimates, and the command."""

import pytest

from qedjax.plan.chips import CHIPS, parse_topology


def test_every_chip_has_a_peak_and_a_balance_that_can_be():
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.hbm_bandwidth < 1000  # FLOPs a byte
        assert chip.hbm >= 16e9 > chip.link_bandwidth / 100


@pytest.mark.parametrize(('text', 'devices', 'hosts'), [('v5p:4x4x4', 64, 16), ('v5e:16x16', 256, 64), ('v7x:2x2x1', 8, 1),
                                                        ('h100:8', 8, 1), ('H200:16', 16, 2), ('v5e:1x1', 1, 1)])
def test_topologies(text, devices, hosts):
    slice = parse_topology(text)
    assert (slice.devices, slice.hosts, slice.name) == (devices, hosts, text.lower())


@pytest.mark.parametrize(('text', 'reason'), [('v9:2x2', 'no chip'), ('v5p', 'no size'), ('v5p:4x4', 'has 2 sides'), ('h100:0', 'no size')])
def test_bad_topologies_are_one_sentence(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_topology(text)
    assert '\n' not in str(error.value)


def test_a_collective_uses_the_links_of_the_sides_that_it_fills():
    slice = parse_topology('v5p:4x4x4')
    assert [slice.share(group) for group in (2, 4, 16, 64)] == [1 / 3, 1 / 3, 2 / 3, 1]
    assert parse_topology('h100:8').share(2) == 1
