"""Plans against what was measured: our own H100 rows, and figures that others publish."""

import pytest

from megatron_irl.planning.machines import GIB
from tests.planning.cases import ANCHORS, OWN, plan_anchor, plan_own, speed


@pytest.mark.parametrize("row", OWN, ids=lambda row: row.name)
def test_own_rows(row):
    """Within 15 % of the speed and 10 % of the peak of tensors."""
    plan = plan_own(row)
    assert speed(plan) == pytest.approx(row.speed, rel=0.15)
    if row.peak is not None:
        assert plan.stages[0].phases["training"] / GIB == pytest.approx(row.peak, rel=0.10)


@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: anchor.name)
def test_public_figures(anchor):
    """Within 30 %, though nothing was fitted to them."""
    assert speed(plan_anchor(anchor)) == pytest.approx(anchor.speed, rel=0.30)
