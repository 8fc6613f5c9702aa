import pytest

from support.report import CollapseWatch

HEALTHY = {"entropy_share": 0.6, "output_information": 1.2, "cls_cosine": 0.5}


@pytest.mark.parametrize(
    ("values", "name", "option"),
    [
        ({"entropy_share": 0.999, "output_information": 0.0}, "uniform outputs", "--teacher_temp"),
        ({"entropy_share": 0.3, "output_information": 0.01}, "one output for all images", "--freeze_last_layer"),
        ({"cls_cosine": 0.9999}, "features all alike", "--lr"),
    ],
)
def test_a_collapse_that_lasts_is_named_once(values, name, option):
    watch = CollapseWatch(patience=3)
    collapsed = {**HEALTHY, **values}
    assert [len(watch(v)) for v in (collapsed, collapsed, HEALTHY, collapsed, collapsed)] == [0] * 5
    (warning,) = watch(collapsed)
    assert f"collapse: {name} in 3 reports in a row" in warning
    assert option in warning
    assert watch(collapsed) == []
    assert watch(HEALTHY) == []
