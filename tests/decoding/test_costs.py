"""What passes cost: learnt, kept, and read back whatever has become of the file."""

import json

import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.decoding import costs
from mlx_dgemma.decoding.causal import decode
from mlx_dgemma.decoding.costs import KEPT, Costs, CostTable, bucket
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter.oracle import Oracle
from mlx_dgemma.draws import Draws


def filled(path=None) -> CostTable:
    table = CostTable(path)
    for number, seconds in [(1, 0.010), (1, 0.010), (4, 0.030), (4, 0.030)]:
        table.add(100, "verify", number, seconds)
    for _ in range(2):
        table.add(100, "plain", 1, 0.008)
        table.add(100, "draft Lookup", 16, 0.001)
    return table


def test_between_known_passes_the_assumed_ratios_are_scaled():
    known = filled().at(100, "Lookup")
    assert (known.step(), known.verify(1), known.draft(16)) == (0.008, 0.010, 0.001)
    assert known.verify(4) == pytest.approx(0.030)
    assert 0.010 < known.verify(2) < known.verify(3) < 0.030
    assert known.verify(16) == pytest.approx(0.030 / 2.2 * 5.1)
    assert filled().at(100, "Other").draft(16) == 0.0


def test_nothing_known_is_the_assumption():
    known = CostTable().at(0, "Lookup")
    assert (known.step(), known.verify(4), known.draft(8)) == (1.0, 2.2, 0.0)
    assert Costs(plain=2.0).verify(4) == 4.4


def test_the_first_pass_of_a_size_does_not_count_and_the_median_does():
    table = CostTable()
    table.add(0, "verify", 3, 99.0)
    assert table.at(0, "x").verified == {}
    for seconds in [1.0, 3.5, 2.0]:
        table.add(0, "verify", 3, seconds)
    assert table.at(600, "other").verified == {3: 2.0}, "the nearest length that is known"


def test_a_pass_during_which_the_machine_slept_does_not_count():
    table = filled()
    table.add(100, "verify", 9, 0.05)
    table.add(100, "verify", 9, 5.0)
    assert 9 not in table.at(100, "x").verified
    table.add(100, "verify", 9, 0.05)
    assert table.at(100, "x").verified[9] == 0.05
    for _ in range(2):
        table.add(100, "verify", 12, 5.0)
    table.add(100, "verify", 12, 5.0)
    assert table.at(100, "x").verified[12] == 5.0, "twice in a row is what it takes here"


def test_old_samples_make_room():
    table = filled()
    for _ in range(50):
        table.add(100, "verify", 4, 0.5)
    assert table.at(100, "Lookup").verify(4) == 0.5
    assert max(map(len, table._samples.values())) == KEPT


def test_lengths_of_context_have_their_own_costs():
    assert [bucket(n) for n in (0, 1023, 1024, 2047, 2048, 200_000)] == [0, 0, 1, 1, 2, 8]
    table = filled()
    for _ in range(3):
        table.add(5000, "verify", 1, 0.1)
    assert table.at(100, "x").verify(1) == 0.010
    assert table.at(5000, "x").verify(1) == table.at(90_000, "x").verify(1) == 0.1
    assert table.at(5000, "Lookup").draft(16) == 0.001, "what is not known there is that of the nearest length"


def test_it_is_kept(tmp_path):
    path = tmp_path / "deep" / "costs.json"
    filled(path).save()
    assert CostTable(path).at(100, "Lookup").verify(4) == pytest.approx(0.030)
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"], "nothing half-written is left"


DAMAGED = ["", "{", "[]", "{}", '{"schema": 1}', "[" * 100_000, '{"schema": 1, "samples": {"a": [1]}}']
UNSOUND = [(1, 0.0), (1, -1), (1, "NaN"), (200, 1)]
DAMAGED += ['{{"schema": 1, "samples": {{"0/verify/{}": [{}]}}}}'.format(*pair) for pair in UNSOUND]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_an_empty_table(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text)
    table = CostTable(path)
    assert table.at(0, "x") == Costs()
    table.add(0, "verify", 1, 1.0)
    table.add(0, "verify", 1, 1.0)
    table.save()
    assert json.loads(path.read_text())["samples"] == {"0/verify/1": [1.0]}


def test_what_another_process_learnt_meanwhile_is_kept(tmp_path):
    path = tmp_path / "costs.json"
    one, other = filled(path), CostTable(path)
    for _ in range(2):
        other.add(100, "verify", 2, 0.02)
    other.save()
    one.save()
    assert CostTable(path).at(100, "Lookup").verified == {1: 0.010, 2: 0.02, 4: 0.030}


def test_a_user_without_a_home_has_a_table_that_is_not_kept(tiny, monkeypatch):
    for name in ("MLX_DGEMMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(costs, "_tables", {})
    CostTable.of(tiny).save()


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    (tmp_path / "file").write_text("")
    filled(tmp_path / "file" / "costs.json").save()


def test_tables_belong_to_device_shapes_and_version(tiny, nano, monkeypatch):
    assert CostTable.of(tiny) is CostTable.of(tiny)
    assert CostTable.of(tiny) is not CostTable.of(nano[0])
    before = CostTable.of(tiny)
    monkeypatch.setattr(costs, "__version__", "another")
    assert CostTable.of(tiny) is not before


def test_the_loop_fills_the_table(tiny):
    config = GenerationConfig(max_new_tokens=40, temperature=0.0)
    prompt, draws, table = [2, 17, 40], Draws([0], 131), CostTable()
    text = prompt + [token.id for token in decode(tiny, prompt, config, draws, widths=Widths(table))]
    assert not table._samples, "without a drafter nothing is to be chosen"
    for _ in range(2):
        list(decode(tiny, prompt, config, draws, drafter=Oracle(text), widths=Widths(table, fixed=0)))
    assert set(table._samples) == {"0/plain/1", "0/verify/1"}, "the first step of a request waits for its token"
    list(decode(tiny, prompt, config, draws, drafter=Oracle(text), widths=Widths(table, fixed=3)))
    assert set(table._samples) >= {"0/plain/1", "0/verify/4", "0/draft Oracle/3"}
