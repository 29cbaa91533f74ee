"""Transformer layers of torch call every layer where that matters."""

from __future__ import annotations

import torch
from torch import nn

from lightning_compress.modules.fast_path import quiet_fast_path_, restore_fast_path_, without_fast_path
from lightning_compress.modules.routing import Form, route_


def test_only_layers_with_another_form_in_them_leave_the_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    before = model.use_nested_tensor, [layer.activation_relu_or_gelu for layer in model.layers]
    assert all(before[1]) and before[0]
    route_(model.layers[0].linear1, Form())
    quiet_fast_path_(model)
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (0, 0)
    assert model.layers[1].activation_relu_or_gelu
    quiet_fast_path_(model)
    restore_fast_path_(model)
    assert before == (model.use_nested_tensor, [layer.activation_relu_or_gelu for layer in model.layers])


def test_the_fused_path_is_off_in_the_block_even_after_an_error() -> None:
    try:
        with without_fast_path():
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyError
    except KeyError:
        assert torch.backends.mha.get_fastpath_enabled()
