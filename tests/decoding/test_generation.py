"""Generation: the tokens of transformers and of naive loops, sampling, stopping, streaming, kinds in as kinds out."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import random_checkpoints
import torch
from conftest import TINY, predict_all, random_params, run_decoder, with_random_predictors
from random_checkpoints import ROWS
from tokenizer_files import byte_tokenizer

import jsparse
from convert import from_huggingface
from jsparse.decoding.loop import initial_state, prefill_chunk, step_chunk
from jsparse.decoding.sampling import Sampling, choose, process_logits
from jsparse.evaluation.scoring import teacher_forced
from jsparse.executors.select import make_executor, unavailable
from jsparse.model.weights import Linear

PROMPT = np.random.default_rng(3).integers(0, TINY.vocab_size, 11)
PROMPTS = [PROMPT, PROMPT[:3], np.roll(PROMPT, 4)[:7]]
EOS = 256


def scripted(text: str, template: str | None = None) -> jsparse.Params:
    """A model that says `text` after its first character and then the end of text: every token decides the next.

    Each byte must occur once.
    """
    tokenizer = byte_tokenizer(template)
    chain = [*tokenizer.encode(text), EOS]
    assert len(set(chain)) == len(chain)
    width = 260
    config = jsparse.ModelConfig(width, 8, 1, 10, 10, width, context_length=64, eos_token_ids=(EOS,))
    params = random_params(config)
    layer = params.weights.layers[0]
    attention = dataclasses.replace(layer.attention, o=Linear(0 * layer.attention.o.rows))
    ffn = dataclasses.replace(layer.ffn, down_t=0 * layer.ffn.down_t)
    weights = params.weights.replace_layer(0, attention=attention, ffn=ffn)
    head = np.zeros((width, width), np.float32)
    head[chain[1:], chain[:-1]] = 1
    weights = dataclasses.replace(weights, embed=jnp.eye(width), head=jnp.asarray(head))
    return jsparse.Params(config, weights, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def wordy() -> jsparse.Params:
    """A random model that speaks bytes."""
    return dataclasses.replace(
        random_params(dataclasses.replace(TINY, vocab_size=257)), tokenizer=byte_tokenizer("{{messages[0].content}}!")
    )


KINDS = {
    "reglu": TINY,
    "drelu": dataclasses.replace(TINY, ffn_kind="drelu"),
    "fatrelu": dataclasses.replace(TINY, ffn_kind="fatrelu", ffn_threshold=0.2),
    "minicpm": dataclasses.replace(
        TINY, ffn_kind="fatrelu", ffn_threshold=0.1, embed_scale=1.5, residual_scale=0.7, logit_scale=0.5
    ),
    "relu2": dataclasses.replace(TINY, ffn_kind="relu2", residual_scale=0.2),
    "window": dataclasses.replace(TINY, sliding_window=5, attention_bias="qkv"),
}


def naive(params: jsparse.Params, prompt: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens, every step recomputing everything, and the neuron counts (L, 2) of the tokens decoded.

    The FFN is written out with masks: dense over the prompt, restricted to the predicted neurons behind it.
    """
    config, length = params.config, 64
    tokens, counts = np.zeros(length, np.int32), None
    tokens[: len(prompt)] = prompt

    def restricted(x, ffn, predictor, is_decoded):
        gate, down_t = (jnp.asarray(oracle.matrix(m), jnp.float32) for m in (ffn.gate, ffn.down_t))
        hidden = jnp.where(x @ gate.T > config.ffn_threshold, x @ gate.T, 0)
        if config.ffn_kind == "relu2":
            hidden = hidden**2
        else:
            up = x @ jnp.asarray(oracle.matrix(ffn.up), jnp.float32).T
            hidden = hidden * (jnp.maximum(up, 0) if config.ffn_kind == "drelu" else up)
        if predictor is None:
            return hidden @ down_t, jnp.zeros(2, jnp.int32)
        a, b = (jnp.asarray(oracle.matrix(m), jnp.float32) for m in (predictor.a, predictor.b))
        predicted = (x @ a.T) @ b.T + predictor.bias > 0
        hidden = jnp.where(predicted | ~is_decoded[:, None], hidden, 0)
        both = jnp.stack([predicted, hidden != 0], axis=-1) & is_decoded[:, None, None]
        return hidden @ down_t, both.sum((0, 1))

    @jax.jit
    def next_token(tokens, position):
        at = jnp.arange(length)

        def feed_forward(layer, x, _):
            predictor = params.predictors[layer] if params.predictors else None
            ffn = params.weights.layers[layer].ffn
            y, found = restricted(x[0], ffn, predictor, (at >= len(prompt)) & (at < position))
            return y[None], found

        logits, found = run_decoder(params, tokens[None], feed_forward, count=position)
        return jnp.argmax(logits[0, position - 1]), jnp.stack(found)

    for position in range(len(prompt), len(prompt) + steps):
        tokens[position], counts = next_token(tokens.copy(), np.int32(position))
    return tokens[len(prompt) : len(prompt) + steps], np.asarray(counts)


TRANSFORMERS = {
    "llama": ROWS["SparseLLM/ReluLLaMA-7B"] | {"max_position_embeddings": 128},
    "mistral past its window": ROWS["dense-mistral"] | {"hidden_act": "relu"},
    "qwen2 with bias, tied": ROWS["Tiiny/SparseQwen2-7B"] | {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    config = TRANSFORMERS[name] | {"eos_token_id": None}
    model = random_checkpoints.write_with_transformers(tmp_path / "model", config, seed=2)
    if config.get("tie_word_embeddings"):
        model.model.embed_tokens.weight.data *= 0.3  # else every token predicts itself
        model.save_pretrained(tmp_path / "model")
    params = from_huggingface(tmp_path / "model")
    ids = random_checkpoints.tokens(config, length=20, batch=3)
    prompts = [ids[0], ids[1, :5], ids[2, :13]]
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            ids = torch.from_numpy(prompt[None]).long()
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=64, pad_token_id=0)
        expected.append(out[0, len(prompt) :].numpy())
        assert len(expected[-1]) == 64
    assert min(len(set(tokens.tolist())) for tokens in expected) > 5, "the model repeats itself: nothing is compared"
    np.testing.assert_array_equal(jsparse.generate(params, prompts[0], max_new_tokens=64), expected[0])
    for ours, theirs in zip(jsparse.generate(params, prompts, max_new_tokens=64), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_tokens_are_those_of_a_naive_loop(kind):
    params = random_params(KINDS[kind])
    expected, _ = naive(params, PROMPT, 20)
    np.testing.assert_array_equal(jsparse.generate(params, PROMPT, max_new_tokens=20), expected)
    assert len(set(expected.tolist())) > 5


@pytest.mark.parametrize("kind", ["reglu", "drelu", "fatrelu", "relu2"])
def test_sparse_tokens_and_counts_are_those_of_a_naive_loop(kind):
    params = with_random_predictors(random_params(KINDS[kind]))
    expected, counts = naive(params, PROMPT, 20)
    dense = jsparse.generate(params, PROMPT, max_new_tokens=20, sparse=False)
    for pipeline in ("sequential", "parallel"):
        found = []
        tokens = jsparse.generate(params, PROMPT, max_new_tokens=20, pipeline=pipeline, on_finish=found.append)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(found[0].counts, counts)
        assert found[0].decoded_tokens == 19
        predicted, active = counts.sum(axis=0)
        rows = predicted + 2 * active if pipeline == "sequential" else 2 * predicted + active
        matrices = 3
        if kind == "relu2":
            rows, matrices = predicted + active, 2
        assert found[0].rows_read == pytest.approx(rows / (19 * 3 * matrices * 256))
    assert not np.array_equal(dense, expected), "the predictors skip nothing that matters"
    assert tokens[0] == dense[0], "prefill is dense"


@pytest.mark.parametrize("pipeline", ["sequential", "parallel"])
@pytest.mark.parametrize("kind", ["reglu", "drelu", "fatrelu"])
def test_with_all_neurons_predicted_sparse_is_dense(kind, pipeline):
    params = predict_all(with_random_predictors(random_params(KINDS[kind])))
    options = {"max_new_tokens": 21, "pipeline": pipeline}
    found = []
    sparse = jsparse.generate(params, PROMPTS, sparse=True, on_finish=found.append, **options)
    dense = jsparse.generate(params, PROMPTS, sparse=False, **options)
    for ours, theirs in zip(sparse, dense, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (found[0].counts[:, 0] == 3 * 20 * 256).all()
    assert (found[0].counts[:, 1] < 3 * 20 * 256).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}, {"sparse": False}])
def test_batch_rows_do_not_depend_on_each_other(options, tiny_fitted):
    batch = jsparse.generate(tiny_fitted, PROMPTS, max_new_tokens=20, **options)
    others = jsparse.generate(tiny_fitted, [PROMPTS[0], PROMPTS[2], PROMPTS[2]], max_new_tokens=20, **options)
    np.testing.assert_array_equal(others[0], batch[0])
    np.testing.assert_array_equal(others[2], batch[2])
    if "seed" not in options:
        for prompt, tokens in zip(PROMPTS, batch):
            np.testing.assert_array_equal(jsparse.generate(tiny_fitted, prompt, max_new_tokens=20, **options), tokens)


def test_a_short_prompt_is_not_cut_by_a_long_neighbour(tiny):
    """The context ends each sequence where it ends alone."""
    long = np.resize(PROMPT, TINY.context_length - 3)
    alone = jsparse.generate(tiny, PROMPT, max_new_tokens=10)
    of_long, of_short = jsparse.generate(tiny, [long, PROMPT], max_new_tokens=10)
    assert len(of_long) == 3
    np.testing.assert_array_equal(of_short, alone)


@pytest.mark.parametrize("executor", ["xla", "cpu"])
def test_keys_and_values_in_int8(executor, tiny):
    """Log-probabilities are a little other than over float32 keys and values, and tokens are those of an int8 cache."""
    if reason := unavailable(executor):
        pytest.skip(reason)
    rows = np.random.default_rng(0).integers(0, tiny.config.vocab_size, 60).astype(np.int32)
    operands = tiny.weights, None, rows, tiny.config, make_executor(executor)
    exact, rounded, again = (
        np.asarray(teacher_forced(*operands, dtype)[0]) for dtype in ("float32", "int8", "bfloat16")
    )
    kl = np.mean(np.sum(np.exp(exact) * (exact - rounded), axis=1))
    assert 1e-9 < kl < 1e-4
    assert (again != rounded).any()
    options = {"max_new_tokens": 20, "kv_dtype": "int8"}
    found = jsparse.generate(tiny, [rows[:9], rows], executor=executor, **options)
    for tokens, prompt in zip(found, (rows[:9], rows)):
        whole = np.append(prompt, tokens).astype(np.int32)
        log_p = np.asarray(teacher_forced(tiny.weights, None, whole, tiny.config, make_executor(executor), "int8")[0])
        np.testing.assert_array_equal(log_p[prompt.size - 1 : -1].argmax(axis=1), tokens)


def test_generation_ends_at_the_context_length(tiny):
    prompt = np.resize(PROMPT, TINY.context_length - 5)
    capped = jsparse.generate(tiny, prompt, max_new_tokens=100)
    assert len(capped) == 5
    np.testing.assert_array_equal(capped[:3], jsparse.generate(tiny, prompt, max_new_tokens=3))
    assert len(jsparse.generate(tiny, np.resize(PROMPT, TINY.context_length - 1), max_new_tokens=9)) == 1


def test_seeds(tiny_fitted):
    def draw(**options):
        return jsparse.generate(tiny_fitted, PROMPT, max_new_tokens=21, **({"temperature": 5.0} | options)).tolist()

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    greedy = draw(temperature=0.0)
    assert draw(seed=1) != greedy
    assert draw(top_k=1, seed=3) == greedy
    assert draw(top_p=1e-6, seed=3) == greedy
    assert draw(temperature=1e-6, seed=3) == greedy


def test_rows_of_equal_prompts_draw_differently(tiny):
    first, second = jsparse.generate(tiny, [PROMPT, PROMPT], temperature=5.0, max_new_tokens=20)
    assert first.tolist() != second.tolist()


LOGITS = np.array([1.0, 3.0, -1.0, 2.5, 0.0, 2.0])


def truncated(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution `process_logits` promises, token by token."""
    order = np.argsort(-LOGITS)
    kept = order[:top_k]
    weights = np.exp(LOGITS[kept] / temperature)
    probabilities = weights / weights.sum()
    size = 1
    while probabilities[:size].sum() < top_p and size < len(kept):
        size += 1
    result = np.zeros(len(LOGITS))
    result[kept[:size]] = weights[:size] / weights[:size].sum()
    return result


def sampling_state(batch: int, *sampling, seed: int = 0):
    ones = np.ones(batch, np.int32)
    return initial_state(ones, ones, seed, Sampling(*sampling))


def test_ties_keep_the_lowest_ids():
    state = sampling_state(1, 1.0, 2, 1.0)
    shaped = process_logits(jnp.zeros((1, 1, 5)), state)
    np.testing.assert_array_equal(np.isfinite(shaped[0, 0]), [True, True, False, False, False])


def test_a_draw_belongs_to_its_sequence_and_position_alone():
    """Whatever stands beside it: other sequences, other positions, a greedy neighbour."""
    state = sampling_state(3, 2.0, 500, 0.99, seed=3)
    logits = jax.random.normal(jax.random.key(0), (3, 8, 500))
    positions = jnp.arange(8) + jnp.asarray([[0], [5], [900]])
    draw = jax.jit(choose)
    together = np.asarray(draw(logits, positions, state))
    assert len(set(together.reshape(-1).tolist())) > 12
    mixed = dataclasses.replace(state, temperature=np.float32([2, 0, 2]))
    beside_greedy = np.asarray(draw(logits, positions, mixed))
    np.testing.assert_array_equal(beside_greedy[1], np.argmax(logits[1], axis=-1))
    np.testing.assert_array_equal(beside_greedy[[0, 2]], together[[0, 2]])
    for row in range(3):
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], state)
        for at in range(8):
            part = slice(row, row + 1), slice(at, at + 1)
            assert draw(logits[part], positions[part], one)[0, 0] == together[row, at]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 6, 1.0), (2.5, 6, 1.0), (1.0, 3, 1.0), (1.0, 6, 0.7), (2.0, 4, 0.8), (0.5, 6, 0.95), (1.0, 6, 0.01)],
)
def test_sampled_frequencies(temperature, top_k, top_p):
    draws = 40_000
    state = sampling_state(10, temperature, top_k, top_p)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (10, draws // 10, 6))
    positions = jnp.broadcast_to(jnp.arange(draws // 10), (10, draws // 10))
    found = np.bincount(np.asarray(jax.jit(choose)(logits, positions, state)).reshape(-1), minlength=6) / draws
    expected = truncated(temperature, top_k, top_p)
    shaped = jax.nn.softmax(process_logits(logits[:, :1], state))
    np.testing.assert_allclose(shaped, np.broadcast_to(expected, (10, 1, 6)), atol=1e-6)
    assert (found[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(found - expected) <= 4.5 * deviation + 1e-12).all(), (found, expected)


def test_truncation_is_not_what_the_frequencies_hide():
    assert np.count_nonzero(truncated(1.0, 6, 0.7)) == 2
    assert np.count_nonzero(truncated(2.0, 4, 0.8)) == 3


def stream(params, prompt, **options):
    return list(jsparse.generate(params, prompt, stream=True, **options))


def test_the_scripted_model_says_its_text():
    params = scripted("Ahelo wrd!")
    assert jsparse.generate(params, "A") == "helo wrd!"
    assert jsparse.generate(params, "h") == "elo wrd!"
    assert jsparse.generate(params, "A", max_new_tokens=4) == "helo"
    assert "".join(stream(params, "A")) == "helo wrd!"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("lo w", "he"),
        (["!", "wr"], "helo "),
        (["h"], ""),
        ("absent", "helo wrd!"),
        ("d!x", "helo wrd!"),
        (["o wrx", "rd"], "helo w"),
    ],
)
def test_stop_strings(stop, expected):
    params = scripted("Ahelo wrd!")
    assert jsparse.generate(params, "A", stop=stop) == expected
    pieces = stream(params, "A", stop=stop)
    assert "".join(pieces) == expected
    assert "" not in pieces


def test_a_stop_string_in_the_prompt_does_not_end_anything():
    assert jsparse.generate(scripted("Ahelo wrd!"), "o A", stop=["o A", "A"]) == "helo wrd!"


def test_text_is_held_back_until_it_is_certain():
    """Pieces are 1 and then 4 tokens; 'lo w' begins in the second and ends in the third."""
    params = scripted("Ahelo wrdxyz!")
    assert stream(params, "A", stop="lo w") == ["h", "e"]
    assert stream(params, "A", stop="lo z") == ["h", "e", "lo wrdx", "yz!"]


@pytest.mark.parametrize("stop", [["aé"], ["bcaé"], ["a€", "aé"]])
def test_a_stop_string_is_held_back_behind_an_unfinished_character(stop):
    """The stop string's é is split between two pieces (tokens 5 and 6): its a must not have been sent before."""
    params = scripted("Axbcaézw")
    expected = jsparse.generate(params, "A", stop=stop)
    assert expected in ("xbc", "x")
    assert "".join(stream(params, "A", stop=stop)) == expected


def test_the_first_stop_string_to_be_complete_ends_the_text():
    """The result does not depend on how many tokens are looked at at once."""
    params = scripted("Axabcdefgh")
    stop = ["b", "abcdef"]
    assert "".join(stream(params, "A", stop=stop)) == jsparse.generate(params, "A", stop=stop) == "xa"


@pytest.mark.parametrize("lead", ["", "x", "xy", "xyz"])
def test_characters_split_over_tokens_are_never_sent_broken(lead):
    text = lead + "é€😀!"
    params = scripted("A" + text)
    pieces = stream(params, "A")
    assert "".join(pieces) == text == jsparse.generate(params, "A")
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 1


def test_an_unfinished_character_at_the_end_is_sent_at_last():
    params = scripted("Ax€")
    pieces = stream(params, "A", max_new_tokens=3)
    assert "".join(pieces) == jsparse.generate(params, "A", max_new_tokens=3) == "x\ufffd"


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4}, {"stop": ["a", "e"]}, {"stop": "qqq"}])
def test_streamed_pieces_join_to_the_text(options, wordy):
    for prompt in ("def f(", "Zürich €", [{"role": "user", "content": "hi"}]):
        pieces = stream(wordy, prompt, max_new_tokens=45, **options)
        assert all(isinstance(piece, str) and piece for piece in pieces)
        assert "".join(pieces) == jsparse.generate(wordy, prompt, max_new_tokens=45, **options)


def test_streamed_ids_join_to_the_ids(tiny_fitted):
    pieces = stream(tiny_fitted, PROMPT, max_new_tokens=21)
    assert len(pieces) > 3
    np.testing.assert_array_equal(np.concatenate(pieces), jsparse.generate(tiny_fitted, PROMPT, max_new_tokens=21))


def with_eos(params: jsparse.Params, *eos: int) -> jsparse.Params:
    return dataclasses.replace(params, config=dataclasses.replace(params.config, eos_token_ids=eos))


def test_an_end_of_text_token_ends_its_sequence_alone(tiny_fitted):
    free = [tokens.tolist() for tokens in jsparse.generate(tiny_fitted, PROMPTS, max_new_tokens=21)]
    eos = next(token for i, token in enumerate(free[0]) if i >= 4 and token not in free[0][:i])
    expected = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in free]
    assert len({len(tokens) for tokens in expected}) > 1
    found = []
    ended = jsparse.generate(with_eos(tiny_fitted, 1000, eos), PROMPTS, max_new_tokens=21, on_finish=found.append)
    assert [tokens.tolist() for tokens in ended] == expected
    assert found[0].decoded_tokens == sum(len(tokens) - 1 for tokens in expected)
    alone = []
    jsparse.generate(with_eos(tiny_fitted, eos), PROMPT, max_new_tokens=200, on_finish=alone.append)
    assert alone[0].decoded_tokens == len(expected[0]) - 1


def test_the_loop_stops_with_its_sequences(tiny_fitted, monkeypatch):
    """No further chunk is run, and the chunk's own loop ends, once all sequences have."""
    tokens = jsparse.generate(tiny_fitted, PROMPT, max_new_tokens=10).tolist()
    calls = []

    def counted(*arguments, **options):
        out = step_chunk(*arguments, **options)
        calls.append(int(np.asarray(out[3]).max()))
        return out

    monkeypatch.setattr("jsparse.decoding.loop.step_chunk", counted)
    jsparse.generate(with_eos(tiny_fitted, tokens[2]), PROMPT, max_new_tokens=200)
    assert calls == [tokens.index(tokens[2])]
    calls.clear()
    jsparse.generate(with_eos(tiny_fitted, tokens[0]), PROMPT, max_new_tokens=200)
    assert calls == []


def test_a_stop_string_ends_the_loop():
    params = scripted("Ahelo wrd!")
    found = []
    assert jsparse.generate(params, "A", stop="l", stream=False, on_finish=found.append) == "he"
    assert found[0].decoded_tokens <= 32
    pieces = stream(params, "A", stop="l", on_finish=found.append)
    assert pieces == ["h", "e"]
    assert found[1].decoded_tokens == 4


def test_the_kind_in_is_the_kind_out(wordy):
    text = jsparse.generate(wordy, "ab", max_new_tokens=12)
    assert isinstance(text, str)
    assert jsparse.generate(wordy, ["ab", "abc"], max_new_tokens=12) == [
        text,
        jsparse.generate(wordy, "abc", max_new_tokens=12),
    ]
    assert jsparse.generate(wordy, ["ab"], max_new_tokens=12) == [text]
    ids = wordy.tokenizer.encode("ab")
    for prompt in (ids, tuple(ids), np.array(ids), jnp.array(ids), np.array(ids, np.uint8), [np.int64(i) for i in ids]):
        tokens = jsparse.generate(wordy, prompt, max_new_tokens=12)
        assert isinstance(tokens, np.ndarray)
        assert tokens.dtype == np.int32
        assert wordy.tokenizer.decode(ids + tokens.tolist())[2:] == text
    for prompts in ([ids, ids], np.array([ids, ids]), (np.array(ids), ids), jnp.array([ids, ids])):
        outputs = jsparse.generate(wordy, prompts, max_new_tokens=12)
        assert isinstance(outputs, list)
        for output in outputs:
            np.testing.assert_array_equal(output, tokens)
    chat = [{"role": "user", "content": "a"}]
    said = jsparse.generate(wordy, chat, max_new_tokens=12)
    assert said == jsparse.generate(wordy, "a!", max_new_tokens=12)
    assert jsparse.generate(wordy, [chat, "a!"], max_new_tokens=12) == [said, said]


def test_a_space_at_the_start_of_a_completion_is_kept():
    assert jsparse.generate(scripted("A wrd"), "A") == " wrd"


def compilations(caplog, action) -> int:
    """How many programs XLA compiles while `action` runs."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        action()
    return sum(record.getMessage().startswith("Compiling") for record in caplog.records)


def test_other_prompts_and_options_compile_nothing(caplog, wordy):
    def run(prompt="x" * 20, **options):
        jsparse.generate(wordy, prompt, max_new_tokens=16, **options)

    run(stop="\x00")
    run(temperature=0.7, top_k=5, top_p=0.9, stop="qu")
    sizes = prefill_chunk._cache_size(), step_chunk._cache_size()

    def others():
        run("y" * 27)
        run(stop=["a", "b"])
        run("z" * 17, temperature=1.3, top_k=40, top_p=0.5, seed=9)
        run(temperature=0.2, stop="end")

    assert compilations(caplog, others) == 0
    assert (prefill_chunk._cache_size(), step_chunk._cache_size()) == sizes
    assert compilations(caplog, lambda: run("y" * 100)) > 0, "the count cannot see compilations"
