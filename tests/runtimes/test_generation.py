"""Federations of models that write: from question and answer to a personal model's answers."""

import json
from pathlib import Path

import pytest
import torch
from generation import EOS, PAD, WRITERS, make_questions, make_tokenizer, make_writer
from peft import PeftModel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaForCausalLM,
)

import fedsa_secure
from fedsa_secure.errors import ConfigError
from fedsa_secure.federation import evaluation

OPTIONS = {
    "rank": 4,
    "rounds": 4,
    "local_steps": 6,
    "max_length": 16,
    "max_new_tokens": 4,
    "learning_rate": 5e-2,
    "evaluate_every": 2,
    "common_rows": 0,
    "dropout": 0.1,
}


def train(name: str, folder: Path, **options: object) -> fedsa_secure.Run:
    return fedsa_secure.train(
        make_writer(name),
        make_questions(),
        "column:client",
        tokenizer=make_tokenizer(),
        output_dir=str(folder),
        **{**OPTIONS, **options},
    )


def by_hand(model: torch.nn.Module, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding of one prompt without padding and without a cache."""
    written: list[int] = []
    for _ in range(steps):
        if model.config.is_encoder_decoder:
            inputs = {
                "input_ids": torch.tensor([prompt]),
                "decoder_input_ids": torch.tensor([[PAD, *written]]),
            }
        else:
            inputs = {"input_ids": torch.tensor([[*prompt, *written]])}
        with torch.no_grad():
            token = int(model(**inputs).logits[0, -1].argmax())
        if token == EOS:
            break
        written.append(token)
    return written


@pytest.fixture(scope="module", params=WRITERS)
def finished(request, tmp_path_factory) -> tuple[str, fedsa_secure.Run]:
    folder = tmp_path_factory.mktemp("runs") / request.param
    return request.param, train(request.param, folder)


def test_loss_falls_and_both_results_are_reported(finished):
    _, run = finished
    measured = [record for record in run.history if record.test_loss is not None]
    assert measured[-1].test_loss < measured[0].test_loss
    assert run.history[-1].loss < run.history[0].loss
    assert run.loss == pytest.approx(measured[-1].test_loss)
    best = max(measured, key=lambda r: (r.accuracy, -r.test_loss))
    assert run.best == best


def test_personal_answers_fit_at_home_and_not_elsewhere(finished):
    """Client c answers with word c: B alone can carry that, since there is no head."""
    _, run = finished
    for client in run.clients:
        assert client.metrics.loss < client.metrics.cross_loss - 0.1
        assert client.metrics.macro_f1 is None
    assert run.config.task == "generation"
    assert run.config.answer_column == "answer"


def test_answers_are_those_of_greedy_decoding_by_hand_through_peft(finished, tmp_path):
    """The saved folder, loaded by PEFT, one unpadded prompt at a time."""
    name, run = finished
    run.save_pretrained(tmp_path)
    prompts = ["w20", "w30 w31 w32 w33 w34", "w40 w41"]
    for client in run.clients[:2]:
        folder = tmp_path / f"client-{client.number:05d}"
        theirs = PeftModel.from_pretrained(make_writer(name), folder).eval()
        expected = [
            by_hand(theirs.base_model.model, [5 + int(w[1:]) for w in p.split()], 4)
            for p in prompts
        ]
        words = [" ".join(f"w{token - 5}" for token in tokens) for tokens in expected]
        assert client.generate(prompts) == words
        kind = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == kind


def test_exact_match_is_the_share_of_right_answers(tmp_path, monkeypatch):
    """Client c is to answer w{c} w{c+10}; of all prompts every third gets client 1's answer."""

    def write(_model, _tokenizer, prompts, _longest):
        return ["W1  w11" if k % 3 == 0 else "w1" for k in range(len(prompts))]

    monkeypatch.setattr(evaluation, "write_answers", write)
    run = train("llama", tmp_path / "run", rounds=1, cross_rows=0)
    rows = [client.metrics.test_rows for client in run.clients]
    assert rows[1] == 6
    assert [client.metrics.accuracy for client in run.clients] == [0.0, 2 / 6, 0.0]


def test_as_many_rows_are_decoded_as_were_asked_for(tmp_path, monkeypatch):
    counts = []

    def write(_model, _tokenizer, prompts, longest):
        counts.append((len(prompts), longest))
        return [""] * len(prompts)

    monkeypatch.setattr(evaluation, "write_answers", write)
    train("llama", tmp_path / "run", rounds=1, decode_rows=4, cross_rows=3, max_new_tokens=2)
    assert counts == [(4, 2), (3, 2)] * 3  # of 6 test rows at home and 3 elsewhere


def test_no_rows_are_decoded_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "write_answers", None)
    run = train("llama", tmp_path / "run", rounds=2, decode_rows=0)
    assert run.accuracy is None
    assert run.best.test_loss == min(r.test_loss for r in run.history if r.test_loss)


def test_opened_again_it_answers_the_same(finished):
    name, run = finished
    again = fedsa_secure.load(run.path, make_writer(name), tokenizer=make_tokenizer())
    prompts = ["w20 w21", "w30"]
    assert again.clients[2].generate(prompts) == run.clients[2].generate(prompts)
    measured = fedsa_secure.evaluate(
        run.path,
        make_writer(name),
        make_questions(),
        tokenizer=make_tokenizer(),
    )
    assert measured.metrics == run.metrics


def test_class_questions_are_refused_by_a_writer(finished):
    _, run = finished
    with pytest.raises(ConfigError, match=r"use generate\(\)"):
        run.clients[0].predict(["w0"])
    with pytest.raises(ConfigError, match="prompts: .* list of texts"):
        run.clients[0].generate("w0")
    assert run.clients[0].generate([]) == []


def test_first_round_of_a_shared_base_starts_equal_for_all(tmp_path):
    """Before training, personal models are the base model: losses are those of the base."""
    run = train("llama", tmp_path / "run", rounds=1, local_steps=1, learning_rate=1e-30)
    losses = {round(client.metrics.loss, 3) for client in run.clients}
    assert len(losses) == 3, "clients have different answers"
    assert run.clients[0].generate(["w50"]) == run.clients[1].generate(["w50"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "head-only"}, "method: 'head-only' trains the head only"),
        (
            {"task": "classification"},
            "text_column: cannot tell which of the columns",
        ),
        ({"max_length": 2}, "max_length: the prompts of"),
        ({"prompt_template": "no place"}, "prompt_template needs {prompt}"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    options, expected, tmp_path
):
    with pytest.raises(ConfigError) as refused:
        train("llama", tmp_path / "run", **options)
    assert expected in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_classifier_cannot_write_and_a_writer_cannot_classify(
    tiny_bert, tiny_tokenizer, small_dataset, tmp_path
):
    with pytest.raises(ConfigError, match="needs a model that writes answers"):
        fedsa_secure.train(tiny_bert(), make_questions(), tokenizer=tiny_tokenizer)
    with pytest.raises(ConfigError, match="needs a model that classifies"):
        fedsa_secure.train(make_writer("llama"), small_dataset(), tokenizer=make_tokenizer())


def test_masked_models_are_refused_as_writers(tiny_roberta, tmp_path):
    """They would see the answer that they have to predict."""
    model = RobertaForCausalLM(tiny_roberta().config)
    with pytest.raises(ConfigError, match="a RobertaForCausalLM looks ahead"):
        fedsa_secure.train(model, make_questions(), tokenizer=make_tokenizer(), max_length=16)


def test_the_embedded_model_is_refused_as_a_writer():
    with pytest.raises(ConfigError, match="embedded model tells classes .* give one that"):
        fedsa_secure.train(dataset=make_questions())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_answers_end_where_the_models_positions_end(name, tmp_path):
    run = train(name, tmp_path / "run", max_new_tokens=256, rounds=1, cross_rows=0)
    assert run.clients[0].generate(["w20 " * 60])
    with pytest.raises(ConfigError, match="prompt of 70 tokens leaves no room .* 64 positions"):
        run.clients[0].generate(["w20 " * 70])
    with pytest.raises(ConfigError, match="prompts: one of them is empty"):
        run.clients[0].generate(["w20", ""])


def test_answers_of_an_encoder_do_not_depend_on_their_neighbours(tmp_path):
    """BART counts positions from the left, so its prompts are padded on the right."""
    config = BartConfig(
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.5,
        max_position_embeddings=64, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
        decoder_start_token_id=EOS, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    run = fedsa_secure.train(
        BartForConditionalGeneration(config),
        make_questions(),
        "column:client",
        tokenizer=make_tokenizer(),
        output_dir=str(tmp_path / "run"),
        **{**OPTIONS, "rounds": 1},
    )
    prompts = ["w20", "w30 w31 w32 w33 w34", "w40 w41"]
    alone = [run.clients[0].generate([prompt])[0] for prompt in prompts]
    assert run.clients[0].generate(prompts) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, GPT2ForSequenceClassification])
@pytest.mark.parametrize("pad", [None, "[EOS]"])
def test_decoders_that_classify_read_their_last_word_and_no_padding(
    kind, pad, small_dataset, tmp_path
):
    """Whatever pad token model and tokenizer come with: alone, in a batch and in a stack."""
    family = "llama" if kind is LlamaForSequenceClassification else "gpt2"
    settings = make_writer(family).config
    settings.num_labels, settings.pad_token_id = 3, PAD
    settings.initializer_range = 0.2
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    torch.manual_seed(0)
    model = kind(settings).double()
    runs = [
        fedsa_secure.train(
            model,
            small_dataset(rows=60, words=(1, 9)),
            tokenizer=tokenizer,
            output_dir=str(tmp_path / f"run-{passes}"),
            clients_per_pass=passes,
            gradient_checkpointing=passes == 3,
            **{**OPTIONS, "clients": 3, "partition": "iid", "rounds": 2, "cross_rows": 0},
        )
        for passes in (1, 3)
    ]
    for one, other in zip(runs[0].clients, runs[1].clients, strict=True):
        for name, expected in one.tensors().items():
            torch.testing.assert_close(other.tensors()[name], expected, atol=1e-10, rtol=1e-8)
    texts = [" ".join(f"w{k + j}" for j in range(k % 7 + 1)) for k in range(20)]
    together = runs[0].clients[0].predict(texts)
    assert together == [runs[0].clients[0].predict([text])[0] for text in texts]
    assert len(set(together)) > 1


def test_writers_load_from_folders_and_decoders_classify(tmp_path, small_dataset):
    """The path of a hub id: config, weights and tokenizer from a folder, for both tasks."""
    folder = tmp_path / "model"
    make_writer("llama").save_pretrained(folder)
    tokenizer = make_tokenizer(chat=True)
    tokenizer.save_pretrained(folder)
    run = fedsa_secure.train(
        str(folder),
        make_questions(),
        output_dir=str(tmp_path / "writer"),
        **{**OPTIONS, "rounds": 1, "partition": "length", "clients": 3},
    )
    assert run.clients[0].generate(["w20"])
    tokenizer.pad_token = None  # as Llama's and GPT-2's come
    tokenizer.save_pretrained(folder)
    classifier = fedsa_secure.train(
        str(folder),
        small_dataset(),
        output_dir=str(tmp_path / "classifier"),
        **{**OPTIONS, "clients": 2, "partition": "iid", "secure_aggregation": False},
    )
    assert classifier.history[-1].loss < classifier.history[0].loss
    assert classifier.clients[0].predict(["w1 w2"])[0].startswith("class")


def test_an_encoder_decoder_without_a_start_token_is_refused(tmp_path):
    model = make_writer("t5")
    model.config.decoder_start_token_id = None
    with pytest.raises(ConfigError, match="model: it has no decoder_start_token_id"):
        fedsa_secure.train(
            model,
            make_questions(),
            tokenizer=make_tokenizer(),
            max_length=16,
            output_dir=str(tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()
