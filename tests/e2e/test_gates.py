"""A body behind a shut gate does not run for a row: through `offramp serve`, proved by a body that cannot run."""

import pytest
from gated_bundles import CLASSES, DEADLY, MINE, ONE_EXIT, Block, gated_rows, write_gated

BODY, OPEN, SHUT = "stage_3", (0.9, 0.9), (0.9, 0.1)


@pytest.fixture(scope="module")
def mined(serve, tmp_path_factory):
    """Serve a network whose second body ONNX Runtime cannot run for a row that carries a mine."""
    blocks = (*ONE_EXIT[:3], Block(("h2",), "h3", gates=(1,), skip="h2", is_mined=True), ONE_EXIT[4])
    return serve(write_gated(tmp_path_factory.mktemp("mined") / "gated", blocks))


def test_a_body_that_cannot_run_for_a_row_is_never_run_for_it_if_its_gate_is_shut(mined):
    deadly = gated_rows(SHUT)
    deadly[0, MINE] = DEADLY
    before = mined.counters()
    answer = mined.classify(deadly)
    assert answer.status_code == 200, answer.text
    assert BODY not in answer.json()["predictions"][0]["stages"]
    assert mined.counters()["runs", BODY] == before["runs", BODY]
    assert mined.classify(deadly, gate_threshold="0.05").status_code == 500, "the body runs, so the mine does not work"
    assert mined.classify(gated_rows(OPEN)).status_code == 200


def test_the_depth_that_is_told_is_that_of_the_stages_that_were_counted(mined):
    before = mined.counters()
    rows = gated_rows(*[OPEN, SHUT, (0.1, 0.9), (0.1, 0.1)] * 8)
    predictions = mined.classify(rows).json()["predictions"]
    after = mined.counters()
    for index, gates in enumerate([(), (0,), (), (1,), ()]):
        wanted = (rows[:, [CLASSES + gate for gate in gates]] >= 0.5).all(axis=1).sum()
        assert after["rows", f"stage_{index}"] - before["rows", f"stage_{index}"] == wanted
        assert sum(f"stage_{index}" in one["stages"] for one in predictions) == wanted
