"""The forward pass of a Qwen2 decoder over sequences of different lengths in one key-value cache.

Written for models so small that the calls into torch cost more than the arithmetic: projections are
fused, prompts are packed without padding, and nothing is copied between two tokens. It never
samples and knows no text.

Axes: N packed tokens, R rows (sequences), T most new tokens of a row, S positions of the cache, L
layers, K key-value heads, Q query heads, D head dimension, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sdar.contracts.errors import ConfigurationError

KeyValues = Float[Tensor, "2 L R K S D"]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Copies of one layer's weights.

    Query, key and value are one projection, gate and up another: two calls in place of five.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class RaggedDecoder:
    """Reads its weights from a Hugging Face Qwen2 model, at construction and at every `refresh`."""

    def __init__(self, model: Any, max_positions: int) -> None:
        """Args: max_positions: longest sequence, prompt and response.

        Raises:
            ConfigurationError: an architecture that this forward pass does not reproduce.
        """
        config = model.config
        _check_architecture(config)
        self._model = model
        self._num_queries = int(config.num_attention_heads)
        self._num_key_values = int(config.num_key_value_heads)
        self._head_size = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self._eps = float(config.rms_norm_eps)
        self.max_positions = max_positions
        # The rotary table of every position, looked up by position from then on.
        with torch.inference_mode():
            cos, sin = model.model.rotary_emb(
                model.lm_head.weight, torch.arange(max_positions)[None]
            )
        self._cos, self._sin = cos[0, :, None], sin[0, :, None]
        self.refresh()

    @torch.inference_mode()
    def refresh(self) -> None:
        """Copy the model's weights as they are now.

        Training the model further does not change what is sampled until the next call.
        """
        body = self._model.model
        self._embedding = body.embed_tokens.weight.clone()
        self._norm = body.norm.weight.clone()
        self._head = (
            self._embedding
            if self._model.config.tie_word_embeddings
            else self._model.lm_head.weight.clone()
        )
        self._layers = [_fuse(layer) for layer in body.layers]

    def allocate(self, num_rows: int, num_positions: int) -> KeyValues:
        """An empty cache, of zeros.

        A masked position's value is still multiplied by zero, and memory that was never written may
        hold a NaN.
        """
        shape = (
            2,
            len(self._layers),
            num_rows,
            self._num_key_values,
            num_positions,
            self._head_size,
        )
        return torch.zeros(shape, dtype=self._embedding.dtype)

    def prefill(
        self, token_ids: Sequence[Sequence[int]], starts: Sequence[int], cache: KeyValues
    ) -> Float[Tensor, "R H"]:
        """Feed each row its new tokens, beginning at position starts[row].

        Returns:
            The hidden state of each row's last token.
        """
        # The rows' tokens behind each other: of each packed token its row, and its number among
        # the row's new ones (offsets).
        counts = torch.tensor([len(ids) for ids in token_ids])
        rows = torch.repeat_interleave(torch.arange(len(token_ids)), counts)
        ends = counts.cumsum(0)
        offsets = torch.arange(int(ends[-1])) - (ends - counts)[rows]
        flat = torch.tensor(list(itertools.chain.from_iterable(token_ids)))
        hidden = self._forward(flat, rows, offsets + torch.tensor(starts)[rows], offsets, cache)
        return hidden[ends - 1]

    def decode(
        self, token_ids: Int[Tensor, " R"], positions: Int[Tensor, " R"], cache: KeyValues
    ) -> Float[Tensor, "R H"]:
        """Feed each row one token at its position."""
        return self._forward(token_ids, torch.arange(len(token_ids)), positions, None, cache)

    def compute_logits(self, hidden: Float[Tensor, "R H"]) -> Float[Tensor, "R V"]:
        return F.linear(hidden, self._head).float()

    def _forward(
        self,
        token_ids: Int[Tensor, " N"],
        rows: Int[Tensor, " N"],
        positions: Int[Tensor, " N"],
        offsets: Int[Tensor, " N"] | None,
        cache: KeyValues,
    ) -> Float[Tensor, "N H"]:
        """The hidden state of each packed token, with its key and value written into the cache.

        `offsets` number each row's tokens from 0. None means one token a row, in the rows' order.
        """
        num_positions = int(positions.max()) + 1
        mask = _build_mask(rows, positions, offsets, cache.shape[2])
        cos, sin = self._cos[positions], self._sin[positions]
        heads = [self._num_queries, self._num_key_values, self._num_key_values]
        x = F.embedding(token_ids, self._embedding)
        for layer, keys, values in zip(self._layers, cache[0], cache[1], strict=True):
            qkv = F.linear(self._normalize(x, layer.input_norm), layer.qkv, layer.qkv_bias)
            query, key, value = torch.split(qkv.view(len(x), -1, self._head_size), heads, dim=1)
            # Written before they are read: a token attends to itself and to the new ones before it.
            keys[rows, :, positions] = _rotate(key, cos, sin)
            values[rows, :, positions] = value
            query = _rotate(query, cos, sin)
            attended = self._attend(
                query, keys[:, :, :num_positions], values[:, :, :num_positions], mask, rows, offsets
            )
            x = x + F.linear(attended.reshape(len(x), -1), layer.output)
            gate, up = F.linear(self._normalize(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return self._normalize(x, self._norm)

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
        rows: Tensor,
        offsets: Tensor | None,
    ) -> Float[Tensor, "N Q D"]:
        # Attention takes one axis of queries a row, so packed tokens are spread over slots [R, T]
        # and gathered again. With one token a row the packed order is that of the rows.
        is_grouped = self._num_queries != self._num_key_values
        if offsets is None:
            slots = query[:, :, None]
        else:
            slots = query.new_zeros(
                mask.shape[0], mask.shape[2], self._num_queries, self._head_size
            )
            slots[rows, offsets] = query
            slots = slots.transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            slots, keys, values, attn_mask=mask, enable_gqa=is_grouped
        )
        return attended[:, :, 0] if offsets is None else attended[rows, :, offsets]

    def _normalize(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._eps)


def _check_architecture(config: Any) -> None:
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_plain = rope_type == "default" and layer_types == {"full_attention"}
    if config.model_type != "qwen2" or not is_plain:
        raise ConfigurationError(
            f"The in-process sampler runs plain Qwen2 only, got model_type {config.model_type}, "
            f"rope_type {rope_type}, layers {sorted(layer_types)}. Use the vLLM engine for this "
            "model."
        )


def _build_mask(
    rows: Int[Tensor, " N"],
    positions: Int[Tensor, " N"],
    offsets: Int[Tensor, " N"] | None,
    num_rows: int,
) -> Bool[Tensor, "R 1 T S"]:
    """Which positions each query may see: its own and those before it."""
    num_positions = int(positions.max()) + 1
    visible = torch.arange(num_positions) <= positions[:, None]
    if offsets is None:
        return visible[:, None, None]
    # Rows shorter than the longest leave query slots unused. These may look anywhere, since nobody
    # reads them; with nothing to look at their softmax would be NaN.
    padded = torch.ones(num_rows, int(offsets.max()) + 1, num_positions, dtype=torch.bool)
    padded[rows, offsets] = visible
    return padded[:, None]


def _fuse(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    has_bias = attention.q_proj.bias is not None
    weights = [projection.weight for projection in projections]
    biases = [projection.bias for projection in projections]
    return _Layer(
        input_norm=layer.input_layernorm.weight.clone(),
        qkv=torch.cat(weights),
        qkv_bias=torch.cat(biases) if has_bias else None,
        output=attention.o_proj.weight.clone(),
        mlp_norm=layer.post_attention_layernorm.weight.clone(),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight.clone(),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Rotary embedding: dimension i and i + D/2 are the two coordinates that are turned together.
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
