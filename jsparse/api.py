"""The public `fit_predictors`, over everything that it takes."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsparse.directories import read_path
from jsparse.model.parameters import check_params
from jsparse.model.weights import Params
from jsparse.options import check_callback
from jsparse.predictors.fit import fit_layers, make_rows
from jsparse.predictors.options import CalibrationOptions, LayerReport
from jsparse.settings import each_with_own_settings, own_settings


def fit_predictors(
    params: Params,
    texts: Sequence[Any] | str,
    *,
    on_layer: Callable[[LayerReport], None] | None = None,
    state_dir: str | Path | None = None,
    **options: Any,
) -> Params:
    """Fit a predictor for every layer.

    Args:
      params: a model whose FFN has zeros (`jsparse.model.ffn.SPARSE_KINDS`).
      texts: calibration text, a list of texts or chats (lists of messages), or of 1-D arrays of token ids.
      on_layer: called after each layer with its report.
      state_dir: a directory for finished layers; fitting again with the same model, texts and options continues
        there after an interruption, with identical results.
      **options: fields of `CalibrationOptions`: rank, bits, sparsity, tokens, seed, ...

    Returns:
      params with predictors.

    Raises:
      JsparseError: the model, the texts or an option cannot be used.
    """
    check_params(params)
    check_callback("on_layer", on_layer)
    settings = CalibrationOptions(**options)
    settings.check(params.config)
    state_dir = None if state_dir is None else read_path(state_dir, "state_dir")
    with own_settings():
        rows = make_rows(params, texts, settings)
    predictors = []
    for predictor, report in each_with_own_settings(fit_layers(params, rows, settings, state_dir)):
        predictors.append(predictor)
        if on_layer:
            on_layer(report)
    return dataclasses.replace(params, predictors=tuple(predictors))
