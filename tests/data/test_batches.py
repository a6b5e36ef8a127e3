"""Drawing rows and putting them side by side."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsa_secure.data import EncodedRows, collate, draw_rows, encode_texts

CPU = torch.device("cpu")

shards = st.sets(st.integers(0, 500), min_size=1, max_size=60).map(
    lambda rows: np.asarray(sorted(rows), dtype=np.int64)
)
draws = {
    "rows": shards,
    "steps": st.integers(1, 12),
    "batch_size": st.integers(1, 20),
    "seed": st.integers(0, 2**63 - 1),
    "client": st.integers(0, 1000),
    "round_number": st.integers(1, 1000),
}


# --- draw_rows -------------------------------------------------------------------------------


@given(**draws)
def test_draw_has_a_full_batch_for_every_step(rows, steps, batch_size, **key):
    drawn = draw_rows(rows, steps, batch_size, **key)
    assert [len(batch) for batch in drawn] == [min(batch_size, len(rows))] * steps


@given(**draws)
def test_every_row_is_drawn_once_in_a_pass(rows, steps, batch_size, **key):
    drawn = np.concatenate(draw_rows(rows, steps, batch_size, **key))
    passes = [drawn[start : start + len(rows)] for start in range(0, len(drawn), len(rows))]
    for one in passes:
        assert len(set(one)) == len(one)
        assert set(one) <= set(rows)
    assert all(len(one) == len(rows) for one in passes[:-1])


@given(**draws)
def test_short_shard_gives_all_its_rows_in_every_step(rows, steps, batch_size, **key):
    for batch in draw_rows(rows[:batch_size], steps, batch_size, **key):
        assert sorted(batch) == rows[:batch_size].tolist()


@given(**draws)
def test_draw_is_a_function_of_its_arguments(**arguments):
    np.random.seed(arguments["seed"] % 1000)  # the global stream must not matter
    first = draw_rows(**arguments)
    np.random.seed(1)
    second = draw_rows(**arguments)
    assert all(np.array_equal(one, two) for one, two in zip(first, second, strict=True))


@given(**draws)
def test_fewer_steps_are_the_start_of_more(steps, **arguments):
    more, fewer = draw_rows(steps=steps, **arguments), draw_rows(steps=1, **arguments)
    assert len(fewer[0]) == len(more[0])
    assert set(fewer[0]) <= set(arguments["rows"])
    assert np.array_equal(fewer[0], more[0])


def test_seed_client_and_round_each_change_the_draw():
    rows = np.arange(100)
    key = {"seed": 3, "client": 4, "round_number": 5}
    base = draw_rows(rows, 2, 10, **key)
    for name in key:
        other = draw_rows(rows, 2, 10, **(key | {name: key[name] + 1}))
        assert not np.array_equal(base, other), name


# --- collate ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tiny_tokenizer, small_dataset) -> EncodedRows:
    data = small_dataset(rows=30, words=(1, 12))
    labels = np.asarray(data["label"]) + 1
    return encode_texts([list(data["text"])], tiny_tokenizer, 64, labels)


SEGMENTS = [np.asarray([3, 1, 20, 7]), np.asarray([25]), np.asarray([8, 9])]


def test_real_rows_stand_in_their_segment_unchanged(rows):
    batch = collate(rows, SEGMENTS, CPU)
    assert batch.real.tolist() == [
        [True] * 4,
        [True, False, False, False],
        [True, True, False, False],
    ]
    longest = max(rows.lengths()[row] for segment in SEGMENTS for row in segment)
    for c, segment in enumerate(SEGMENTS):
        for place, row in enumerate(segment):
            at, length = c * 4 + place, rows.lengths()[row]
            assert batch.labels[at] == rows.labels[row]
            assert batch.inputs["attention_mask"][at].tolist() == [1] * length + [0] * (
                longest - length
            )
            for name, values in rows.columns.items():
                assert batch.inputs[name].shape == (12, longest)
                assert batch.inputs[name][at, :length].tolist() == values[row].tolist()
                assert (batch.inputs[name][at, length:] == rows.pad[name]).all()


def test_filling_rows_are_the_clients_own_first_row(rows):
    batch = collate(rows, SEGMENTS, CPU)
    places = [list(range(c * 4 + len(segment), c * 4 + 4)) for c, segment in enumerate(SEGMENTS)]
    assert [len(filling) for filling in places] == [0, 3, 2]
    for c, filling in enumerate(places):
        for at in filling:
            assert not batch.real.flatten()[at]
            for values in (*batch.inputs.values(), batch.labels):
                assert torch.equal(values[at], values[c * 4])


def test_padding_value_is_that_of_the_tokenizer(rows, tiny_tokenizer):
    other = EncodedRows(rows.columns, rows.labels, rows.pad | {"input_ids": 77})
    batch = collate(other, SEGMENTS, CPU)
    hidden = batch.inputs["attention_mask"] == 0
    assert (batch.inputs["input_ids"][hidden] == 77).all()
    assert rows.pad["input_ids"] == tiny_tokenizer.pad_token_id


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_parts_hold_every_row_once_and_each_client_in_each(rows, count):
    batch = collate(rows, SEGMENTS, CPU)
    parts = batch.parts(count)
    assert len(parts) == {1: 1, 2: 2, 3: 2, 4: 4, 7: 4}[count]
    assert torch.equal(torch.cat([part.real for part in parts], 1), batch.real)
    for name, values in {**batch.inputs, "labels": batch.labels}.items():
        pieces = [
            (part.labels if name == "labels" else part.inputs[name]).view(3, -1, *values.shape[1:])
            for part in parts
        ]
        assert torch.equal(torch.cat(pieces, 1).flatten(0, 1), values), name


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_padding_and_filling_change_no_logits(architecture, rows, tiny_bert, tiny_roberta):
    model = {"bert": tiny_bert, "roberta": tiny_roberta}[architecture]().eval()
    batch = collate(rows, SEGMENTS, CPU)
    together = model(**batch.inputs).logits[batch.real.flatten()]
    assert together.isfinite().all()
    alone = [
        model(**collate(rows, [np.asarray([row])], CPU).inputs).logits
        for row in np.concatenate(SEGMENTS)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_pairs_are_encoded_as_pairs_and_cut(tiny_tokenizer):
    texts = [["w1 w2", "w3 w4 w5 w6 w7"], ["w8", "w9 w10 w11"]]
    rows = encode_texts(texts, tiny_tokenizer, 7)
    assert rows.columns["input_ids"][0].tolist() == [2, 5, 6, 3, 12, 3]
    assert rows.columns["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1]
    assert rows.lengths().tolist() == [6, 7]
    assert rows.labels.tolist() == [0, 0]
