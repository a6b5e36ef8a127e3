"""What is minimised: against transformers' own loss, row by row."""

import numpy as np
import pytest
import torch
from generation import WRITERS, make_questions, make_tokenizer, make_writer
from torch import Tensor

from fedsa_secure import TrainConfig
from fedsa_secure.adapters import AdapterSettings, attach
from fedsa_secure.data import IGNORED, collate, divide, encode_division
from fedsa_secure.federation.evaluation import answer_losses
from fedsa_secure.federation.losses import client_losses, learnt_positions, row_losses
from fedsa_secure.types import Role

CPU = torch.device("cpu")
CONFIG = TrainConfig(clients=3, partition="column:client", common_rows=0, max_length=16)


def made(name: str):
    model = make_writer(name)
    start = model.config.decoder_start_token_id if name == "t5" else None
    division = divide(make_questions(), "column:client", CONFIG)
    return model, encode_division(division, make_tokenizer(), CONFIG, start)


def theirs(model: torch.nn.Module, data, row: int) -> Tensor:
    """Transformers' loss for one row alone, with labels as transformers wants them."""
    rows = data.rows
    ids = torch.from_numpy(rows.columns["input_ids"][row])[None]
    if model.config.is_encoder_decoder:
        labels = torch.from_numpy(rows.columns["labels"][row])[None]
    else:
        labels = ids.clone()
        labels[0, : len(rows.prompts[row])] = IGNORED
    return model.eval()(input_ids=ids, labels=labels).loss


@pytest.mark.parametrize("name", WRITERS)
def test_rows_of_a_padded_batch_have_the_losses_that_transformers_gives_each_alone(name):
    model, data = made(name)
    segments = [shard.train[:4] for shard in data.shards]
    segments[1] = segments[1][:2]
    expected = torch.stack([theirs(model, data, row) for s in segments for row in s]).detach()
    adapted = attach(model, AdapterSettings(rank=3), seed=0)
    adapted.load([{}] * 3, trained=())
    batch = collate(data.rows, segments, CPU)
    positions = learnt_positions(batch)
    by_row = row_losses(adapted(batch.inputs, None, positions), batch.labels[:, positions])
    torch.testing.assert_close(by_row[batch.real.flatten()], expected, atol=1e-5, rtol=1e-5)
    means = torch.stack([part.mean() for part in expected.split([4, 2, 4])])
    torch.testing.assert_close(client_losses(by_row, batch), means, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_evaluation_measures_the_same_losses_in_any_order(name):
    model, data = made(name)
    chosen = np.concatenate([shard.test for shard in data.shards])[::-1]
    expected = [theirs(model, data, row).item() for row in chosen]
    adapted = attach(model, AdapterSettings(rank=3), seed=0)
    np.testing.assert_allclose(answer_losses(adapted, data.rows, chosen), expected, atol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_gradients_are_those_of_the_mean_over_rows(name):
    """A long answer counts as much as a short one."""
    model, data = made(name)
    adapted = attach(model, AdapterSettings(rank=3), seed=0)
    stream = torch.Generator().manual_seed(0)
    client = {
        name: start + 0.1 * torch.randn(start.shape, generator=stream)
        for name, start in adapted.initial.items()
    }
    adapted.load([client], trained=set(Role))
    parameters = list(adapted.parameters(set(Role)).values())
    rows = data.shards[0].train[:3]
    batch = collate(data.rows, [rows], CPU)
    positions = learnt_positions(batch)
    by_row = row_losses(adapted(batch.inputs, None, positions), batch.labels[:, positions])
    ours = torch.autograd.grad(client_losses(by_row, batch).sum(), parameters)
    reference = torch.autograd.grad(
        torch.stack([theirs(model, data, row) for row in rows]).mean(), parameters
    )
    for mine, other in zip(ours, reference, strict=True):
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_a_filling_row_may_give_anything():
    _, data = made("llama")
    batch = collate(data.rows, [data.shards[0].train[:2], data.shards[1].train[:1]], CPU)
    by_row = torch.tensor([1.0, 2.0, 4.0, float("nan")], requires_grad=True)
    losses = client_losses(by_row, batch)
    assert losses.tolist() == [1.5, 4.0]
    losses.sum().backward()
    assert by_row.grad.tolist() == [0.5, 0.5, 1.0, 0.0]


@pytest.mark.parametrize(("name", "picks"), [("llama", True), ("gpt2", True), ("t5", False)])
def test_only_positions_with_something_to_predict_go_through_the_output_layer(name, picks):
    model, data = made(name)
    adapted = attach(model, AdapterSettings(rank=3), seed=0)
    batch = collate(data.rows, [shard.train[:4] for shard in data.shards[:1]], CPU)
    adapted(batch.inputs)  # the first call looks, with rows of its own, who shares an input
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda _layer, inputs, _output: seen.append(inputs[0].shape[1])
    )
    positions = learnt_positions(batch)
    logits = adapted(batch.inputs, None, positions)
    assert logits.shape[1] == len(positions)
    width = batch.inputs["input_ids"].shape[1]
    assert seen == [len(positions) if picks else batch.labels.shape[1]]
    assert not picks or len(positions) < width
