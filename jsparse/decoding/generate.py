"""`jsparse.generate`: prompts in, completions out, of the same kind."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jsparse.decoding.loop import STEPS, Decoding
from jsparse.decoding.sampling import Sampling
from jsparse.decoding.statistics import Statistics
from jsparse.errors import JsparseError
from jsparse.executors.select import select_executor
from jsparse.model.cache import KV_DTYPES
from jsparse.model.executor import Executor
from jsparse.model.parameters import check_params
from jsparse.model.weights import Params
from jsparse.options import check_callback, check_flag, is_whole, read_number, read_whole
from jsparse.settings import each_with_own_settings, own_settings
from jsparse.text.completion import TextCompletion, TokenCompletion

_STREAM_STEPS = 4


def generate(
    params: Params,
    prompt: Any,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    tools: Sequence[Any] | None = None,
    stream: bool = False,
    executor: str | Executor = "auto",
    sparse: bool | None = None,
    pipeline: str = "sequential",
    kv_dtype: str | None = None,
    on_finish: Callable[[Statistics], None] | None = None,
) -> Any:
    """Continue a prompt, or several at once. Prefill is dense; decoding is sparse where predictors are fitted.

    Args:
      params: a model from `load`, `fit_predictors` or a converter.
      prompt: text, a list of chat messages ({"role", "content"}, through the tokenizer's template), or a 1-D array or
        list of token ids; or a list of any one of these, of different lengths.
      max_new_tokens: most tokens to add; generation also ends at an end-of-text token, and at the context length, which
        is logged as a warning.
      temperature: 0 takes the most likely token; otherwise draws from softmax(logits / temperature).
      top_k, top_p: keep the top_k most likely tokens, and of those the smallest set with probability top_p.
      seed: of the random draws; a sequence's draws do not depend on its neighbours in the batch.
      stop: text that ends a completion and is left out of it; for text prompts. It may name special tokens, which the
        completion itself never shows.
      tools: for chats: JSON schemas or Python functions that the chat template tells the model of.
      stream: return an iterator over pieces of the completion of a single prompt.
      executor: auto, a name of `jsparse.executors.select.EXECUTORS`, or an `Executor`.
      sparse: True demands fitted predictors, False decodes densely, None is sparse when fitted.
      pipeline: sequential or parallel (see `jsparse.model.ffn.FFNSpec`).
      kv_dtype: what keys and values are stored in, one of `jsparse.model.cache.KV_DTYPES`; int8 halves what attention
        reads. None for the dtype of the model's embedding, bfloat16 where that has low-bit rows.
      on_finish: called with the generation's `Statistics` when it has ended.

    Returns:
      The completion without the prompt: text for text and chat, an int32 array of ids (end-of-text included) for ids;
      a list of these for a list.

    Raises:
      JsparseError: the prompt or an option cannot be used, or the model's logits are not finite; the message says which
        and why.
    """
    check_params(params)
    if tools is not None and not isinstance(tools, list | tuple):
        raise JsparseError(f"tools is {tools!r}; it must be a list")
    with own_settings():
        prompts, single, is_text = _read_prompts(params, prompt, tools)
    check_flag("stream", stream)
    check_flag("sparse", sparse, optional=True)
    check_callback("on_finish", on_finish)
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) for text in stops):
        raise JsparseError(f"stop is {stop!r}; it must be a string or a list of strings")
    if stops and not is_text:
        raise JsparseError("stop strings need text prompts; for token ids, cut the output yourself")
    if "" in stops:
        raise JsparseError("a stop string is empty")
    if stream and not single:
        raise JsparseError(f"stream=True takes a single prompt; {len(prompts)} were given")
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise JsparseError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of at least 1")
    if not isinstance(executor, str | Executor) or isinstance(executor, type):
        raise JsparseError(f"executor is {executor!r}; it must be auto, the name of one, or an executor")
    if pipeline not in ("sequential", "parallel"):
        raise JsparseError(f"pipeline is {pipeline!r}; it must be sequential or parallel")
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise JsparseError(f"kv_dtype is {kv_dtype!r}; it must be one of {', '.join(KV_DTYPES)}")
    if sparse and params.predictors is None:
        raise JsparseError("sparse=True needs predictors; fit them with jsparse.fit_predictors or jsparse.calibrate")
    if not is_whole(seed) or not -(2**31) <= seed < 2**31:
        raise JsparseError(f"seed is {seed}; it must be a 32-bit integer")
    chosen = {"temperature": read_number("temperature", temperature), "top_p": read_number("top_p", top_p)}
    chosen["top_k"] = None if top_k is None else read_whole("top_k", top_k)

    with own_settings():
        decoding = Decoding(
            params,
            prompts,
            sampling=Sampling.create(params.config.vocab_size, **chosen),
            max_new_tokens=int(max_new_tokens),
            seed=int(seed),
            executor=select_executor(executor),
            sparse=params.predictors is not None if sparse is None else sparse,
            pipeline=pipeline,
            kv_dtype=kv_dtype,
        )
    make = (lambda ids: TextCompletion(params.tokenizer, ids, stops)) if is_text else (lambda ids: TokenCompletion())
    outputs = [make(ids) for ids in prompts]
    pieces = each_with_own_settings(_run(decoding, outputs, _STREAM_STEPS if stream else STEPS))
    if stream:
        return _stream(pieces, decoding, on_finish)
    for _ in pieces:
        pass
    if on_finish:
        on_finish(decoding.statistics)
    results = [output.value() for output in outputs]
    return results[0] if single else results


def _stream(pieces: Iterator[list], decoding: Decoding, on_finish: Callable[[Statistics], None] | None) -> Iterator:
    """The pieces of a single completion that are not empty."""
    for (piece,) in pieces:
        if len(piece):
            yield piece
    if on_finish:
        on_finish(decoding.statistics)


def _run(decoding: Decoding, outputs: list, steps: int) -> Iterator[list]:
    tokens = decoding.first()
    while True:
        last = decoding.done
        pieces = [output.extend(row.tolist(), last) for output, row in zip(outputs, tokens)]
        stopped = np.array([output.ended for output in outputs])
        yield pieces
        decoding.check_finite(stopped)
        if last:
            break
        if stopped.any():
            decoding.finish(stopped)
        tokens = decoding.advance(steps)
    if cut := sum(not output.ended for output, by_context in zip(outputs, decoding.cut) if by_context):
        what = "the completion" if len(outputs) == 1 else f"{cut} of {len(outputs)} completions"
        context = decoding.model.config.context_length
        message = "%s ended before max_new_tokens: the context of %d tokens is full"
        logging.getLogger("jsparse").warning(message, what, context)


def _read_prompts(params: Params, prompt: Any, tools: Sequence[Any] | None) -> tuple[list[list[int]], bool, bool]:
    """Token ids of every prompt, whether it was a single one, and whether text comes back.

    Raises: JsparseError: a prompt is empty, too long, of no known kind, or has ids outside the vocabulary.
    """
    config = params.config
    single = _kind(prompt) is not None
    if not single and not isinstance(prompt, list | tuple) and np.ndim(prompt) != 2:
        raise JsparseError(f"a prompt cannot be of type {type(prompt).__name__}")
    items = [prompt] if single else list(prompt)
    if not items:
        raise JsparseError("the prompt is empty")
    kinds = {_kind(item) for item in items}
    if tools and kinds != {"chat"}:
        raise JsparseError("tools need chats: lists of messages, which the chat template tells of them")
    if None in kinds or kinds > {"ids"}:
        raise JsparseError("a list of prompts must hold texts, chats (lists of messages) or 1-D arrays of token ids")
    is_text = "ids" not in kinds
    if is_text and params.tokenizer is None:
        raise JsparseError("this model has no tokenizer; pass arrays of token ids")
    prompts = []
    for number, item in enumerate(items):
        where = "the prompt" if single else f"prompt {number}"
        if len(item) == 0:
            raise JsparseError(f"{where} is empty")
        if _kind(item) == "text":
            ids = params.tokenizer.encode(item)
        elif _kind(item) == "chat":
            ids = params.tokenizer.encode_chat(item, tools=tools)
        else:
            ids = [int(i) for i in np.asarray(item)]
        if not ids:
            raise JsparseError(f"{where} is empty: it encodes to no tokens")
        outside = [i for i in ids if not 0 <= i < config.vocab_size]
        if outside:
            raise JsparseError(f"{where} has token id {outside[0]}; the vocabulary is 0 to {config.vocab_size - 1}")
        if len(ids) >= config.context_length:
            raise JsparseError(f"{where} has {len(ids)} tokens; the context is {config.context_length}, one of it new")
        prompts.append(ids)
    return prompts, single, is_text


def _kind(item: Any) -> Literal["text", "chat", "ids"] | None:
    """What a single prompt is, or None for anything else."""
    if isinstance(item, str):
        return "text"
    if isinstance(item, list | tuple):
        if item and all(isinstance(message, dict) for message in item):
            return "chat"
        return "ids" if item and all(isinstance(i, int | np.integer) for i in item) else None
    is_array = hasattr(item, "__array__") and np.ndim(item) == 1
    return "ids" if is_array and np.issubdtype(np.asarray(item).dtype, np.integer) else None
