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


class Scoring(IntEnum):
    """Of the router's logits: moe.h."""

    SOFTMAX = 0
    SIGMOID = 1
    SOFTMAX_AFTER_TOP_K = 2


class GroupScore(IntEnum):
    """Of a group of experts: moe.h."""

    MAX = 0
    TOP2_SUM = 1


class GateKind(IntEnum):
    """Of an expert's MLP: moe.h."""

    SILU = 0
    CLAMPED_SWIGLU = 1


class Phase(IntEnum):
    """In which a step asks an exchange with other ranks for something: moe.h."""

    SEND = 0
    RECEIVE = 1
    RETURN = 2
    COLLECT = 3


class StepStatus(IntEnum):
    """How a step ended: moe.h."""

    DONE = 0
    EXCHANGE_FAILED = 1
    NO_EXPERT = 2


class Routing(ctypes.Structure):
    _fields_ = (
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("scoring", c_int32),
        ("group_score", c_int32),
        ("num_groups", c_int32),
        ("top_groups", c_int32),
        ("normalize", c_int32),
        ("scale", c_float),
    )


class Gate(ctypes.Structure):
    _fields_ = (("kind", c_int32), ("alpha", c_float), ("limit", c_float))


class Expert(ctypes.Structure):
    _fields_ = (("gate_up", Matrix), ("down", Matrix))


class Moe(ctypes.Structure):
    _fields_ = (
        ("routing", Routing),
        ("gate", Gate),
        ("num_slots", c_int32),
        ("shared_gated", c_int32),
        ("index", c_int32),
        ("router", Matrix),
        ("correction_bias", c_void_p),
        ("like", Expert),
        ("slots", POINTER(Expert)),
        ("slot_of", c_void_p),
        ("shared", POINTER(Expert)),
        ("expert_counts", c_void_p),
        ("slot_counts", c_void_p),
    )


class Exchange(ctypes.Structure):
    _fields_ = (
        ("layer", c_int32),
        ("num_rows", c_int32),
        ("hidden", c_int32),
        ("top_k", c_int32),
        ("rows_bf16", c_int32),
        ("row_stride", c_int32),
        ("rows", c_void_p),
        ("experts", c_void_p),
        ("weights", c_void_p),
        ("num_received", c_int64),
        ("received", c_void_p),
        ("slots", c_void_p),
        ("outputs", c_void_p),
        ("returned", c_void_p),
    )


EXCHANGE_CALL = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int32, POINTER(Exchange))


class ExchangeHook(ctypes.Structure):
    _fields_ = (("call", c_void_p), ("context", c_void_p))


class StepResult(ctypes.Structure):
    _fields_ = (("status", c_int32), ("layer", c_int32), ("expert", c_int32))


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
        ("moe", POINTER(Moe)),
        ("window", c_int32),
        ("norm_whole", c_int32),
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
        ("exchange", ExchangeHook),
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
