"""The structs of kernels/cpu/src as ctypes, field by field. tests/kernels/cpu holds their sizes to the compiler's."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum


class Format(IntEnum):
    """How a weight matrix is kept: matrix.h."""

    F32 = 0
    BF16 = 1
    I8 = 2
    Q8 = 3
    Q4 = 4


class KvType(IntEnum):
    """Of the KV cache: attention.h."""

    F32 = 0
    BF16 = 1
    I8 = 2


class EmbeddingKind(IntEnum):
    """Where a token's embedding comes from: model.h."""

    F32 = 0
    BF16 = 1
    HEAD = 2


class RowType(IntEnum):
    """Of the values of a row: relayout.h."""

    F32 = 0
    BF16 = 1
    F16 = 2


class WireType(IntEnum):
    """Of the values of a compressed row: relayout.h."""

    I8 = 0
    F8 = 1


class Matrix(ctypes.Structure):
    _fields_ = (
        ("format", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("n_pad", c_int32),
        ("k_pad", c_int32),
        ("reserved", c_int32),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("window", c_int32),
        ("reserved", c_int32),
    )


class ModelShape(ctypes.Structure):
    _fields_ = (
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("vocab", c_int32),
        ("max_positions", c_int32),
        ("norm_eps", c_float),
        ("scale", c_float),
        ("embedding_kind", c_int32),
        ("reserved", c_int32),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("shape", ModelShape),
        ("embedding", c_void_p),
        ("layers", POINTER(Layer)),
        ("final_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("head", Matrix),
    )


class KvCache(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("type", c_int32),
        ("num_blocks", c_int32),
        ("num_layers", c_int32),
        ("num_kv_heads", c_int32),
        ("block_size", c_int32),
        ("head_dim", c_int32),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int32),
        ("num_sequences", c_int32),
        ("num_rows", c_int32),
        ("use_tiles", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("lengths", c_void_p),
        ("blocks", c_void_p),
        ("block_start", c_void_p),
        ("rows", c_void_p),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
    )


class CacheView(ctypes.Structure):
    """kernels.cache_view.CacheView, field by field."""

    _fields_ = (
        ("address", c_void_p),
        ("num_blocks", c_int64),
        ("num_layers", c_int64),
        ("num_heads", c_int64),
        ("num_tokens", c_int64),
        ("row_bytes", c_int64),
        ("block_stride", c_int64),
        ("layer_stride", c_int64),
        ("kv_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    )
